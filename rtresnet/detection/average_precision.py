"""Average precision: VOC's (11 points of 2007, and the area of later years) and COCO's.

VOC (Everingham et al. 2010): a detection is matched with the object that it overlaps most; a second
detection of the same object is wrong. COCO: a detection is matched with the unmatched object that
it overlaps most, at ten overlaps from 0.5 to 0.95, for objects of all sizes and of three ranges,
with at most 100 detections per image. Difficult objects and crowds are not counted, and detections
of them are not wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from rtresnet.core.detector_preprocess import Detections
from rtresnet.core.sidecar import AveragePrecisionRecord

if TYPE_CHECKING:
    from rtresnet.detection.data import Targets

MATCH = 0.5  # overlap from which VOC matches a detection with an object
THRESHOLDS = np.linspace(MATCH, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
MOST = 100  # detections of an image


@dataclass(frozen=True, kw_only=True)
class DetectionAccuracy:
    """Average precision in %, the mean over classes; None without objects.

    Attributes:
        n: Number of images.
        objects: Number of objects that count.
        voc07: VOC 2007's mean over 11 recalls, at overlap 0.5.
        voc: The area under the curve, at overlap 0.5.
        ap: COCO's mean over ten overlaps.
        ap50: COCO's at overlap 0.5.
        ap75: COCO's at overlap 0.75.
        small: COCO's `ap` of objects below 32 x 32 pixels.
        medium: COCO's `ap` of larger objects below 96 x 96 pixels.
        large: COCO's `ap` of the other objects.
        classes: `ap50` of each class.
    """

    n: int
    objects: int
    voc07: float | None
    voc: float | None
    ap: float | None
    ap50: float | None
    ap75: float | None
    small: float | None
    medium: float | None
    large: float | None
    classes: dict[str, float | None]

    def record(self, data: str, split: str, data_sha256: str) -> AveragePrecisionRecord:
        """Return the record for a sidecar, with the images on which it was measured."""
        where = {"data": data, "split": split, "data_sha256": data_sha256}
        return cast(AveragePrecisionRecord, dataclasses.asdict(self) | where)

    @classmethod
    def of(cls, record: AveragePrecisionRecord) -> DetectionAccuracy:
        """Read the record of a sidecar."""
        return cls(**{field.name: record[field.name] for field in dataclasses.fields(cls)})  # type: ignore[literal-required]


def evaluate(
    targets: Sequence[Targets], detections: Sequence[Detections], classes: Sequence[str]
) -> DetectionAccuracy:
    """Compare detections with the objects of the same images.

    Args:
        targets: Objects of each image.
        detections: Detections of each image; labels count as `classes` do.
        classes: Class names.
    """
    tables = {
        name: coco(targets, detections, len(classes), limits) for name, limits in AREAS.items()
    }
    full = tables["all"]
    eleven, area = (
        _mean(np.array(values))
        for values in zip(*(_voc(targets, detections, k) for k in range(len(classes))), strict=True)
    )
    return DetectionAccuracy(
        n=len(targets),
        objects=int(sum((~entry.ignored).sum() for entry in targets)),
        voc07=eleven,
        voc=area,
        ap=_mean(full),
        ap50=_mean(full[:, 0]),
        ap75=_mean(full[:, 5]),
        small=_mean(tables["small"]),
        medium=_mean(tables["medium"]),
        large=_mean(tables["large"]),
        classes={name: _mean(full[k, 0]) for k, name in enumerate(classes)},
    )


def _mean(values: np.ndarray) -> float | None:
    """Return the mean in %, ignoring NaN."""
    values = np.atleast_1d(values)
    values = values[~np.isnan(values)]
    return 100 * float(values.mean()) if values.size else None


def overlaps(first: np.ndarray, second: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Return the IoU [D, G] of boxes; for a crowd, the share of the detection inside it."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    one, other = ((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second))
    union = one[:, None] + np.where(crowd, 0, other[None] - shared)
    return np.asarray(shared / np.maximum(union, 1e-12))


def coco(
    targets: Sequence[Targets],
    detections: Sequence[Detections],
    classes: int,
    limits: tuple[float, float] = AREAS["all"],
) -> np.ndarray:
    """Return COCO's average precision [classes, 10 overlaps]; NaN for a class without objects."""
    table = np.full((classes, len(THRESHOLDS)), np.nan)
    for k in range(classes):
        parts = [_match(t, d, k, limits) for t, d in zip(targets, detections, strict=True)]
        objects = sum(count for *_, count in parts)
        if not objects:
            continue
        scores = np.concatenate([part[0] for part in parts])
        order = np.argsort(-scores, kind="stable")
        hit = np.concatenate([part[1] for part in parts], 1)[:, order]
        counted = np.concatenate([part[2] for part in parts], 1)[:, order]
        right, wrong = np.cumsum(hit & counted, 1), np.cumsum(~hit & counted, 1)
        for t in range(len(THRESHOLDS)):
            recall = right[t] / objects
            precision = right[t] / np.maximum(right[t] + wrong[t], np.spacing(1))
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            places = np.searchsorted(recall, RECALLS, side="left")
            inside = places < len(precision)
            table[k, t] = np.where(inside, np.append(precision, 0)[places * inside], 0).mean()
    return table


def _match(
    targets: Targets, detections: Detections, label: int, limits: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return an image and class's scores [D], hit and counted [10, D], and number of objects."""
    own = targets.labels == label
    boxes, crowd, areas = targets.boxes[own], targets.crowd[own], targets.areas[own]
    ignored = targets.ignored[own] | crowd | (areas < limits[0]) | (areas > limits[1])
    order = np.argsort(ignored, kind="stable")
    boxes, crowd, ignored = boxes[order], crowd[order], ignored[order]
    chosen = np.flatnonzero(detections.labels == label)
    chosen = chosen[np.argsort(-detections.scores[chosen], kind="stable")][:MOST]
    shared = overlaps(detections.boxes[chosen], boxes, crowd)
    least = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    free = np.ones((len(least), len(boxes)), bool)
    hit = np.zeros((len(least), len(chosen)), bool)
    counted = np.ones_like(hit)
    rows = np.arange(len(least))
    for d in range(len(chosen) if len(boxes) else 0):
        usable = (free | crowd) & (shared[d] >= least)
        real = usable & ~ignored
        usable = np.where(real.any(1, keepdims=True), real, usable)
        # The last of equals, as in COCO's own loop.
        best = usable.shape[1] - 1 - np.argmax(np.where(usable, shared[d], -1)[:, ::-1], 1)
        hit[:, d] = usable[rows, best]
        counted[:, d] = ~(hit[:, d] & ignored[best])
        free[rows[hit[:, d]], best[hit[:, d]]] = False
    sides = (detections.boxes[chosen, 2:] - detections.boxes[chosen, :2]).astype(np.float64).prod(1)
    outside = (sides < limits[0]) | (sides > limits[1])
    counted &= hit | ~outside
    return detections.scores[chosen], hit, counted, int((~ignored).sum())


def errors(
    targets: Targets, detections: Detections, least: float = 0.5
) -> tuple[list[int], list[int]]:
    """Return the errors in one image at IoU 0.5: missed objects and wrong detections.

    Args:
        targets: Its objects.
        detections: Its detections.
        least: Score from which a detection counts.

    Returns:
        Indices of objects that no detection has, and of detections that have no object.
    """
    shared = overlaps(detections.boxes, targets.boxes, targets.crowd)
    free = np.ones(len(targets.labels), bool)
    wrong = []
    for row in np.flatnonzero(detections.scores >= least):
        same = (targets.labels == detections.labels[row]) & (shared[row] >= MATCH)
        usable = np.flatnonzero(same & (free | targets.ignored))
        if len(usable):
            free[usable[int(shared[row][usable].argmax())]] = False
        else:
            wrong.append(int(row))
    return np.flatnonzero(free & ~targets.ignored).tolist(), wrong


def envelope(recall: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Return the largest precision at each of COCO's 101 recalls or above; 0 if not reached."""
    return np.array([precision[recall >= point].max(initial=0) for point in RECALLS])


def voc_curve(
    targets: Sequence[Targets], detections: Sequence[Detections], label: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return recall and precision at IoU 0.5 after each detection of a class, and its objects.

    The detections are in the order of their scores; the last value is the number of objects.
    """
    scores: list[np.ndarray] = []
    verdicts: list[np.ndarray] = []  # 1 right, 0 wrong, -1 of a difficult object
    objects = 0
    for entry, detected in zip(targets, detections, strict=True):
        own = entry.labels == label
        ignored = entry.ignored[own]
        objects += int((~ignored).sum())
        chosen = np.flatnonzero(detected.labels == label)
        chosen = chosen[np.argsort(-detected.scores[chosen], kind="stable")]
        shared = overlaps(detected.boxes[chosen], entry.boxes[own], np.zeros(own.sum(), bool))
        matched = np.zeros(own.sum(), bool)
        verdict = np.zeros(len(chosen), int)
        for d in range(len(chosen) if own.any() else 0):
            best = int(shared[d].argmax())
            if shared[d, best] >= MATCH:
                verdict[d] = -1 if ignored[best] else not matched[best]
                matched[best] = True
        scores.append(detected.scores[chosen])
        verdicts.append(verdict)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    verdict = np.concatenate(verdicts)[order]
    right, wrong = np.cumsum(verdict == 1), np.cumsum(verdict == 0)
    return right / max(objects, 1), right / np.maximum(right + wrong, 1), objects


def _voc(
    targets: Sequence[Targets], detections: Sequence[Detections], label: int
) -> tuple[float, float]:
    """Average precision of a class by the 11 points of VOC 2007, and by area; NaN if no objects."""
    recall, precision, objects = voc_curve(targets, detections, label)
    if not objects:
        return float("nan"), float("nan")
    points = [precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 11)]
    envelope = np.maximum.accumulate(np.append(precision, 0)[::-1])[::-1]
    return float(np.mean(points)), float((np.diff(recall, prepend=0) * envelope[:-1]).sum())
