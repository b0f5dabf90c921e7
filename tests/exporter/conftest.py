"""Nets with non-trivial batch norm statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx
import pytest
import torch
from torch import nn

from rtresnet.exporter.fold import fold
from rtresnet.exporter.writer import to_onnx
from rtresnet.models import zoo
from rtresnet.models.resnet import ResNet

MakeNet = Callable[..., ResNet]
Exported = Callable[..., tuple[ResNet, onnx.ModelProto]]


def net_with_statistics(name: str, seed: int = 0, **options: str | None) -> ResNet:
    """Return a net of the zoo in evaluation mode; scales of batch norm may be negative."""
    torch.manual_seed(seed)
    net = zoo.build(zoo.spec(name, **options))
    with torch.no_grad():
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
                norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                norm.weight.uniform_(0.5, 1.5)
                norm.weight *= torch.where(torch.rand_like(norm.weight) < 0.3, -1.0, 1.0)
                norm.bias.normal_(0, 0.2)
    return net.eval()


@pytest.fixture(scope="session")
def make_net() -> MakeNet:
    """make_net("resnet8", seed=1, shortcut="B"): fresh at every call."""
    return net_with_statistics


@pytest.fixture(scope="session")
def exported() -> Exported:
    """exported("resnet8", 32, shortcut="B"): the net and its ONNX form, made once. Read only."""

    @functools.cache
    def export(name: str, size: int, **options: str) -> tuple[ResNet, onnx.ModelProto]:
        net = net_with_statistics(name, **options)
        return net, to_onnx(fold(net), size=size, name=name)

    return export
