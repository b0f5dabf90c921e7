"""Galleries of images on a page: each image is part of the page, with a caption."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMALL = 64  # up to this side, images are shown enlarged, pixel by pixel, and stored as PNG


@dataclass(frozen=True, kw_only=True)
class Tile:
    """An image with its caption.

    Attributes:
        source: The image as a data URI; empty if it cannot be read.
        pixelated: Whether it is enlarged pixel by pixel.
        title: First line of the caption.
        lines: More lines.
        place: Path of the file, or data set and index.
    """

    source: str
    pixelated: bool
    title: str
    lines: tuple[str, ...]
    place: str

    @property
    def name(self) -> str:
        """The place without folders."""
        return self.place.rpartition("/")[2]


def tile(image: np.ndarray | None, title: str, lines: Sequence[str] = (), place: str = "") -> Tile:
    """Create a tile.

    Args:
        image: uint8 [H, W, 3] in the size of a thumbnail; None if it cannot be read.
        title: First line of the caption.
        lines: More lines.
        place: Where the image comes from.
    """
    return Tile(
        source="" if image is None else data_uri(image),
        pixelated=image is not None and max(image.shape[:2]) <= SMALL,
        title=title,
        lines=tuple(lines),
        place=place,
    )


def data_uri(image: np.ndarray) -> str:
    """Encode a uint8 image [H, W, 3]: small ones as PNG without loss, larger ones as JPEG."""
    from PIL import Image

    out = io.BytesIO()
    kind = "png" if max(image.shape[:2]) <= SMALL else "jpeg"
    Image.fromarray(image).save(out, kind, **({"quality": 85} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
