"""Random crops of photographs, and augmentation of batches on the device.

Random numbers come in as NumPy arrays, one entry per image. They are drawn on the CPU from the
recipe's seed and the step (`training/loader.py`), so a run is the same on every device and for any
number of processes. Batches are [N, 3, H, W] in channels-last memory. `trivial.py` has the
operations of TrivialAugment. Independent of files and recipes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rtresnet.core.preprocess import Preprocess

Box = tuple[int, int, int, int]
"""Top, left, height, width, in pixels."""

# Shorter side of the paper's scale augmentation, relative to the crop. Photographs are decoded for
# the largest one regardless of the crop, so the decoded pixels depend only on the image and the
# size.
SMALLEST_SCALE, LARGEST_SCALE = 256 / 224, 480 / 224
LARGEST_RATIO = 4 / 3  # of a box's sides

# AlexNet's principal components of the RGB values of ImageNet's training set, in units of [0, 1]
# (Krizhevsky, Sutskever and Hinton, 2012, section 4.1; the numbers are fb.resnet.torch's).
COLOUR_VALUES = (0.2175, 0.0188, 0.0045)
COLOUR_VECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


def to_device(values: np.ndarray, device: torch.device | str) -> Tensor:
    """Copy an array to a device; to a GPU asynchronously, through pinned memory.

    Args:
        values: Any shape and a dtype that torch knows. On a CPU the result shares its memory.
        device: Device of the result.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # torch keeps it until the copy is done
    return tensor.to(device, non_blocking=True)


def stack_to_device(arrays: Sequence[np.ndarray], device: torch.device | str) -> Tensor:
    """Stack arrays of one shape and dtype on a device, with a single copy on the host."""
    if torch.device(device).type != "cuda":
        return to_device(np.stack(arrays), device)
    dtype = torch.from_numpy(arrays[0][:0]).dtype
    pinned = torch.empty((len(arrays), *arrays[0].shape), dtype=dtype, pin_memory=True)
    np.stack(arrays, out=pinned.numpy())
    return pinned.to(device, non_blocking=True)


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a float32 vector on a device, created once. Do not change it in place."""
    with torch.inference_mode(False):  # may be created in an evaluation and used in training
        return torch.tensor(values, device=device)


def scale_box(height: int, width: int, size: int, rng: np.random.Generator) -> Box:
    """Draw a box by the paper's scale augmentation (He et al., 2015, section 3.4).

    The paper resizes the shorter side to a random length in [256, 480] and crops 224 pixels. The
    box is that crop in the original image: cropping first and resizing once gives the same result
    at a fraction of the cost.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        size: Side of the crop, in pixels.
        rng: Draws scale and position.
    """
    short = min(height, width)
    drawn = rng.integers(round(SMALLEST_SCALE * size), round(LARGEST_SCALE * size) + 1)
    side = min(short, max(1, round(short * size / drawn)))
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    return int(top), int(left), side, side


def area_box(
    height: int, width: int, rng: np.random.Generator, area: tuple[float, float] = (0.08, 1.0)
) -> Box:
    """Draw a box of random area and aspect ratio, 3:4 to 4:3 (Szegedy et al., 2015, section 6).

    Uses the first of ten random boxes that fits, else the largest centred box of an allowed shape.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        rng: Draws area, shape and position.
        area: Bounds of the box's share of the image; uniform.
    """
    largest = math.log(LARGEST_RATIO)
    for _ in range(10):
        pixels = height * width * rng.uniform(*area)
        shape = math.exp(rng.uniform(-largest, largest))
        box_height, box_width = round(math.sqrt(pixels / shape)), round(math.sqrt(pixels * shape))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = rng.integers(0, height - box_height + 1)
            left = rng.integers(0, width - box_width + 1)
            return int(top), int(left), box_height, box_width
    box_height = min(height, max(1, round(width * LARGEST_RATIO)))
    box_width = min(width, max(1, round(height * LARGEST_RATIO)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def crop_and_resize(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Resize a box of an image to a square (bilinear, antialiased).

    Args:
        image: uint8 [H, W, 3], read-only or not.
        box: Within the image.
        size: Side of the square, in pixels.

    Returns:
        uint8 [size, size, 3], contiguous.
    """
    top, left, height, width = box
    # NumPy's copy is as fast as torch's, and writable; torch warns about read-only arrays.
    # The batch axis comes before the permutation: only then does torch see channels-last memory,
    # which halves the time.
    part = np.array(image[top : top + height, left : left + width], order="C")
    pixels = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def gather(
    images: Tensor,
    chosen: np.ndarray,
    *,
    offsets: np.ndarray,
    mirrored: np.ndarray,
    padding: int,
    mode: str = "zeros",
) -> Tensor:
    """Select images of a whole set, pad, crop and mirror them in one read (section 4.2).

    Args:
        images: uint8 [N, H, W, 3], all of them.
        chosen: int [B].
        offsets: int [2, B], top and left in the padded image, from 0 to 2 * padding.
        mirrored: bool [B].
        padding: Pixels on each side.
        mode: "zeros" or "reflect".

    Returns:
        uint8 [B, 3, H, W], channels-last.
    """
    device, (height, width) = images.device, images.shape[1:3]
    # One copy to the device; the rest is computed there.
    index, top, left, flipped = to_device(np.stack([chosen, *offsets, mirrored]), device)
    rows = top[:, None] + torch.arange(height, device=device) - padding
    columns = left[:, None] + torch.arange(width, device=device) - padding
    columns = torch.where(flipped[:, None] != 0, columns.flip(1), columns)
    picked = images[
        index[:, None, None],
        _reflected(rows, height)[:, :, None],
        _reflected(columns, width)[:, None, :],
    ]
    if padding and mode == "zeros":
        inside_rows = (rows >= 0) & (rows < height)
        inside_columns = (columns >= 0) & (columns < width)
        picked *= (inside_rows[:, :, None] & inside_columns[:, None, :]).unsqueeze(3)
    return picked.permute(0, 3, 1, 2)


def _reflected(positions: Tensor, length: int) -> Tensor:
    """Reflect positions beyond the border at the border pixel, which is not repeated."""
    return (length - 1) - ((length - 1) - positions.abs()).abs()


def mirror(images: Tensor, mirrored: np.ndarray) -> Tensor:
    """Mirror the images that bool [N] selects, left to right."""
    if not mirrored.any():
        return images
    selected = to_device(mirrored, images.device)[:, None, None, None]
    return torch.where(selected, images.flip(3), images)


def normalize(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Convert uint8 or float [N, 3, H, W] of 0 to 255 as `Preprocess.normalize`, on the device."""
    std = constant(tuple(preprocess.std), images.device).view(1, 3, 1, 1)
    mean = constant(tuple(preprocess.mean), images.device).view(1, 3, 1, 1)
    return images.float().mul(1 / (255 * std)).sub_(mean / std)


def shrink(images: Tensor, side: int) -> Tensor:
    """Resize float images to [N, 3, side, side] (bilinear, antialiased)."""
    if images.shape[2:] == (side, side):
        return images
    return functional.interpolate(images, (side, side), mode="bilinear", antialias=True).contiguous(
        memory_format=torch.channels_last
    )


def shift_colours(images: Tensor, strengths: np.ndarray) -> Tensor:
    """Add multiples of the principal colours (AlexNet's augmentation; section 3.4).

    Args:
        images: uint8 or float [N, 3, H, W] of 0 to 255.
        strengths: float [N, 3], drawn from a normal distribution.

    Returns:
        float32, not clipped, as published.
    """
    shift = 255 * (strengths * np.array(COLOUR_VALUES)) @ np.array(COLOUR_VECTORS).T
    return images.float() + to_device(shift.astype(np.float32), images.device)[:, :, None, None]


def erase(images: Tensor, boxes: np.ndarray) -> Tensor:
    """Set a rectangle of each normalized image to zero, the mean (Zhong et al., 2017).

    Args:
        images: float [N, 3, H, W]; changed in place.
        boxes: int [N, 4]: top, left, height, width; a height of 0 changes nothing.
    """
    return images.mul_(1 - _mask(images, boxes))


def erasing_boxes(rng: np.random.Generator, count: int, side: int, share: float) -> np.ndarray:
    """Draw rectangles of 2 to 33 % of the image, aspect ratio up to 3.3; int [count, 4]."""
    area = rng.uniform(0.02, 0.33, count) * side**2
    ratio = np.exp(rng.uniform(np.log(0.3), np.log(3.3), count))
    sizes = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)]).round().astype(int)
    sizes = sizes.clip(1, side)
    corners = np.floor(rng.random((2, count)) * (side - sizes + 1)).astype(int)
    sizes[:, rng.random(count) >= share] = 0
    return np.stack([*corners, *sizes], axis=1)


def mixup(images: Tensor, share: float) -> Tensor:
    """Blend each image with its neighbour in the batch (Zhang et al., 2018)."""
    return images * share + images.roll(1, 0) * (1 - share)


def cutmix(images: Tensor, box: np.ndarray) -> tuple[Tensor, float]:
    """Replace a rectangle of each image by its neighbour's (Yun et al., 2019).

    Args:
        images: float [N, 3, H, W].
        box: int [4], the same for the whole batch.

    Returns:
        The images, and the unreplaced share of each.
    """
    mask = _mask(images, box[None])
    mixed = torch.where(mask.bool(), images.roll(1, 0), images)
    return mixed, 1 - float(box[2] * box[3]) / (images.shape[2] * images.shape[3])


def cutmix_box(rng: np.random.Generator, side: int, share: float) -> np.ndarray:
    """Draw the rectangle that leaves `share`: random centre, clipped at the border; int [4]."""
    half = side * np.sqrt(1 - share) / 2
    centre = rng.uniform(0, side, 2)
    low = np.clip(np.round(centre - half), 0, side).astype(int)
    high = np.clip(np.round(centre + half), 0, side).astype(int)
    return np.concatenate([low, high - low])


def _mask(images: Tensor, boxes: np.ndarray) -> Tensor:
    """Return masks, 1 inside each image's box and 0 outside: [N, 1, H, W], or one for all."""
    top, left, height, width = to_device(boxes.T, images.device)[:, :, None].unbind()
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows, columns = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
    return (rows[:, None, :, None] & columns[:, None, None, :]).to(images.dtype)
