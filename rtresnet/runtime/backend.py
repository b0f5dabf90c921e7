"""The interface of all backends: ONNX Runtime (`ort`), TensorRT (`trt`) and torch (`models`)."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np

from rtresnet.core.errors import InputError

TopK = tuple[np.ndarray, np.ndarray]
"""Indices int64 [N, K] of the K most probable classes and their probabilities float32 [N, K], in
descending order."""

TOPK = ("indices", "probabilities")
"""Names of the outputs of a top-K file."""

LAYOUTS: dict[str, Literal["nchw", "nhwc"]] = {"float32": "nchw", "uint8": "nhwc"}
"""Layout of the images by their type."""


class Backend(Protocol):
    """One loaded artifact on one device.

    Attributes:
        provider: Name of the provider or library, for output next to every figure.
        device: "cpu" or the GPU's name.
        size: Side of the input in pixels; None if the file leaves it open.
        input_dtype: float32 for normalized images, or uint8 for pixels.
        layout: "nchw" for float32, "nhwc" for uint8.
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
        """Run a batch of any N from 1.

        Args:
            images: `input_dtype` [N, 3, S, S] or [N, S, S, 3], depending on `layout`.

        Returns:
            float32 logits [N, classes], or indices and probabilities of a top-K file.

        Raises:
            InputError: Wrong type or shape.
        """
        ...

    def timings(self) -> dict[str, float]:
        """Return milliseconds of the last call's parts, measured by events; empty if unknown."""
        ...

    def close(self) -> None:
        """Free memory and handles. Calling it twice is fine."""
        ...


def logits(outputs: np.ndarray | TopK, path: object) -> np.ndarray:
    """Return the logits in a result of `infer`.

    Args:
        outputs: The result of `infer`.
        path: The file, for the message.

    Raises:
        InputError: The file returns only the most probable classes.
    """
    if isinstance(outputs, tuple):
        raise InputError(
            f"{path}: returns the most probable classes, but this command needs logits",
            fix="use the file without embedded top-K",
        )
    return outputs
