"""TrivialAugment (Mueller and Hutter, 2021): one random operation of random strength per image.

Implements the "wide" search space of the paper's table 6. Images with the same operation are
computed together, on the device. Values are float, 0 to 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rtresnet.data.augment import constant, to_device

LEVELS = 31
GREY = (0.299, 0.587, 0.114)
SMOOTH = tuple(weight / 13 for weight in (1, 1, 1, 1, 5, 1, 1, 1, 1))  # Pillow's SMOOTH, 3 by 3


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw an operation, a strength in [0, 1] and a sign for each image: float [count, 3]."""
    operation = rng.integers(0, len(OPERATIONS), count)
    strength = rng.integers(0, LEVELS, count) / (LEVELS - 1)
    return np.stack([operation, strength, rng.choice((-1.0, 1.0), count)], axis=1)


def trivial_augment(images: Tensor, drawn: np.ndarray) -> Tensor:
    """Apply the operations that `draw` returned.

    Args:
        images: uint8 [N, 3, H, W].
        drawn: float [N, 3].

    Returns:
        float32 [N, 3, H, W] of 0 to 255.
    """
    out = images.float()
    # Sorted by operation, so that indices and strengths take one copy to the device each.
    order = np.argsort(drawn[:, 0], kind="stable")
    counts = np.bincount(drawn[:, 0].astype(int), minlength=len(OPERATIONS)).tolist()
    where = torch.split_with_sizes(to_device(order, images.device), counts)
    values = to_device(drawn[order, 1:].astype(np.float32), images.device)
    for operation, index, value in zip(
        OPERATIONS, where, torch.split_with_sizes(values, counts), strict=True
    ):
        if operation is None or not len(index):
            continue
        strength, sign = value.view(-1, 2, 1, 1, 1).unbind(1)
        out[index] = operation(out[index], strength, sign).clamp_(0, 255)
    return out


Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images [n, 3, H, W], strengths and signs [n, 1, 1, 1] to images."""


def _affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Sample at matrix @ (x, y, 1), in pixels from the centre; the outside is black."""
    height, width = images.shape[2:]
    # affine_grid uses half images as its unit, not pixels.
    half = constant((width / 2, height / 2), images.device)
    theta = matrix.clone()
    theta[:, :, :2] = matrix[:, :, :2] * half / half[:, None]
    theta[:, :, 2] = matrix[:, :, 2] / half
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


def _matrix(like: Tensor, **entries: Tensor) -> Tensor:
    matrix = torch.zeros(len(like), 2, 3, device=like.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1
    for place, value in entries.items():
        matrix[:, int(place[1]), int(place[2])] = value.flatten()
    return matrix


def _shear_x(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _affine(images, _matrix(images, m01=0.99 * strength * sign))


def _shear_y(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _affine(images, _matrix(images, m10=0.99 * strength * sign))


def _translate_x(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _affine(images, _matrix(images, m02=_largest_shift(images) * strength * sign))


def _translate_y(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _affine(images, _matrix(images, m12=_largest_shift(images) * strength * sign))


def _largest_shift(images: Tensor) -> float:
    """Return the largest translation: 32 pixels, at most a third of the width of small images."""
    return min(32.0, images.shape[3] / 3)


def _rotate(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    angle = math.radians(135) * strength * sign
    cosine, sine = angle.cos(), angle.sin()
    return _affine(images, _matrix(images, m00=cosine, m01=sine, m10=-sine, m11=cosine))


def _grey(images: Tensor) -> Tensor:
    weights = constant(GREY, images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _blend(base: Tensor, images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return base + (images - base) * (1 + 0.99 * strength * sign)


def _brightness(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, strength, sign)


def _colour(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _blend(_grey(images), images, strength, sign)


def _contrast(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return _blend(_grey(images).mean((1, 2, 3), keepdim=True), images, strength, sign)


def _sharpness(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    kernel = constant(SMOOTH, images.device).view(1, 1, 3, 3).expand(3, 1, 3, 3)
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = torch.nn.functional.conv2d(images, kernel, groups=3)
    return _blend(smooth, images, strength, sign)


def _posterize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    step = 2 ** (6 * strength).round()  # 8 bits left, down to 2
    return (images / step).floor() * step


def _solarize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return torch.where(images >= 255 * (1 - strength), 255 - images, images)


def _autocontrast(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = (images - low) * 255 / (high - low).clamp(min=1)
    return torch.where(high > low, stretched, images)


def _equalize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Equalize each channel's histogram, as Pillow's ImageOps.equalize does."""
    count, channels, height, width = images.shape
    levels = images.round().long().clamp(0, 255).reshape(count * channels, -1)
    histogram = torch.zeros(count * channels, 256, device=images.device)
    histogram.scatter_add_(1, levels, torch.ones_like(levels, dtype=torch.float32))
    last = levels.amax(1, keepdim=True)
    step = ((height * width - histogram.gather(1, last)) / 255).floor()
    before = histogram.cumsum(1) - histogram
    table = ((before + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255)
    equal = table.gather(1, levels).view_as(images)
    return torch.where(step.view(count, channels, 1, 1) > 0, equal, images)


OPERATIONS: tuple[Operation | None, ...] = (
    None,  # the identity
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    _rotate,
    _brightness,
    _colour,
    _contrast,
    _sharpness,
    _posterize,
    _solarize,
    _autocontrast,
    _equalize,
)
