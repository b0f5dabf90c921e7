"""Confusion, precision, recall and calibration, compared with counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rtresnet.core.classification import BINS, Collector, Proportion

CLASSES = ("cat", "dog", "owl")


def collected(probabilities: np.ndarray, labels: np.ndarray, batch: int = 7) -> Collector:
    collector = Collector(CLASSES[: probabilities.shape[1]])
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        collector.add(np.arange(len(labels))[part], labels[part], probabilities[part])
    return collector


def drawn(n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet((1, 1, 1), n)
    labels = np.array([rng.choice(3, p=row) for row in probabilities])
    return probabilities, labels


def test_report_counts_equal_those_by_hand() -> None:
    probabilities, labels = drawn()
    report = collected(probabilities, labels).report()
    predicted = probabilities.argmax(1)
    for label in range(3):
        for other in range(3):
            expected = ((labels == label) & (predicted == other)).sum()
            assert report.matrix()[label, other] == expected
        score = report.classes[label]
        hits = ((labels == label) & (predicted == label)).sum()
        assert (score.precision.count, score.precision.n) == (hits, (predicted == label).sum())
        assert (score.recall.count, score.recall.n) == (hits, (labels == label).sum())
        assert score.precision.percent and score.recall.percent and score.f1
        precision, recall = score.precision.percent / 100, score.recall.percent / 100
        assert score.f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert report.top1.count == (labels == predicted).sum() and report.top5 is None


def test_report_calibration_error_of_calibrated_probabilities_is_small() -> None:
    probabilities, labels = drawn(20_000)
    assert collected(probabilities, labels).report().ece < 0.02
    certain = np.eye(3)[probabilities.argmax(1)]
    report = collected(certain, labels).report()
    assert report.ece == pytest.approx(1 - (labels == certain.argmax(1)).mean())
    assert report.bins[-1].n == 20_000 and sum(entry.n for entry in report.bins) == 20_000
    assert len(report.bins) == BINS


def test_report_lists_the_most_confident_mistakes_and_the_least_certain_images() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
    report = collected(probabilities, np.array([1, 1, 1, 0])).report(lambda index: f"{index}.jpg")
    assert [image.place for image in report.mistakes] == ["0.jpg", "1.jpg"]
    first = report.mistakes[0]
    assert (first.label, first.predicted) == ("dog", "cat")
    assert (first.probability, first.label_probability) == (0.9, pytest.approx(0.1))
    assert [image.index for image in report.uncertain] == [3, 1, 2, 0]


def test_report_class_without_images_has_no_percentages() -> None:
    probabilities = np.array([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1]])
    owl = collected(probabilities, np.array([0, 1])).report().classes[2]
    assert owl.recall.percent is None and owl.precision.percent is None and owl.f1 is None


@pytest.mark.parametrize(
    ("count", "n", "low", "high"), [(0, 10, 0.0, 27.75), (9, 10, 59.58, 98.21)]
)
def test_proportion_interval_is_wilsons(count: int, n: int, low: float, high: float) -> None:
    share = Proportion.of(count, n)
    assert share.low == pytest.approx(low, abs=0.01) and share.high == pytest.approx(high, abs=0.01)
