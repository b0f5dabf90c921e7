"""Compare the detections of two runs of a detector."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from rtresnet.core.sidecar import DetectionParityRecord

NEAR = 1.0  # pixels between the corners of two boxes that can be the same
MARGIN = 1e-3  # of scores, by which rounding may move a detection across the least one


@dataclass(frozen=True, kw_only=True)
class DetectionParity:
    """Differences between two sets of detections.

    Attributes:
        n: Images.
        detections: Detections of the reference.
        unmatched: Detections of either without one of the same class within a pixel in the other.
        score: Largest difference of scores of the others.
        box: Largest difference of coordinates of the others, in pixels.
        unsettled: Boxes for which non-maximum suppression may not be finished, of both.
    """

    n: int = 0
    detections: int = 0
    unmatched: int = 0
    score: float = 0.0
    box: float = 0.0
    unsettled: int = 0

    def __add__(self, other: DetectionParity) -> DetectionParity:
        """Add the results on other images."""
        return DetectionParity(
            n=self.n + other.n,
            detections=self.detections + other.detections,
            unmatched=self.unmatched + other.unmatched,
            score=max(self.score, other.score),
            box=max(self.box, other.box),
            unsettled=self.unsettled + other.unsettled,
        )

    def record(self) -> DetectionParityRecord:
        """Return the record for a sidecar."""
        return cast(DetectionParityRecord, dataclasses.asdict(self))


def compare(
    reference: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], least: float = 0.0
) -> DetectionParity:
    """Compare the outputs of two runs on one image.

    Args:
        reference: boxes [1, D, 4], scores [1, D], labels [1, D], unsettled [1].
        outputs: The same of the other run.
        least: Detections whose score is not above this by `MARGIN` need no match.
    """
    rows = [np.flatnonzero(entry["scores"][0] > 0) for entry in (reference, outputs)]
    unmatched, score, box = 0, 0.0, 0.0
    free = list(rows[1])
    for row in rows[0]:
        best, distance = None, NEAR
        for other in free:
            if outputs["labels"][0, other] != reference["labels"][0, row]:
                continue
            off = float(np.abs(outputs["boxes"][0, other] - reference["boxes"][0, row]).max())
            if off < distance:
                best, distance = other, off
        if best is None:
            unmatched += bool(reference["scores"][0, row] > least + MARGIN)
            continue
        free.remove(best)
        box = max(box, distance)
        difference = float(outputs["scores"][0, best]) - float(reference["scores"][0, row])
        score = max(score, abs(difference))
    return DetectionParity(
        n=1,
        detections=len(rows[0]),
        unmatched=unmatched + int((outputs["scores"][0, free] > least + MARGIN).sum()),
        score=score,
        box=box,
        unsettled=int(reference["unsettled"].sum() + outputs["unsettled"].sum()),
    )
