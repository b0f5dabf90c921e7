"""Read the images that pages show, as thumbnails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from rtresnet.core.preprocess import resize

if TYPE_CHECKING:
    from rtresnet.data.sources import Source

SIDE = 160  # longer side of a thumbnail, in pixels


def thumbnails(source: Source, indices: Iterable[int]) -> dict[int, np.ndarray]:
    """Decode images and shrink them; smaller ones keep their size.

    Args:
        source: The images.
        indices: Which of them.

    Returns:
        uint8 [H, W, 3] by index, without images that cannot be decoded.
    """
    from rtresnet.data.decode import CorruptImage
    from rtresnet.data.loader import prefetch_map

    def read(index: int) -> np.ndarray | None:
        try:
            return shrink(source.image(index, SIDE))
        except CorruptImage:
            return None

    images = prefetch_map(read, indices)
    return {index: image for index, image in images if image is not None}


def shrink(image: np.ndarray) -> np.ndarray:
    """Resize a uint8 image [H, W, 3] so that its longer side has at most SIDE pixels."""
    height, width = image.shape[:2]
    if max(height, width) <= SIDE:
        return image
    factor = SIDE / max(height, width)
    return resize(image, max(1, round(height * factor)), max(1, round(width * factor)))


def from_data(data: str, split: str, indices: Iterable[int]) -> dict[int, np.ndarray]:
    """Read `thumbnails` of a data set by name.

    Args:
        data: As in "digits" or "folder:DIR".
        split: "train", "test" or "all".
        indices: Indices of the split.

    Returns:
        uint8 [H, W, 3] by index.

    Raises:
        DataError: The data cannot be read.
    """
    from rtresnet.data.sources import open_source

    return thumbnails(open_source(data, split), indices)
