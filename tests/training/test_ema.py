from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rtresnet.training.ema import ModelEma, recompute_statistics


def test_the_average_follows_the_weights_and_statistics() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    average = ModelEma(net, 0.5)
    expected = {name: tensor.double().clone() for name, tensor in net.state_dict().items()}
    for update in range(20):
        with torch.no_grad():
            for tensor in net.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor))
        decay = min(0.5, (1 + update) / (10 + update))
        average.update(net)
        for name, tensor in net.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    for name, tensor in average.net.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor.double(), expected[name], atol=1e-5), name


def test_the_average_shares_no_memory_with_the_net() -> None:
    net = nn.Linear(2, 2)
    average = ModelEma(net, 0.9)
    before = average.net.weight.clone()
    with torch.no_grad():
        net.weight.zero_()
    assert torch.equal(average.net.weight, before)
    assert not average.net.weight.requires_grad


def test_statistics_over_many_images_are_those_of_all_of_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))
    images = torch.randn(60, 3, 5, 5) * 3 + 7
    used = recompute_statistics(net, images.split(20))
    norm = net[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    assert used == 60 and norm.momentum == 0.1 and not net.training
    assert torch.allclose(norm.running_mean, images.mean((0, 2, 3)), atol=1e-4)
    within = np.mean([part.var((0, 2, 3)).numpy() for part in images.split(20)], axis=0)
    assert norm.running_var.numpy() == pytest.approx(within, rel=1e-4)


def test_without_images_the_statistics_stay() -> None:
    net = nn.BatchNorm2d(3)
    assert recompute_statistics(net, []) == 0
    assert net.running_var is not None and torch.equal(net.running_var, torch.ones(3))
