"""What every backend can do. Three files implement it; nothing else knows which library runs."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Backend(Protocol):
    """One loaded artifact on one device.

    Attributes:
        provider: What runs the net, as printed beside every figure.
        device: "cpu" or the GPU's name.
        size: Side of the input, in pixels; None where the file leaves it open.
        threads: Intra-op threads; None on a GPU.
        packages: Distributions whose versions belong beside every figure.
    """

    provider: str
    device: str
    size: int | None
    threads: int | None
    packages: tuple[str, ...]

    def infer(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, 3, S, S] to float32 logits [N, classes]; any N from 1."""
        ...

    def timings(self) -> dict[str, float]:
        """Milliseconds of the last call's parts, by events; empty where nothing is known."""
        ...

    def close(self) -> None:
        """Gives memory and handles back. Calling it twice is fine."""
        ...
