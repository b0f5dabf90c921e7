"""Targets of anchors and regions, their sampling, and the four losses.

Section 3.1.2 and 3.1.3 of the Faster R-CNN paper, section 2.3 of Fast R-CNN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rtresnet.detection import boxes
from rtresnet.detection.recipe import DetectionRecipe

RPN_BETA = 1 / 9  # where the smooth L1 loss becomes linear; the head's is 1


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Objects of one image on the canvas.

    Attributes:
        boxes: float32 [N, 4].
        labels: int64 [N].
        ignored: float32 [M, 4]: difficult objects and crowds. Anchors and regions that lie in one
            are neither objects nor background.
        extent: Height and width of the image on the canvas, float32 [2].
    """

    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    extent: Tensor


def _inside(rows: Tensor, areas: Tensor) -> Tensor:
    """Return whether more than half of each box [N, 4] lies in one of `areas` [M, 4]: bool [N]."""
    if not len(areas):
        return torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    shares = boxes.intersection(rows, areas) / boxes.area(rows)[:, None].clamp(min=1e-9)
    return shares.amax(1) > 0.5


def _sample(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw at most `count` indices at which bool [N] is true."""
    indices = torch.nonzero(candidates)[:, 0]
    if len(indices) <= count:
        return indices
    order = torch.randperm(len(indices), generator=generator).to(indices.device)
    return indices[order[:count]]


def sample_anchors(
    anchors: Tensor, truth: Truth, recipe: DetectionRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the anchors of one image that the region proposal network learns from.

    Positive are anchors with an IoU of `rpn_high` and the best ones of each object; negative
    those below `rpn_low` with all objects. Anchors that cross the image's border are left out.

    Returns:
        Indices of positive anchors [P], of negative ones [Q], and offsets of the former [P, 4].
    """
    height, width = truth.extent.tolist()
    usable = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] <= width) & (anchors[:, 3] <= height)
    if not usable.any():
        usable = torch.ones_like(usable)
    if len(truth.boxes):
        overlaps = boxes.iou(anchors, truth.boxes) * usable[:, None]
        best, match = overlaps.max(1)
        top = overlaps.amax(0)
        positive = (best >= recipe.rpn_high) | ((overlaps == top) & (top > 0)).any(1)
        # An anchor that is the best of an object learns that object, even if it overlaps another
        # one more.
        own = torch.where((overlaps == top) & (top > 0), overlaps, -1.0)
        match = torch.where(own.amax(1) > 0, own.argmax(1), match)
    else:
        best = anchors.new_zeros(len(anchors))
        match = torch.zeros(len(anchors), dtype=torch.long, device=anchors.device)
        positive = torch.zeros_like(usable)
    positive &= usable
    negative = usable & ~positive & (best < recipe.rpn_low) & ~_inside(anchors, truth.ignored)
    chosen = _sample(positive, int(recipe.rpn_batch * recipe.rpn_positives), generator)
    others = _sample(negative, recipe.rpn_batch - len(chosen), generator)
    offsets = boxes.encode(truth.boxes[match[chosen]], anchors[chosen])
    return chosen, others, offsets


def sample_regions(
    regions: Tensor, truth: Truth, recipe: DetectionRecipe, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the regions of one image that the head learns from.

    The objects themselves are candidates as well, so that there are positives from the first step.

    Returns:
        Regions [R, 4]; their classes, 0 for background and label + 1 otherwise [R]; offsets [P, 4]
        of the P positive ones, which come first.
    """
    regions = torch.cat([regions[boxes.area(regions) > 0], truth.boxes])
    if len(truth.boxes):
        best, match = boxes.iou(regions, truth.boxes).max(1)
    else:
        best = regions.new_zeros(len(regions))
        match = torch.zeros(len(regions), dtype=torch.long, device=regions.device)
    positive = best >= recipe.head_iou
    negative = ~positive & ~_inside(regions, truth.ignored)
    chosen = _sample(positive, int(recipe.head_batch * recipe.head_positives), generator)
    others = _sample(negative, recipe.head_batch - len(chosen), generator)
    classes = torch.cat([truth.labels[match[chosen]] + 1, torch.zeros_like(others)])
    offsets = boxes.encode(truth.boxes[match[chosen]], regions[chosen], boxes.REGION_STD)
    return regions[torch.cat([chosen, others])], classes, offsets


def rpn_losses(
    scores: Tensor, offsets: Tensor, positive: Tensor, negative: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return classification and regression loss of one image's anchors, means over the sample.

    Args:
        scores: Logits of all anchors [A].
        offsets: Predicted offsets of all anchors [A, 4].
        positive: int64 indices of the sampled anchors on objects [P].
        negative: int64 indices of the sampled anchors on background [Q].
        targets: Offsets that the positive anchors should have [P, 4].
    """
    chosen = torch.cat([positive, negative])
    labels = torch.zeros(len(chosen), device=scores.device)
    labels[: len(positive)] = 1
    count = max(len(chosen), 1)
    classes = functional.binary_cross_entropy_with_logits(scores[chosen], labels, reduction="sum")
    regression = functional.smooth_l1_loss(
        offsets[positive], targets, reduction="sum", beta=RPN_BETA
    )
    return classes / count, regression / count


def head_losses(
    logits: Tensor, offsets: Tensor, classes: Tensor, targets: Tensor, positives: Tensor
) -> tuple[Tensor, Tensor]:
    """Return classification and regression loss of regions, means over all of them.

    Args:
        logits: Logits of K classes and background (0) [R, K + 1].
        offsets: Predicted offsets for each class [R, 4K].
        classes: int64 classes, 0 for background [R].
        targets: Offsets that the positive regions should have [P, 4].
        positives: int64 indices of the positive regions [P].
    """
    count = max(len(classes), 1)
    classification = functional.cross_entropy(logits, classes, reduction="sum")
    own = offsets.reshape(len(offsets), -1, 4)[positives, classes[positives] - 1]
    regression = functional.smooth_l1_loss(own, targets, reduction="sum", beta=1.0)
    return classification / count, regression / count
