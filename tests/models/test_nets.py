from __future__ import annotations

import numpy as np
import torch

from rtresnet.models import zoo
from rtresnet.models.nets import TorchBackend


def test_numpy_goes_in_and_the_nets_own_logits_come_out() -> None:
    net = zoo.build(zoo.spec("resnet8"), 4).train()
    backend = TorchBackend(net)
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    logits = backend(images)
    assert not net.training
    assert (logits.shape, logits.dtype) == ((3, 4), np.float32)
    with torch.no_grad():
        assert np.array_equal(logits, net(torch.from_numpy(images)).numpy())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
