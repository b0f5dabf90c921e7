"""Metrics of a classifier: confusion, precision, recall, calibration.

`Collector` keeps a few numbers per image, so that a large test set fits into memory. Pure NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

BINS = 15  # bins of the reliability diagram, as in Guo et al. (2017)
GALLERY = 24  # images listed as confident mistakes, and as least certain


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """A share of images with its 95 % interval.

    Attributes:
        count: Number of matching images.
        n: Number of all images.
        percent: None if `n` is 0.
        low: Lower end of Wilson's 95 % interval, in percent; None if `n` is 0.
        high: Upper end.
    """

    count: int
    n: int
    percent: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, count: int, n: int) -> Proportion:
        """Compute the share and its interval (Wilson, 1927)."""
        if not n:
            return cls(count=0, n=0, percent=None, low=None, high=None)
        share, z2 = count / n, 1.96**2
        centre = (share + z2 / (2 * n)) / (1 + z2 / n)
        reach = 1.96 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
        return cls(
            count=count,
            n=n,
            percent=100 * share,
            low=100 * max(0.0, centre - reach),
            high=100 * min(1.0, centre + reach),
        )


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class.

    Attributes:
        name: Name of the class.
        precision: Share of the images predicted as the class that belong to it.
        recall: Share of the class's images that are predicted as it.
        f1: Harmonic mean of both, in [0, 1]; None if the class occurs on neither side.
    """

    name: str
    precision: Proportion
    recall: Proportion
    f1: float | None


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Number of images with a label and a predicted class, both as class numbers."""

    label: int
    predicted: int
    n: int


@dataclass(frozen=True, kw_only=True)
class ConfidenceBin:
    """Images whose confidence lies in (low, high].

    Attributes:
        n: Number of images.
        confidence: Mean probability of the predicted class, in [0, 1]; None without images.
        accuracy: Share of correct predictions, in [0, 1]; None without images.
    """

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """One image and its prediction.

    Attributes:
        index: Index in the data set.
        place: Path of the file, or data set and index.
        label: Name of its class.
        predicted: Name of the most probable class.
        probability: Probability of that class, in [0, 1].
        label_probability: Probability of its own class, in [0, 1].
    """

    index: int
    place: str
    label: str
    predicted: str
    probability: float
    label_probability: float


@dataclass(frozen=True, kw_only=True)
class ClassificationReport:
    """Metrics of a classifier.

    Attributes:
        n: Images.
        top1: Share of correct predictions.
        top5: Share of images whose label is among the five most probable classes; None with five
            classes or fewer.
        classes: Each class.
        confusion: Pairs of label and predicted class that occur, the diagonal included, the most
            frequent first.
        ece: Expected calibration error in [0, 1]: mean distance of confidence and accuracy over
            the bins, weighted by their images (Guo et al., 2017).
        bins: Bins of the reliability diagram.
        mistakes: Wrong predictions, the most confident first.
        uncertain: Images with the least probable predicted class, the least certain first.
    """

    n: int
    top1: Proportion
    top5: Proportion | None
    classes: tuple[ClassScore, ...]
    confusion: tuple[Confusion, ...]
    ece: float
    bins: tuple[ConfidenceBin, ...]
    mistakes: tuple[ScoredImage, ...]
    uncertain: tuple[ScoredImage, ...]

    def matrix(self) -> np.ndarray:
        """Return the confusion matrix, int64 [label, predicted]."""
        matrix = np.zeros((len(self.classes), len(self.classes)), np.int64)
        for entry in self.confusion:
            matrix[entry.label, entry.predicted] = entry.n
        return matrix


class Collector:
    """Collects predictions batch by batch.

    Args:
        classes: Class names.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, indices: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Add predictions.

        Args:
            indices: Indices of the images, int64 [N].
            labels: Class numbers, int64 [N].
            probabilities: [N, classes], rows sum to 1.
        """
        own = probabilities[np.arange(len(labels)), labels]
        predicted = probabilities.argmax(axis=1)
        best = probabilities.max(axis=1)
        rank = (probabilities > own[:, None]).sum(axis=1)
        self._parts.append((indices, labels, predicted, best, own, rank))

    def report(self, locate: Callable[[int], str] = str) -> ClassificationReport:
        """Summarize all predictions.

        Args:
            locate: Returns the place of an image; by default its number.
        """
        columns = [np.concatenate(column) for column in zip(*self._parts, strict=True)]
        indices, labels, predicted, best, own, rank = columns
        n, count = len(labels), len(self.classes)
        right = predicted == labels
        flat = np.bincount(labels * count + predicted, minlength=count * count)
        matrix = flat.reshape(count, count)
        pairs = np.flatnonzero(flat)
        pairs = pairs[np.argsort(-flat[pairs], kind="stable")]

        def scored(chosen: np.ndarray) -> tuple[ScoredImage, ...]:
            return tuple(
                ScoredImage(
                    index=int(indices[k]),
                    place=locate(int(indices[k])),
                    label=self.classes[labels[k]],
                    predicted=self.classes[predicted[k]],
                    probability=float(best[k]),
                    label_probability=float(own[k]),
                )
                for k in chosen[:GALLERY]
            )

        wrong = np.flatnonzero(~right)
        bins = _bins(best, right)
        return ClassificationReport(
            n=n,
            top1=Proportion.of(int(right.sum()), n),
            top5=Proportion.of(int((rank < 5).sum()), n) if count > 5 else None,
            classes=tuple(_class_score(name, matrix, k) for k, name in enumerate(self.classes)),
            confusion=tuple(
                Confusion(label=int(p) // count, predicted=int(p) % count, n=int(flat[p]))
                for p in pairs
            ),
            ece=sum(
                entry.n * abs(entry.confidence - entry.accuracy)
                for entry in bins
                if entry.confidence is not None and entry.accuracy is not None
            )
            / n,
            bins=bins,
            mistakes=scored(wrong[np.argsort(-best[wrong], kind="stable")]),
            uncertain=scored(np.argsort(best, kind="stable")),
        )


def _class_score(name: str, matrix: np.ndarray, number: int) -> ClassScore:
    hits = int(matrix[number, number])
    labelled, predicted = int(matrix[number].sum()), int(matrix[:, number].sum())
    return ClassScore(
        name=name,
        precision=Proportion.of(hits, predicted),
        recall=Proportion.of(hits, labelled),
        f1=2 * hits / (labelled + predicted) if labelled + predicted else None,
    )


def _bins(confidence: np.ndarray, right: np.ndarray) -> tuple[ConfidenceBin, ...]:
    number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    entries = []
    for index in range(BINS):
        chosen = number == index
        n = int(chosen.sum())
        entries.append(
            ConfidenceBin(
                low=index / BINS,
                high=(index + 1) / BINS,
                n=n,
                confidence=float(confidence[chosen].mean()) if n else None,
                accuracy=float(right[chosen].mean()) if n else None,
            )
        )
    return tuple(entries)
