"""What every backend can do. Three files implement it; nothing else knows which library runs."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np

from rtresnet.core.errors import InputError

TopK = tuple[np.ndarray, np.ndarray]
"""indices int64 [N, K] of the K most probable classes and their probabilities float32 [N, K], the
most probable first."""

TOPK = ("indices", "probabilities")
"""What the outputs of a top-K file are called."""

LAYOUTS: dict[str, Literal["nchw", "nhwc"]] = {"float32": "nchw", "uint8": "nhwc"}
"""The layout that goes with each type a file may take."""


class Backend(Protocol):
    """One loaded artifact on one device.

    Attributes:
        provider: What runs the net, as printed beside every figure.
        device: "cpu" or the GPU's name.
        size: Side of the input, in pixels; None where the file leaves it open.
        input_dtype: float32, normalized, or uint8, pixels as they are.
        layout: "nchw", which goes with float32, or "nhwc", with uint8.
        threads: Intra-op threads; None on a GPU.
        versions: Name and version of each library that runs the net.
    """

    provider: str
    device: str
    size: int | None
    input_dtype: np.dtype[Any]
    layout: Literal["nchw", "nhwc"]
    threads: int | None
    versions: dict[str, str]

    def infer(self, images: np.ndarray) -> np.ndarray | TopK:
        """Runs a batch of any N from 1.

        Args:
            images: `input_dtype`, [N, 3, S, S] or [N, S, S, 3] as `layout` says.

        Returns:
            float32 logits [N, classes], or of a top-K file indices and probabilities.

        Raises:
            InputError: Another type or shape.
        """
        ...

    def timings(self) -> dict[str, float]:
        """Milliseconds of the last call's parts, by events; empty where nothing is known."""
        ...

    def close(self) -> None:
        """Gives memory and handles back. Calling it twice is fine."""
        ...


def logits(found: np.ndarray | TopK, path: object) -> np.ndarray:
    """What `infer` returned, where logits are needed.

    Raises:
        InputError: The file gives the most probable classes only.
    """
    if isinstance(found, tuple):
        raise InputError(
            f"{path}: gives the most probable classes, and this needs logits",
            fix="use the file it was made from",
        )
    return found
