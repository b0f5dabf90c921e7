from __future__ import annotations

import math

import numpy as np
import pytest

from rtresnet.core import metrics
from rtresnet.core.metrics import Accuracy, accuracy, parity, softmax

NAN = float("nan")


def test_top1_counts_the_largest_logit() -> None:
    logits = np.array([[0.1, 0.9, 0.0], [5.0, -1.0, 4.0], [0.0, 0.0, 1.0]], np.float32)
    result = accuracy(logits, np.array([1, 2, 2]))
    assert (result.n, result.top1) == (3, 2)
    assert result.top1_percent == pytest.approx(200 / 3)


def test_top5_counts_labels_among_the_five_largest() -> None:
    logits = np.tile(np.arange(10, dtype=np.float32), (10, 1))  # the five largest: 5 to 9
    result = accuracy(logits, np.arange(10))
    assert (result.top1, result.top5) == (1, 5)
    assert result.top5_percent == 50


@pytest.mark.parametrize("classes", range(6, 30, 7))
def test_top5_agrees_with_a_full_sort(classes: int) -> None:
    rng = np.random.default_rng(classes)
    logits = rng.standard_normal((200, classes)).astype(np.float32)
    labels = rng.integers(0, classes, 200)
    expected = sum(
        label in sorted(range(classes), key=lambda c: -row[c])[:5]
        for row, label in zip(logits, labels, strict=True)
    )
    assert accuracy(logits, labels).top5 == expected


@pytest.mark.parametrize("classes", [2, 5])
def test_five_classes_or_fewer_have_no_top5(classes: int) -> None:
    result = accuracy(np.eye(classes, dtype=np.float32), np.arange(classes))
    assert result.top1 == classes
    assert result.top5 is None
    assert result.top5_percent is None


def test_six_classes_have_a_top5() -> None:
    assert accuracy(-np.eye(6, dtype=np.float32), np.arange(6)).top5 == 0


def test_an_image_whose_logits_are_nan_is_never_a_hit() -> None:
    logits = np.full((4, 10), NAN, np.float32)
    logits[0] = np.eye(10)[0]
    result = accuracy(logits, np.zeros(4, int))
    assert (result.n, result.top1, result.top5) == (4, 1, 1)


def test_percentages_come_from_counts() -> None:
    result = Accuracy(n=8, top1=5, top5=8)
    assert (result.top1_percent, result.top5_percent) == (62.5, 100)


def test_equal_logits_have_perfect_parity() -> None:
    logits = np.random.default_rng(0).standard_normal((7, 10)).astype(np.float32)
    result = parity(logits, logits.copy())
    assert (result.n, result.largest, result.relative, result.agreement) == (7, 0, 0, 1)


def test_parity_measures_the_largest_and_the_relative_difference() -> None:
    reference = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)
    candidate = np.array([[3.0, 0.0], [0.0, 3.5]], np.float32)
    result = parity(reference, candidate)
    assert result.largest == 0.5
    assert result.relative == pytest.approx(0.5 / 5)
    assert result.agreement == 1


def test_parity_takes_its_norm_from_the_reference() -> None:
    small, large = np.ones((1, 4), np.float32), np.full((1, 4), 3, np.float32)
    assert parity(small, large).relative == pytest.approx(2)
    assert parity(large, small).relative == pytest.approx(2 / 3)


def test_agreement_is_the_share_of_images_with_the_same_top1() -> None:
    reference = np.eye(4, dtype=np.float32)
    candidate = reference[[0, 1, 3, 2]]
    assert parity(reference, candidate).agreement == 0.5


def test_half_precision_is_compared_without_overflow() -> None:
    reference = np.full((1, 2), 60000, np.float16)
    assert parity(reference, -reference).largest == 120000


def test_nothing_is_relative_to_a_reference_of_zeros() -> None:
    result = parity(np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32))
    assert result.relative == float("inf")


def test_nan_shows_in_every_difference_and_agrees_with_nothing() -> None:
    reference = np.eye(3, dtype=np.float32)
    candidate = reference.copy()
    candidate[0] = NAN
    result = parity(reference, candidate)
    assert np.isnan(result.largest)
    assert np.isnan(result.relative)
    assert result.agreement == pytest.approx(2 / 3)
    assert parity(candidate, candidate).agreement == pytest.approx(2 / 3)


def test_softmax_is_the_formula() -> None:
    logits = np.array([[0.0, 1.0, 2.0], [-1.0, 0.5, 0.0]], np.float32)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(softmax(logits), expected, atol=1e-7)


def test_softmax_takes_the_last_axis() -> None:
    assert softmax(np.zeros(4, np.float32)) == pytest.approx(0.25)
    assert softmax(np.zeros((2, 3, 5), np.float32)).sum(axis=-1) == pytest.approx(1)


def test_softmax_of_huge_logits_does_not_overflow() -> None:
    with np.errstate(over="raise", invalid="raise"):
        probabilities = softmax(np.array([[1e4, 1e4, -1e4]], np.float32))
    assert probabilities[0] == pytest.approx([0.5, 0.5, 0])


def test_a_drop_counts_only_the_images_on_which_two_nets_differ() -> None:
    first = np.array([True] * 90 + [False] * 10)
    second = first.copy()
    second[:3] = False
    second[95] = True
    drop = metrics.paired_drop(first, second)
    assert (drop.n, drop.points) == (100, 2.0)
    assert drop.low < 2.0 < drop.high


def test_the_interval_of_a_drop_narrows_with_the_images_and_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(400):
        first = rng.random(1000) < 0.9
        second = np.where(rng.random(1000) < 0.02, ~first, first)
        drop = metrics.paired_drop(first, second)
        # Of the hits 2 % are lost and of the misses 2 % won: 1.6 points.
        covered += drop.low <= 1.6 <= drop.high
        widths.append(drop.high - drop.low)
    assert 0.92 < covered / 400 < 0.98
    few = metrics.paired_drop(first[:100], second[:100])
    assert few.high - few.low > 2 * np.mean(widths)


def test_nets_that_agree_everywhere_still_have_an_interval() -> None:
    same = np.ones(50, bool)
    drop = metrics.paired_drop(same, same)
    assert drop.points == 0 and drop.low < 0 < drop.high


def drop_of(n: int, lost: int, won: int) -> metrics.Drop:
    first, second = np.ones(n, bool), np.ones(n, bool)
    second[:lost] = False
    first[lost : lost + won] = False
    return metrics.paired_drop(first, second)


@pytest.mark.parametrize(
    ("n", "lost", "won", "expected"),
    [
        (400, 2, 1, "not shown to hold"),  # 0.25 points, and the interval reaches beyond 0.5
        (10_000, 20, 15, "held"),
        (400, 4, 1, "missed"),
        (400, 0, 10, "held"),  # the second net is better
    ],
)
def test_verdict_bound_inside_or_outside_the_interval_is_told_apart(
    n: int, lost: int, won: int, expected: str
) -> None:
    assert metrics.verdict(drop_of(n, lost, won), 0.5) == expected


@pytest.mark.parametrize(("lost", "won"), [(2, 1), (0, 0), (1, 1), (8, 7)])
def test_images_needed_same_shares_reach_the_bound_there_and_not_before(
    lost: int, won: int
) -> None:
    few = drop_of(300, lost, won)
    needed = metrics.images_needed(few, 0.5)
    times = math.ceil(needed / 300)
    assert times > 1
    assert drop_of(300 * times, lost * times, won * times).high <= 0.5
    assert drop_of(300 * (times - 1), lost * (times - 1), won * (times - 1)).high > 0.5


def test_images_needed_is_infinite_where_no_number_would_help() -> None:
    assert metrics.images_needed(drop_of(400, 2, 0), 0.5) == math.inf  # measured at the bound
    assert metrics.images_needed(drop_of(400, 9, 0), 0.5) == math.inf
    drop = drop_of(10_000, 20, 15)
    assert metrics.images_needed(drop, 0.5) == drop.n
    assert metrics.fewest_images(0) == math.inf


def test_fewest_images_is_what_two_equal_nets_need() -> None:
    fewest = int(metrics.fewest_images(0.5))
    assert drop_of(fewest, 0, 0).high <= 0.5 < drop_of(fewest - 1, 0, 0).high


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_best_classes_say_what_they_can_of_all(k: int) -> None:
    rows = metrics.softmax(np.random.default_rng(0).normal(0, 3, (20, 10)))
    indices = np.argsort(-rows, axis=1)[:, :k]
    best = np.take_along_axis(rows, indices, axis=1).astype(np.float32)
    logits = metrics.from_best(indices, best, 10)
    probabilities = metrics.softmax(logits)
    np.testing.assert_array_equal(np.argsort(-logits, axis=1, kind="stable")[:, 0], indices[:, 0])
    chosen = np.take_along_axis(probabilities, indices, axis=1)
    assert (chosen >= best - 1e-6).all() and (
        chosen[:, -1:] >= probabilities.min(axis=1, keepdims=True)
    ).all()
    if k == 10:
        np.testing.assert_allclose(probabilities, rows, atol=1e-6)
    certain = metrics.from_best(np.array([[2]]), np.array([[1.0]], np.float32), 4)
    np.testing.assert_allclose(metrics.softmax(certain), [[0, 0, 1, 0]], atol=1e-12)


def test_a_best_class_that_is_no_number_is_no_hit() -> None:
    logits = metrics.from_best(np.array([[0, 1]]), np.full((1, 2), np.nan, np.float32), 6)
    assert metrics.accuracy(logits, np.array([0])) == metrics.Accuracy(n=1, top1=0, top5=0)
