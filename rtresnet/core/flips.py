"""Images that two nets classify differently, as FP32 and INT8 do. Pure NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MOST = 200  # images that a result lists


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The most probable class of each image.

    Attributes:
        indices: Indices of the images in the data set, int64 [N].
        classes: Class numbers, int64 [N]; -1 if the net's output is not a number.
        probabilities: Probabilities of these classes, [N].
    """

    indices: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Flip:
    """An image whose class changes.

    Attributes:
        index: Index in the data set.
        place: Path of the file, or data set and index.
        label: Name of its class; None without labels.
        reference: Class predicted by the first net.
        reference_probability: Probability of that class, in [0, 1].
        candidate: Class predicted by the second net.
        candidate_probability: Probability of that class, in [0, 1].
    """

    index: int
    place: str
    label: str | None
    reference: str
    reference_probability: float
    candidate: str
    candidate_probability: float

    @property
    def outcome(self) -> str:
        """Return "lost", "won" or "wrong in both": how the flip changes the accuracy."""
        if self.reference == self.label:
            return "lost"
        return "won" if self.candidate == self.label else "wrong in both"


def flips(
    reference: Answers,
    candidate: Answers,
    classes: Sequence[str],
    *,
    label: Callable[[int], str | None] = lambda index: None,
    locate: Callable[[int], str] = str,
) -> tuple[int, tuple[Flip, ...]]:
    """Compare the predictions of two nets.

    Args:
        reference: Predictions of the first net.
        candidate: Predictions of the second net, on the same images.
        classes: Class names.
        label: Returns the name of an image's class.
        locate: Returns the place of an image.

    Returns:
        The number of images whose class changes, and up to `MOST` of them, sorted by the
        nets' confidence.
    """
    changed = np.flatnonzero(reference.classes != candidate.classes)
    certain = np.minimum(reference.probabilities[changed], candidate.probabilities[changed])
    order = changed[np.argsort(-np.nan_to_num(certain), kind="stable")]

    def name(number: int) -> str:
        return classes[number] if number >= 0 else "not a number"

    listed = [
        Flip(
            index=int(reference.indices[k]),
            place=locate(int(reference.indices[k])),
            label=label(int(reference.indices[k])),
            reference=name(int(reference.classes[k])),
            reference_probability=float(reference.probabilities[k]),
            candidate=name(int(candidate.classes[k])),
            candidate_probability=float(candidate.probabilities[k]),
        )
        for k in order[:MOST]
    ]
    return len(changed), tuple(listed)
