"""Accuracy, agreement of two nets, and the interval of a loss of accuracy. Pure NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rtresnet.core.errors import DataError

Forward = Callable[[np.ndarray], np.ndarray]
"""float32 images [N, 3, S, S] to float32 logits [N, classes]."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Top-1 and top-5 as counts, which are not rounded.

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
    """Count hits of logits [N, classes] against labels [N]; a row with a NaN is never one.

    Raises:
        DataError: A label exceeds the number of classes.
    """
    if len(labels) and labels.max() >= logits.shape[1]:
        raise DataError(
            f"the data has label {labels.max()}, but the net has {logits.shape[1]} classes (0 to "
            f"{logits.shape[1] - 1})",
            fix="evaluate on data with the net's classes",
        )
    top5, finite = None, ~np.isnan(logits).any(axis=1)
    if logits.shape[1] > 5:
        best = np.argpartition(-logits, 5, axis=1)[:, :5]
        top5 = int(((best == labels[:, None]).any(axis=1) & finite).sum())
    hits = (logits.argmax(axis=1) == labels) & finite
    return Accuracy(n=len(labels), top1=int(hits.sum()), top5=top5)


def together(counts: Sequence[Accuracy]) -> Accuracy:
    """Add the counts of several batches (at least one) of one net."""
    top5 = None if counts[0].top5 is None else sum(count.top5 or 0 for count in counts)
    return Accuracy(
        n=sum(count.n for count in counts), top1=sum(count.top1 for count in counts), top5=top5
    )


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Difference between two backends on the same images.

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
    """Compare logits [N, classes] of a candidate with those of a reference."""
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
    """Return probabilities along the last axis, computed without overflow."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def most_probable(
    answer: np.ndarray | tuple[np.ndarray, np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return indices and probabilities [N, count] of the most probable classes.

    Args:
        answer: Logits [N, classes], or indices and probabilities [N, K] of a top-K file.
        count: Largest number of classes per image.
    """
    if isinstance(answer, tuple):
        return answer[0][:, :count], answer[1][:, :count]
    probabilities = softmax(answer)
    indices = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
    return indices, np.take_along_axis(probabilities, indices, axis=1)


def from_best(indices: np.ndarray, probabilities: np.ndarray, classes: int) -> np.ndarray:
    """Return logits of all classes whose softmax gives the K most probable classes.

    Args:
        indices: int64 [N, K].
        probabilities: [N, K], descending.
        classes: Number of classes; the others share the remaining probability equally.

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


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Accuracy lost between two nets on the same images, in points of a hundred.

    Attributes:
        n: Images.
        lost: Images that only the first net classifies correctly.
        won: Images that only the second net classifies correctly.
        points: Top-1 of the first minus top-1 of the second; negative if the second is better.
        low, high: 95 % confidence interval of `points`.
    """

    n: int
    lost: int
    won: int
    points: float
    low: float
    high: float


def paired_drop(reference: np.ndarray, candidate: np.ndarray) -> Drop:
    """Return the drop from hits bool [N] of one net to those of another on the same images.

    Only images on which they differ count, which makes the interval narrow: Wald's for a
    difference of paired proportions, with half an image added to each kind of difference so that
    it is never empty (Agresti and Min, 2005).
    """
    n = len(reference)
    lost, won = int((reference & ~candidate).sum()), int((~reference & candidate).sum())
    low, high = _interval(lost, won, n)
    return Drop(n=n, lost=lost, won=won, points=100 * (lost - won) / n, low=low, high=high)


def _interval(lost: float, won: float, n: float) -> tuple[float, float]:
    total = n + 2
    difference = (lost - won) / total
    variance = (lost + won + 1) / total - difference**2
    reach = 196 * math.sqrt(variance / total)
    return 100 * difference - reach, 100 * difference + reach


Verdict = Literal["held", "not shown to hold", "missed"]


def verdict(drop: Drop, bound: float) -> Verdict:
    """Decide what a measured drop shows about a bound.

    Args:
        drop: From `paired_drop`.
        bound: Largest allowed loss, in points.

    Returns:
        "held": the whole 95 % interval lies within the bound. "missed": the measured loss exceeds
        it. "not shown to hold": the measured loss is within the bound, the interval reaches
        beyond, and more images are needed to decide.
    """
    if drop.points > bound:
        return "missed"
    return "held" if drop.high <= bound else "not shown to hold"


def images_needed(drop: Drop, bound: float) -> float:
    """Estimate how many images would show that a bound holds.

    It is the number at which the upper limit of the interval reaches the bound if the shares of
    lost and won images stay as measured, and with them the drop and its paired
    variance. Other images have other shares, so this is an estimate.

    Args:
        drop: From `paired_drop`.
        bound: Largest allowed loss, in points.

    Returns:
        At least `drop.n`; infinity if the measured drop is not below the bound, because then no
        number of images is enough.
    """
    if drop.high <= bound:
        return drop.n
    if drop.points >= bound:
        return math.inf
    lost, won = drop.lost / drop.n, drop.won / drop.n

    def shown(n: int) -> bool:
        return _interval(lost * n, won * n, n)[1] <= bound

    low, high = drop.n, 2 * drop.n
    while not shown(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


def fewest_images(bound: float) -> float:
    """Return the number of images that it takes to show a bound, in points, for two equal nets."""
    hit = np.ones(1, bool)
    return images_needed(paired_drop(hit, hit), bound)
