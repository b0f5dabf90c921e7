"""What the analyses measure, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GradientNorms:
    """Gradients of one net after some steps.

    Attributes:
        step: Steps done before.
        loss: Of the batch that they were measured on.
        norms: L2 norm of the loss's gradient for the weights of each 3x3 convolution, by name, in
            the order of the layers.
        ratio: The first layer's norm over the last one's.
    """

    step: int
    loss: float
    norms: dict[str, float]
    ratio: float
