"""Boxes: overlap, coding, anchors, non-maximum suppression and RoIAlign, in plain torch operations.

A box is (x1, y1, x2, y2) in pixels with continuous coordinates: its width is x2 - x1. Everything
here is built from operations that TensorRT-RTX also has, because RoiAlign, NonMaxSuppression and
NonZero are rejected there. `export.py` writes the same arithmetic as ONNX nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_LOG = math.log(1000 / 16)  # of a decoded size over its anchor's: exp must not overflow
REGION_STD = (0.1, 0.1, 0.2, 0.2)  # of the head's targets, Fast R-CNN section 2.3 ("normalized")


def area(boxes: Tensor) -> Tensor:
    """Return the areas [...] of boxes [..., 4]; 0 if a box is inverted."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def intersection(first: Tensor, second: Tensor) -> Tensor:
    """Return the areas [..., N, M] that boxes [..., N, 4] and [..., M, 4] share."""
    low = torch.maximum(first[..., :, None, :2], second[..., None, :, :2])
    high = torch.minimum(first[..., :, None, 2:], second[..., None, :, 2:])
    sides = (high - low).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union [..., N, M] of boxes [..., N, 4] and [..., M, 4].

    An empty box has an IoU of 0.
    """
    shared = intersection(first, second)
    union = area(first)[..., :, None] + area(second)[..., None, :] - shared
    return shared / union.clamp(min=1e-9)


def encode(boxes: Tensor, anchors: Tensor, std: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """Return the offsets [N, 4] that `decode` turns into `boxes`: R-CNN's parametrization.

    Args:
        boxes: Targets [N, 4] with positive sides.
        anchors: Where they start from [N, 4].
        std: The offsets are divided by it.
    """
    sizes, base = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    shift = ((boxes[:, :2] + sizes / 2) - (anchors[:, :2] + base / 2)) / base
    return torch.cat([shift, torch.log(sizes / base)], 1) / boxes.new_tensor(std)


def decode(offsets: Tensor, anchors: Tensor, std: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """Return boxes [..., 4] of offsets [..., 4] from anchors of a shape that broadcasts."""
    offsets = offsets * offsets.new_tensor(std)
    base = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + base / 2) + offsets[..., :2] * base
    half = torch.exp(offsets[..., 2:].clamp(max=LARGEST_LOG)) * base / 2
    return torch.cat([centre - half, centre + half], -1)


def clip(boxes: Tensor, extent: Tensor) -> Tensor:
    """Return boxes [..., 4] cut to an image of `extent` (height, width) [2]."""
    limits = extent[[1, 0, 1, 0]]
    return torch.minimum(boxes.clamp(min=0), limits)


def anchors(
    height: int, width: int, stride: int, sizes: Sequence[float], offset: float = 0.5
) -> Tensor:
    """Return the anchors [height * width * 3 * sizes, 4] of a map, position by position.

    Each position has every size with the ratios 1:2, 1:1 and 2:1 (height to width) and the same
    area, by default centred on the middle of the position's stride x stride pixels.

    Args:
        height: Rows of the feature map.
        width: Its columns.
        stride: Pixels between two positions.
        sizes: Square root of the areas, in pixels.
        offset: Centre of the first anchors, in strides.
    """
    shapes = [(s / math.sqrt(r), s * math.sqrt(r)) for s in sizes for r in (0.5, 1.0, 2.0)]
    base = torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in shapes])
    y = (torch.arange(height) + offset) * stride
    x = (torch.arange(width) + offset) * stride
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    centres = torch.stack([grid_x, grid_y, grid_x, grid_y], -1).reshape(-1, 1, 4)
    return (centres + base).reshape(-1, 4)


def suppression(boxes: Tensor, threshold: float) -> Tensor:
    """Return which boxes suppress which: float [..., N, N], strictly upper triangular.

    Args:
        boxes: Sorted by score, the highest first [..., N, 4].
        threshold: Boxes suppress later ones whose IoU with them is above it.
    """
    overlaps = iou(boxes, boxes) > threshold
    return torch.triu(overlaps, diagonal=1).to(boxes.dtype)


def nms(boxes: Tensor, threshold: float, rounds: int | None = None) -> tuple[Tensor, Tensor]:
    """Apply greedy non-maximum suppression, computed as a fixed point.

    Repeats `keep = (keep @ suppression == 0)` from "keep all". Box 0 is final after one round,
    and every other box one round after all boxes that can suppress it. So the fixed point is
    unique and equals the result of the greedy algorithm. It takes as many rounds as the longest
    chain of boxes that suppress one another, usually a handful.

    Args:
        boxes: Sorted by score, the highest first [..., N, 4].
        threshold: See `suppression`.
        rounds: Largest number of repetitions; None repeats until nothing changes.

    Returns:
        Which boxes stay, float 0 or 1 [..., N], and how many boxes the last round changed [...].
        0 proves that the result is that of the greedy algorithm.
    """
    matrix = suppression(boxes, threshold)
    keep = torch.ones_like(boxes[..., 0])
    limit = boxes.shape[-2] + 1 if rounds is None else rounds
    changed = torch.zeros_like(keep[..., 0])
    for _ in range(limit):
        before = keep
        keep = (torch.matmul(keep[..., None, :], matrix)[..., 0, :] == 0).to(boxes.dtype)
        changed = (keep - before).abs().sum(-1)
        if rounds is None and not bool(changed.any()):
            break
    return keep, changed


def sampling(low: Tensor, high: Tensor, length: int, bins: int, samples: int) -> Tensor:
    """Return the weights [R, bins, length] with which RoIAlign reads one axis of a map.

    Bilinear sampling is separable, and reading a position is a hat function around it: each bin's
    row is the mean of its samples' hats. Positions up to one pixel outside are read at the border,
    those further out as zero, as in the RoiAlign operator of ONNX.

    Args:
        low: Where each region begins, in units of the map [R]; 0 is the middle of the first pixel.
        high: Where it ends [R].
        length: Pixels of the map along this axis.
        bins: Pixels of the result.
        samples: Samples for each bin.
    """
    steps = (torch.arange(bins * samples, dtype=low.dtype, device=low.device) + 0.5) / (
        bins * samples
    )
    at = low[:, None] + (high - low)[:, None] * steps
    inside = ((at >= -1) & (at <= length)).to(low.dtype)
    at = at.clamp(0, length - 1)
    pixels = torch.arange(length, dtype=low.dtype, device=low.device)
    hats = (1 - (at[:, :, None] - pixels).abs()).clamp(min=0) * inside[:, :, None]
    return hats.reshape(len(low), bins, samples, length).mean(2)


def roi_align(features: Tensor, regions: Tensor, scale: float, bins: int, samples: int) -> Tensor:
    """Compute RoIAlign (He et al. 2017) of one image as two matrix products.

    Replaces the paper's RoI pooling, which rounds regions to the pixels of the map.

    Args:
        features: The map [C, H, W].
        regions: Boxes in pixels of the image [R, 4].
        scale: Pixels of the map for one of the image.
        bins: Side of the result.
        samples: Samples along each axis of a bin.

    Returns:
        [R, C, bins, bins].
    """
    channels, height, width = features.shape
    ends = regions * scale - 0.5
    rows = sampling(ends[:, 1], ends[:, 3], height, bins, samples)
    columns = sampling(ends[:, 0], ends[:, 2], width, bins, samples)
    # The longer axis first: the tensor between the two products is smallest then. Its shorter axis
    # comes last, so that every transposition moves one axis only.
    if width >= height:
        first, second, order = columns, rows, (2, 0, 1)
    else:
        first, second, order = rows, columns, (1, 0, 2)
    longer, shorter = max(width, height), min(width, height)
    flat = features.permute(order).reshape(longer, channels * shorter)
    lines = torch.matmul(first.reshape(-1, longer), flat)
    lines = lines.reshape(len(regions), bins, channels, shorter)
    crops = torch.matmul(lines, second.transpose(1, 2)[:, None])
    return crops.permute(0, 2, 3, 1) if width >= height else crops.permute(0, 2, 1, 3)
