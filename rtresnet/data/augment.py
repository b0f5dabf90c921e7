"""Random changes to a batch of images on the device it is trained on.

What is drawn at random comes in as NumPy arrays, one entry an image: drawn on the CPU from the
recipe's seed and the step (`train/feed.py`), so that a run is the same on every device and for
any number of processes. Images are [N, 3, H, W] in channels-last memory.

`trivial.py` has the operations of TrivialAugment.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rtresnet.core.preprocess import Preprocess
from rtresnet.data.transfer import constant, to_device

# AlexNet's principal components of the RGB values of ImageNet's training set, in units of [0, 1]
# (Krizhevsky, Sutskever and Hinton, 2012, section 4.1; the numbers are fb.resnet.torch's).
COLOUR_VALUES = (0.2175, 0.0188, 0.0045)
COLOUR_VECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


def gather(
    images: Tensor,
    chosen: np.ndarray,
    *,
    offsets: np.ndarray,
    mirrored: np.ndarray,
    padding: int,
    mode: str = "zeros",
) -> Tensor:
    """Picks images out of a whole set, pads, crops and mirrors them, in one read (section 4.2).

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
    # One copy to the device; what follows from these numbers is computed there.
    index, top, left, flipped = to_device(np.stack([chosen, *offsets, mirrored]), device)
    rows = top[:, None] + torch.arange(height, device=device) - padding
    columns = left[:, None] + torch.arange(width, device=device) - padding
    columns = torch.where(flipped[:, None] != 0, columns.flip(1), columns)
    picked = images[
        index[:, None, None],
        _inside(rows, height)[:, :, None],
        _inside(columns, width)[:, None, :],
    ]
    if padding and mode == "zeros":
        kept_rows = (rows >= 0) & (rows < height)
        kept_columns = (columns >= 0) & (columns < width)
        picked *= (kept_rows[:, :, None] & kept_columns[:, None, :]).unsqueeze(3)
    return picked.permute(0, 3, 1, 2)


def _inside(positions: Tensor, length: int) -> Tensor:
    """Positions beyond the border, mirrored back at it (the border pixel itself not repeated)."""
    return (length - 1) - ((length - 1) - positions.abs()).abs()


def mirror(images: Tensor, mirrored: np.ndarray) -> Tensor:
    """Mirrors the images that bool [N] names, left to right."""
    if not mirrored.any():
        return images
    return torch.where(
        to_device(mirrored, images.device)[:, None, None, None], images.flip(3), images
    )


def normalize(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 or float [N, 3, H, W] of 0 to 255 to float32: `Preprocess.normalize`, on the device."""
    std = constant(tuple(preprocess.std), images.device).view(1, 3, 1, 1)
    mean = constant(tuple(preprocess.mean), images.device).view(1, 3, 1, 1)
    return images.float().mul(1 / (255 * std)).sub_(mean / std)


def shrink(images: Tensor, side: int) -> Tensor:
    """Antialiased bilinear resize of float images to [N, 3, side, side]."""
    if images.shape[2:] == (side, side):
        return images
    return torch.nn.functional.interpolate(
        images, (side, side), mode="bilinear", antialias=True
    ).contiguous(memory_format=torch.channels_last)


def shift_colours(images: Tensor, strengths: np.ndarray) -> Tensor:
    """Adds multiples of the principal colours (AlexNet's augmentation; section 3.4).

    Args:
        images: uint8 or float [N, 3, H, W] of 0 to 255.
        strengths: float [N, 3], drawn from a normal distribution.

    Returns:
        float32, not clipped, as published.
    """
    shift = 255 * (strengths * np.array(COLOUR_VALUES)) @ np.array(COLOUR_VECTORS).T
    return images.float() + to_device(shift.astype(np.float32), images.device)[:, :, None, None]


def erase(images: Tensor, boxes: np.ndarray) -> Tensor:
    """Sets a rectangle of each normalized image to zero, its mean (Zhong et al., 2017).

    Args:
        images: float [N, 3, H, W]; changed in place.
        boxes: int [N, 4]: top, left, height, width; a height of 0 leaves the image whole.
    """
    return images.mul_(1 - _covered(images, boxes))


def erasing_boxes(rng: np.random.Generator, count: int, side: int, share: float) -> np.ndarray:
    """Rectangles of 2 to 33 % of the image, sides in a ratio up to 3.3; int [count, 4]."""
    area = rng.uniform(0.02, 0.33, count) * side**2
    ratio = np.exp(rng.uniform(np.log(0.3), np.log(3.3), count))
    sizes = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)]).round().astype(int)
    sizes = sizes.clip(1, side)
    corners = np.floor(rng.random((2, count)) * (side - sizes + 1)).astype(int)
    sizes[:, rng.random(count) >= share] = 0
    return np.stack([*corners, *sizes], axis=1)


def mixup(images: Tensor, share: float) -> Tensor:
    """Each image at `share`, its neighbour in the batch at the rest (Zhang et al., 2018)."""
    return images * share + images.roll(1, 0) * (1 - share)


def cutmix(images: Tensor, box: np.ndarray) -> tuple[Tensor, float]:
    """A rectangle of each image replaced by its neighbour's (Yun et al., 2019).

    Args:
        images: float [N, 3, H, W].
        box: int [4], the same for the whole batch.

    Returns:
        The images, and the share of each that is still its own.
    """
    covered = _covered(images, box[None])
    mixed = torch.where(covered.bool(), images.roll(1, 0), images)
    return mixed, 1 - float(box[2] * box[3]) / (images.shape[2] * images.shape[3])


def cutmix_box(rng: np.random.Generator, side: int, share: float) -> np.ndarray:
    """The rectangle for keeping `share`: centred anywhere, cut off at the border; int [4]."""
    half = side * np.sqrt(1 - share) / 2
    centre = rng.uniform(0, side, 2)
    low = np.clip(np.round(centre - half), 0, side).astype(int)
    high = np.clip(np.round(centre + half), 0, side).astype(int)
    return np.concatenate([low, high - low])


def _covered(images: Tensor, boxes: np.ndarray) -> Tensor:
    """1 inside each image's box, 0 outside: [N, 1, H, W], or one mask for all."""
    top, left, height, width = to_device(boxes.T, images.device)[:, :, None].unbind()
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows, columns = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
    return (rows[:, None, :, None] & columns[:, None, None, :]).to(images.dtype)
