"""Exponential moving average of weights, and re-estimation of batch norm's statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class ModelEma:
    """An exponential moving average of a net's weights and statistics.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that the influence of the
    initialization fades quickly.

    Args:
        net: Net to copy.
        decay: Decay of the average, in [0, 1).
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Include the weights of `net` after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(_floats(self.net), _floats(net), 1 - decay)


def _floats(net: nn.Module) -> list[Tensor]:
    return [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]


def recompute_statistics(net: nn.Module, batches: Iterable[Tensor]) -> int:
    """Recompute batch norm's mean and variance over many images, with fixed weights.

    The running averages of training lag behind the weights; the paper's authors recomputed them
    after training. Batches are weighted by their images.

    Args:
        net: The net whose statistics are replaced; left in evaluation mode.
        batches: float32 [N, 3, S, S], normalized as in evaluation.

    Returns:
        Number of images used.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    count = 0
    net.eval()
    with torch.no_grad():
        for images in batches:
            if len(images) < 2:
                continue
            count += len(images)
            for norm in norms:  # the running statistics stay the mean over all images so far
                norm.train().momentum = len(images) / count
            net(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()
    return count
