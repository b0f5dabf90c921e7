from __future__ import annotations

import numpy as np
import pytest
import torch

from rtresnet.models import zoo
from rtresnet.study.analyses import layer_responses


def test_responses_are_the_deviations_after_batch_norm_over_all_batches() -> None:
    torch.manual_seed(0)
    net = zoo.build(zoo.spec("resnet8")).eval()
    images = np.random.default_rng(0).standard_normal((6, 3, 32, 32)).astype(np.float32)
    result = layer_responses(net, [images[:4], images[4:]])
    assert next(iter(result)) == "conv1" and len(result) == 7
    with torch.no_grad():
        expected = net.bn1(net.conv1(torch.from_numpy(images))).std(correction=0).item()
    assert result["conv1"] == pytest.approx(expected, rel=1e-5)


def test_bottlenecks_count_their_3x3_layers_only() -> None:
    net = zoo.build(zoo.spec("resnet50")).eval()
    result = layer_responses(net, [np.zeros((1, 3, 64, 64), np.float32)])
    assert len(result) == 16 and all(name.endswith("conv2") for name in result)
