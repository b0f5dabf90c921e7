"""A net as a graph of named operations, and what folding a batch norm computes.

Export writes this graph, and fine-tuning in INT8 (`train/qat.py`) computes it: one arithmetic, so
that both come to the same weights bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from rtresnet.models.resnet import Add, PadShortcut

INPUT, OUTPUT = "images", "logits"


class _Tracer(fx.Tracer):
    """Keeps our own operations whole, as torch's modules are."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        whole = isinstance(m, Add | PadShortcut) or getattr(m, "traced_whole", False)
        return whole or super().is_leaf_module(m, qualified_name)


def trace(net: nn.Module) -> fx.GraphModule:
    """The net as a graph of named modules, in order of execution."""
    return fx.GraphModule(net, _Tracer().trace(net))


def folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what `norm(convolution(x))` does in evaluation.

        w' = w * gamma / sqrt(var + eps)        per output channel
        b' = beta - mean * gamma / sqrt(var + eps)

    Computed in float64 and rounded once to float32; gradients pass.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = norm.bias.double() - norm.running_mean.double() * factor
    if convolution.bias is not None:
        bias = bias + convolution.bias.double() * factor
    weight = convolution.weight.double() * factor[:, None, None, None]
    return weight.to(convolution.weight.dtype), bias.to(convolution.weight.dtype)
