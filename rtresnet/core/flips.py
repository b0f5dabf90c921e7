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
        indices: Of the images in the data set, int64 [N].
        classes: Class numbers, int64 [N]; -1 if the net's output is not a number.
        probabilities: Of these classes, [N].
    """

    indices: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Flip:
    """An image whose class changes.

    Attributes:
        index: Of the data set.
        place: Path of the file, or data set and index.
        label: Name of its class; None without labels.
        reference: Class by the first net.
        reference_probability: Of that class, in [0, 1].
        candidate: Class by the second net.
        candidate_probability: Of that class, in [0, 1].
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
    """Compare the answers of two nets.

    Args:
        reference: Of the first net.
        candidate: Of the second net, on the same images.
        classes: Class names.
        label: Returns the name of an image's class.
        locate: Returns the place of an image.

    Returns:
        The number of images whose class changes, and up to `MOST` of them: those of which the
        nets are most certain first.
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
