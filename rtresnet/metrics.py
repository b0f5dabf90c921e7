"""What two sets of logits, or logits and labels, say of each other. Pure NumPy.

One definition of accuracy, agreement and parity for every room that needs one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Forward = Callable[[np.ndarray], np.ndarray]
"""float32 images [N, 3, S, S] to float32 logits [N, classes]."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 and top-5 as counts, so that nothing is lost to rounding.

    Attributes:
        n: Images counted.
        top1: Images whose largest logit is the label.
        top5: Images whose label is among the five largest; None with five classes or fewer.
    """

    n: int
    top1: int
    top5: int | None

    @property
    def top1_percent(self) -> float:
        """Share of `n`, in percent."""
        return 100 * self.top1 / self.n

    @property
    def top5_percent(self) -> float | None:
        """Share of `n`, in percent."""
        return None if self.top5 is None else 100 * self.top5 / self.n


def accuracy(logits: np.ndarray, labels: np.ndarray) -> Accuracy:
    """Counts hits of logits [N, classes] against labels [N]; a row with a NaN is never one."""
    top5, known = None, ~np.isnan(logits).any(axis=1)
    if logits.shape[1] > 5:
        best = np.argpartition(-logits, 5, axis=1)[:, :5]
        top5 = int(((best == labels[:, None]).any(axis=1) & known).sum())
    hits = (logits.argmax(axis=1) == labels) & known
    return Accuracy(n=len(labels), top1=int(hits.sum()), top5=top5)


def together(counts: Sequence[Accuracy]) -> Accuracy:
    """The counts of several batches (at least one, of one net) as one."""
    top5 = None if counts[0].top5 is None else sum(count.top5 or 0 for count in counts)
    return Accuracy(
        n=sum(count.n for count in counts), top1=sum(count.top1 for count in counts), top5=top5
    )


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far two backends are apart on the same images.

    Attributes:
        n: Images compared.
        largest: Largest absolute difference of any logit.
        relative: Norm of the difference over the norm of the reference.
        agreement: Share of images with the same top-1, in [0, 1].
    """

    n: int
    largest: float
    relative: float
    agreement: float


def parity(reference: np.ndarray, candidate: np.ndarray) -> Parity:
    """Compares logits [N, classes] of a candidate with those of a reference."""
    difference = candidate.astype(np.float64) - reference.astype(np.float64)
    same = reference.argmax(axis=1) == candidate.argmax(axis=1)
    error = float(np.linalg.norm(difference))
    norm = float(np.linalg.norm(reference.astype(np.float64)))
    return Parity(
        n=len(reference),
        largest=float(np.abs(difference).max()),
        relative=error / norm if norm else (0.0 if error == 0 else float("inf")),
        agreement=float((same & ~np.isnan(difference).any(axis=1)).mean()),
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, computed without overflow."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def from_best(indices: np.ndarray, probabilities: np.ndarray, classes: int) -> np.ndarray:
    """What the K most probable classes say of all of them, as logits whose softmax they are.

    Args:
        indices: int64 [N, K].
        probabilities: [N, K], descending.
        classes: How many there are; the others share what is left, equally.

    Returns:
        float64 [N, classes].
    """
    best = probabilities.astype(np.float64)
    others = classes - best.shape[1]
    # Rounding may leave less than nothing, and nothing has no logarithm.
    tiny = np.finfo(np.float64).tiny
    left = np.maximum(1 - best.sum(axis=1, keepdims=True), tiny) / max(others, 1)
    logits = np.repeat(np.log(np.minimum(left, best[:, -1:])), classes, axis=1)
    with np.errstate(divide="ignore"):
        np.put_along_axis(logits, indices, np.log(best), axis=1)
    return logits


def collect(
    forward: Forward, batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Runs every batch of (images, labels) and returns all logits and all labels."""
    logits, labels = [], []
    for images, truth in batches:
        logits.append(forward(images))
        labels.append(truth)
    return np.concatenate(logits), np.concatenate(labels)


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Accuracy lost between two nets on the same images, in points of a hundred.

    Attributes:
        n: Images.
        points: Top-1 of the first less top-1 of the second.
        low, high: 95 % confidence interval of `points`.
    """

    n: int
    points: float
    low: float
    high: float


def paired_drop(reference: np.ndarray, candidate: np.ndarray) -> Drop:
    """The drop from hits bool [N] of one net to those of another on the same images.

    Only images on which they differ count, which makes the interval narrow: Wald's for a
    difference of paired proportions, with half an image added to each kind of difference so that
    it is never empty (Agresti and Min, 2005).
    """
    n = len(reference)
    lost, won = int((reference & ~candidate).sum()), int((~reference & candidate).sum())
    points = 100 * (lost - won) / n
    total = n + 2
    difference = (lost - won) / total
    variance = (lost + won + 1) / total - difference**2
    reach = 196 * float(np.sqrt(variance / total))
    centre = 100 * difference
    return Drop(n=n, points=points, low=centre - reach, high=centre + reach)
