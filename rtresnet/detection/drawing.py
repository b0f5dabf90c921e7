"""Boxes with names and scores on a copy of an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rtresnet.core import atomic_io

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#17becf")


Drawn = tuple[tuple[float, float, float, float], str, "float | None", "str | None"]
"""Box, class name, score (None: not written) and colour (None: by the class name)."""


def draw_boxes(
    image: np.ndarray,
    objects: Sequence[tuple[tuple[float, float, float, float], str, float | None]],
    path: Path,
) -> None:
    """Write a JPEG with boxes, class names and scores.

    Args:
        image: uint8 RGB [H, W, 3].
        objects: Box, class name and score of each; a score of None is not written.
        path: The file, replaced as a whole.
    """
    picture = Image.fromarray(drawn(image, [(*entry, None) for entry in objects]))
    with atomic_io.atomic_path(path) as temporary:
        picture.save(temporary, "JPEG", quality=92)


def drawn(image: np.ndarray, objects: Sequence[Drawn]) -> np.ndarray:
    """Return a copy of an image uint8 RGB [H, W, 3] with boxes, names and scores."""
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    size = max(10, min(image.shape[:2]) // 30)
    font = ImageFont.load_default(size)
    for box, label, score, colour in reversed(objects):  # the highest score on top
        colour = colour or COLOURS[sum(map(ord, label)) % len(COLOURS)]
        pen.rectangle(box, outline=colour, width=max(2, size // 6))
        text = label if score is None else f"{label} {100 * score:.0f} %"
        x = max(0.0, min(box[0], image.shape[1] - pen.textlength(text, font=font)))
        y = max(0.0, box[1] - size - 2)
        pen.rectangle(pen.textbbox((x, y), text, font=font), fill=colour)
        pen.text((x, y), text, fill="white", font=font)
    return np.asarray(picture)
