"""Which detections of two detectors in one image are the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rtresnet.core.detector_preprocess import Detections
from rtresnet.detection.average_precision import overlaps

OVERLAP = 0.5  # IoU from which two detections of one class can be the same


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Matches between the detections of two detectors in one image.

    Attributes:
        both: Rows of the first and of the second detector's detections that are the same.
        first: Rows of the first one's detections that the second lacks.
        second: Rows of the second one's detections that the first lacks.
        score: Largest difference of the scores of `both`.
        box: Largest difference of the coordinates of `both`, in pixels.
    """

    both: tuple[tuple[int, int], ...]
    first: tuple[int, ...]
    second: tuple[int, ...]
    score: float
    box: float

    @property
    def different(self) -> int:
        """Return the number of detections that only one of the two has."""
        return len(self.first) + len(self.second)


def agree(
    first: Detections, second: Detections, least: float = 0.5, margin: float = 0.0
) -> Agreement:
    """Pair the detections of one image: the same class, and an IoU of `OVERLAP` or more.

    The highest scores choose first, each the free detection that it overlaps most.

    Args:
        first: Detections of one detector, sorted by score.
        second: Detections of the other one, sorted by score.
        least: Detections with lower scores need no partner, but may be one within `margin`.
        margin: How far a score may be from `least` and still count as on its other side.
    """
    shown = np.flatnonzero(first.scores >= least - margin)
    others = np.flatnonzero(second.scores >= least - margin)
    shared = overlaps(
        first.boxes[shown], second.boxes[others], np.zeros(len(others), bool)
    )  # fmt: skip
    shared[first.labels[shown][:, None] != second.labels[others][None]] = 0
    both: list[tuple[int, int]] = []
    for row in range(len(shown)):
        if len(others) and shared[row].max() >= OVERLAP:
            column = int(shared[row].argmax())
            both.append((int(shown[row]), int(others[column])))
            shared[:, column] = 0
    one, other = (np.array(rows, int) for rows in (zip(*both, strict=True) if both else ((), ())))
    return Agreement(
        both=tuple(both),
        first=_without_partner(first, one, least + margin),
        second=_without_partner(second, other, least + margin),
        score=float(np.abs(first.scores[one] - second.scores[other]).max(initial=0)),
        box=float(np.abs(first.boxes[one] - second.boxes[other]).max(initial=0)),
    )


def _without_partner(detections: Detections, paired: np.ndarray, least: float) -> tuple[int, ...]:
    rows = np.flatnonzero(detections.scores >= least)
    return tuple(int(row) for row in np.setdiff1d(rows, paired))
