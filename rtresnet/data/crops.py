"""Random parts of photographs: which box, and the box as a square of the net's size.

Cutting first and resizing once shows what resizing first shows, at a fraction of the work. Boxes
are drawn from a generator that the caller seeds; nothing here knows of files or batches.
"""

from __future__ import annotations

import math

import numpy as np
import torch

Box = tuple[int, int, int, int]
"""Top, left, height, width, in pixels."""

# The largest scale a crop is cut at, in shorter sides a crop's side. A photograph is decoded for
# it whatever the crop, so that what is decoded is a function of the image and the size alone.
WORKING = 480 / 224


def scale_box(
    height: int,
    width: int,
    size: int,
    rng: np.random.Generator,
    scales: tuple[float, float] = (256 / 224, 480 / 224),
) -> Box:
    """The paper's scale augmentation (He et al., 2015, section 3.4).

    The shorter side is drawn from [256, 480] for a crop of 224; here the box has the size that
    such a crop has in the image as it is.

    Args:
        height: Of the image, in pixels.
        width: The same.
        size: Side of the crop, in pixels.
        rng: Draws the scale and the place.
        scales: Bounds of the shorter side, in crops' sides.
    """
    short = min(height, width)
    drawn = rng.integers(round(scales[0] * size), round(scales[1] * size) + 1)
    side = min(short, max(1, round(short * size / drawn)))
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    return int(top), int(left), side, side


def area_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A box of a random share of the area and a random shape (Szegedy et al., 2015, section 6).

    Of ten boxes drawn the first that fits is taken. Where none does, it is the largest box in the
    middle of the image whose shape is allowed.

    Args:
        height: Of the image, in pixels.
        width: The same.
        rng: Draws area, shape and place.
        area: Bounds of the box's share of the image, drawn evenly.
        ratio: Bounds of its width over its height, whose logarithm is drawn evenly.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        pixels = height * width * rng.uniform(*area)
        shape = math.exp(rng.uniform(low, high))
        box_height, box_width = round(math.sqrt(pixels / shape)), round(math.sqrt(pixels * shape))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = rng.integers(0, height - box_height + 1)
            left = rng.integers(0, width - box_width + 1)
            return int(top), int(left), box_height, box_width
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def cut(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """The box of an image as a square: one antialiased bilinear resize.

    Args:
        image: uint8 [H, W, 3], read-only or not.
        box: Within the image.
        size: Side of the square, in pixels.

    Returns:
        uint8 [size, size, 3], contiguous.
    """
    top, left, height, width = box
    # torch copies a part of an image before it resizes it. NumPy's copy is as fast, and may be
    # written to, without which torch warns. The batch axis comes before the axes change places:
    # only so does torch see channels-last memory, and takes half the time.
    part = np.array(image[top : top + height, left : left + width], order="C")
    pixels = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
