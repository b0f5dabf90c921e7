"""Batches for files that take one batch size only, as torch.onnx.export writes them by default."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def pieces(images: np.ndarray, batch: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts images into batches of one size; a last one that is not full repeats its last image.

    A net in evaluation mode computes each image by itself, so what fills a batch up changes no
    other answer.

    Args:
        images: [N, ...], N from 1.
        batch: The size; None: all images together.

    Yields:
        A batch [batch, ...], and how many of its first images are those of `images`.
    """
    if batch is None:
        yield images, len(images)
        return
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        rows = len(part)
        if rows < batch:
            part = np.concatenate([part, np.repeat(part[-1:], batch - rows, axis=0)])
        yield part, rows
