"""Fold batch norm into the convolution before it, and remove modules that inference does not need.

Folding is computed in float64 and rounded once to float32 (`models/nets.py`), before any change
of precision: folding a half-precision net has 1.6 times the error (measured on the logits of
ResNet-50).
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import fx, nn

from rtresnet.core.errors import InputError
from rtresnet.models import nets
from rtresnet.models.vgg import VGG, pooled_by_weight
from rtresnet.models.zoo import VGG_POOLED
from rtresnet.onnxlib import metadata


def fold(net: nn.Module, size: int | None = None) -> fx.GraphModule:
    """Return a traced copy of a net in evaluation mode without batch norms and dropout.

    Args:
        net: float32, on the CPU. Not changed.
        size: Side of the input, in pixels; by default 224. Only the pooling of VGG depends on it.

    Returns:
        The same function as a graph; every convolution has a bias. Its `meta` keeps the
        statistics of the batch norms (`onnxlib/metadata.py`).

    Raises:
        InputError: A VGG net at a size that it cannot be exported for.
    """
    traced = nets.trace(copy.deepcopy(net).eval())
    modules = dict(traced.named_modules())
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for node in traced.graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(norm, nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        before = node.args[0]
        convolution = modules[before.target]
        assert isinstance(convolution, nn.Conv2d) and len(before.users) == 1
        traced.add_submodule(before.target, fold_pair(convolution, norm))
        mean, deviation = norm.bias.detach().numpy(), norm.weight.detach().abs().numpy()
        statistics[before.target] = (mean, deviation)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    if isinstance(net, VGG):
        _fit_pooling(traced, (size or 224) // 32)
    traced.meta[metadata.NORM_STATISTICS.key] = statistics
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _fit_pooling(traced: fx.GraphModule, side: int) -> None:
    """Replace VGG's adaptive pooling to 7x7 for a last map of `side` x `side`.

    A map of 7x7 needs none, a multiple of it an ordinary pooling. A smaller one is not enlarged:
    the first FC layer gets a smaller weight instead.
    """
    (pooling,) = (node for node in traced.graph.nodes if node.target == "avgpool")
    if side > VGG_POOLED and side % VGG_POOLED == 0:
        traced.add_submodule("avgpool", nn.AvgPool2d(side // VGG_POOLED))
        return
    if not 0 < side <= VGG_POOLED:
        raise InputError(
            f"VGG cannot be exported for a last map of {side} x {side}",
            fix="use a size from 32 to 224 pixels, or a multiple of 224",
        )
    pooling.replace_all_uses_with(pooling.args[0])
    traced.graph.erase_node(pooling)
    if side == VGG_POOLED:
        return
    first = traced.get_submodule("classifier.0")
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        weight = pooled_by_weight(first.weight, side)
        smaller = nn.Linear(weight.shape[1], weight.shape[0])
        smaller.weight.copy_(weight)
        smaller.bias.copy_(first.bias)
    traced.add_submodule("classifier.0", smaller.requires_grad_(False))


def fold_pair(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return one convolution that computes `norm(convolution(x))` in evaluation mode."""
    weight, bias = nets.folded(convolution, norm)
    folded = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,  # type: ignore[arg-type]  # torch types it as a longer tuple
        convolution.stride,  # type: ignore[arg-type]
        convolution.padding,  # type: ignore[arg-type]
        convolution.dilation,  # type: ignore[arg-type]
        convolution.groups,
    )
    with torch.no_grad():
        folded.weight.copy_(weight)
        assert folded.bias is not None
        folded.bias.copy_(bias)
    return folded.requires_grad_(False)
