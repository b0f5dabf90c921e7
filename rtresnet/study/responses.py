"""Layer responses (section 4.2, figure 7): the standard deviation of what each 3x3 layer puts out.

Taken after batch norm and before ReLU and addition. Residual nets respond less than plain ones,
deeper ones less still: evidence that the residual functions are near zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn


def layer_responses(net: nn.Module, batches: Iterable[np.ndarray]) -> dict[str, float]:
    """Run images through a net and observe its batch norms.

    Args:
        net: In evaluation mode afterwards.
        batches: float32 [N, 3, S, S].

    Returns:
        3x3 convolution to the standard deviation of its normalized output, in layer order.
    """
    sums: dict[str, Tensor] = {}
    handles = []
    modules = dict(net.named_modules())
    for name, module in modules.items():
        if not isinstance(module, nn.Conv2d) or module.kernel_size != (3, 3):
            continue
        norm = modules[name.replace("conv", "bn")]

        def watch(_: nn.Module, __: object, out: Tensor, name: str = name) -> None:
            values = out.double()
            moments = torch.stack(
                [torch.tensor(float(out.numel())).double(), values.sum(), values.square().sum()]
            )
            sums[name] = sums[name] + moments if name in sums else moments

        handles.append(norm.register_forward_hook(watch))
    try:
        with torch.inference_mode():
            for images in batches:
                net.eval()(torch.from_numpy(images))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: math.sqrt(max(float(square / n - (total / n) ** 2), 0.0))
        for name, (n, total, square) in sums.items()
    }
