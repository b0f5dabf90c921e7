"""Consistency checks, with correct backends and backends that are wrong in one way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rtresnet.bench import consistency
from rtresnet.bench.consistency import Check

SIZES = (1, 4, 8)
IMAGES = np.random.default_rng(0).standard_normal((6, 3, 4, 4)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).standard_normal((48, 5)).astype(np.float32)
Backend = Callable[[np.ndarray], Any]


def sound(images: np.ndarray) -> np.ndarray:
    """Return a net of one layer. Row by row: a matrix product would sum in an order of its own."""
    rows = [row.reshape(-1).astype(np.float32) @ WEIGHTS for row in images]
    return np.stack(rows) / (255 if images.dtype == np.uint8 else 1)


def shifted(images: np.ndarray) -> np.ndarray:
    return np.roll(sound(images), 1, axis=0)


def swapped_at_the_end(images: np.ndarray) -> np.ndarray:
    result = sound(images)
    if len(result) > 4:
        result[[-1, -2]] = result[[-2, -1]]
    return result


def by_batch_size(images: np.ndarray) -> np.ndarray:
    return sound(images) * np.float32(1 + 0.01 * (len(images) == 8))


def normalized_over_the_batch(images: np.ndarray) -> np.ndarray:
    return sound(images) - sound(images).mean(axis=0) * (len(images) > 1)


def wrong_when_odd(images: np.ndarray) -> np.ndarray:
    result = sound(images)
    if len(result) == 7:
        result[-1] = 0
    return result


def cut_at_the_largest(images: np.ndarray) -> np.ndarray:
    return sound(images)[: max(SIZES)]


def sorting(images: np.ndarray) -> np.ndarray:
    """Return answers that are right for one order of images only."""
    return sound(images[np.argsort(images[:, 0, 0, 0])])


class Stale:
    """Gives the answers of the batch before, where it was as large."""

    def __init__(self) -> None:
        self.last: np.ndarray | None = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        answer, before = sound(images), self.last
        self.last = answer
        return before if before is not None and before.shape == answer.shape else answer


class Drifting:
    """Adds up: the same question gets another answer each time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.calls += 1
        return sound(images) + np.float32(0.01 * self.calls)


class OneBuffer:
    """Gives away the buffer that the next batch is written to."""

    def __init__(self) -> None:
        self.buffer = np.zeros((64, 5), np.float32)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.buffer[: len(images)] = sound(images)
        return self.buffer[: len(images)]


def leaking(images: np.ndarray) -> np.ndarray:
    """Spread a NaN over the batch by a sum that has no effect otherwise."""
    return sound(images) + 0 * images.sum(dtype=np.float32)


class Poisoned:
    """A NaN stays in memory until the next call."""

    def __init__(self) -> None:
        self.memory = np.float32(0)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        answer = sound(images) + self.memory
        self.memory = np.float32(0) * images.sum(dtype=np.float32)
        return answer


def whitening(images: np.ndarray) -> np.ndarray:
    return sound(images) * np.float32(1 + (images == 255).all(axis=(1, 2, 3)).any())


def checks(backend: Backend, images: np.ndarray = IMAGES, share: float = 1e-4) -> list[Check]:
    single = consistency.alone(backend, images)
    return consistency.check(backend, images, single, sizes=SIZES, share=share)


def test_check_sound_backend_passes() -> None:
    result = checks(sound)
    assert all(check.ok and check.largest == 0 and check.moved == 0 for check in result)
    assert [f"{check.name}: {check.compared}" for check in result] == [
        "in a batch: 4 with alone",
        "permuted: 4 with alone",
        "batch size: 1 with alone",
        "batch size: 4 with alone",
        "batch size: 8 with alone",
        "odd batch: 3 with alone",
        "odd batch: 7 with alone",
        "odd batch: 9 with alone",
        "repeated: 4, with others in between",
        "NaN in one row: the others",
    ]


@pytest.mark.parametrize(
    ("backend", "caught"),
    [
        (shifted, "in a batch"),
        (sorting, "permuted"),
        (swapped_at_the_end, "batch size"),
        (by_batch_size, "batch size"),
        (normalized_over_the_batch, "in a batch"),
        (wrong_when_odd, "odd batch"),
        (cut_at_the_largest, "odd batch"),
        (Stale(), "permuted"),
        (Drifting(), "repeated"),
        (OneBuffer(), "repeated"),
        (leaking, "NaN in one row"),
        (Poisoned(), "NaN in one row"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_check_each_defect_is_caught(backend: Backend, caught: str) -> None:
    failed = {check.name: check.why for check in checks(backend) if not check.ok}
    assert failed.get(caught)


@pytest.mark.parametrize(
    ("backend", "caught"),
    [
        (by_batch_size, {"batch size"}),
        (wrong_when_odd, {"odd batch"}),
        (OneBuffer(), {"repeated"}),
        (leaking, {"NaN in one row"}),
        (Poisoned(), {"NaN in one row"}),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_check_each_defect_is_caught_by_one_comparison(backend: Backend, caught: set[str]) -> None:
    assert {check.name for check in checks(backend) if not check.ok} == caught


def test_check_uint8_input_uses_white_in_place_of_nan() -> None:
    pixels = np.random.default_rng(2).integers(0, 200, (6, 4, 4, 3), dtype=np.uint8)
    assert all(check.ok for check in checks(sound, pixels))
    assert [c.name for c in checks(whitening, pixels) if not c.ok] == ["white in one row"]


def test_check_answers_not_finite_are_reported_first() -> None:
    (only,) = checks(lambda images: sound(images) * np.float32(np.nan))
    assert only.name == "alone" and only.why == "6 outputs are not finite"


def top2(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from rtresnet.core.metrics import softmax

    probabilities = softmax(sound(images) / 4)
    order = np.argsort(-probabilities, axis=1)[:, :2].astype(np.int64)
    return order, np.take_along_axis(probabilities, order, axis=1).astype(np.float32)


def test_check_topk_compares_probabilities_and_top1() -> None:
    assert all(check.ok for check in checks(top2))

    def renamed(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices, probabilities = top2(images)
        return indices + (len(images) == 8), probabilities

    (failed,) = (check for check in checks(renamed) if not check.ok)
    assert failed.compared == "8 with alone" and "8 of 8" in str(failed.why)
    assert failed.largest > failed.tolerance and failed.moved > 0


def test_difference_topk_ignores_the_order_of_classes() -> None:
    def best(classes: list[int], shares: list[float]) -> consistency.Outputs:
        return consistency.answers((np.array([classes]), np.array([shares], np.float32)))

    reference = best([3, 1, 7], [0.5, 0.4, 0.02])
    assert best([1, 3, 7], [0.46, 0.44, 0.02]).difference(reference) == pytest.approx(0.06)
    # the last one may be another: the one it ousted is no more likely than it
    assert best([3, 1, 9], [0.5, 0.4, 0.03]).difference(reference) == pytest.approx(0.01)
    assert best([3, 9, 7], [0.5, 0.4, 0.02]).difference(reference) == pytest.approx(0.38)


def test_compare_top1_may_change_only_within_the_tolerance() -> None:
    want = consistency.answers(np.array([[1.0, 0.95, 0], [1.0, 0.5, 0]], np.float32))
    close = consistency.answers(np.array([[0.95, 1.0, 0], [1.0, 0.5, 0]], np.float32))
    assert consistency.compare("", "", close, want, 0.06).ok
    assert not consistency.compare("", "", close, want, 0.04).ok
    far = consistency.answers(np.array([[1.0, 0.95, 0], [0.74, 0.76, 0]], np.float32))
    comparison = consistency.compare("", "", far, want, 0.3)
    assert comparison.largest < 0.3 and comparison.moved == 1 and not comparison.ok


def test_allowed_is_a_share_of_the_logits_range() -> None:
    logits = consistency.answers(np.array([[-3.0, 5.0], [1.0, 2.0]]))
    assert logits.allowed(0.01) == pytest.approx(0.08)
    assert logits.top(1).allowed(0.01) == pytest.approx(0.1)
    assert logits.top(1).allowed(0.9) == consistency.WIDEST


def test_discriminability_counts_distinguishable_pairs() -> None:
    assert consistency.discriminability(consistency.alone(sound, IMAGES), 1e-3) == 1
    twins = consistency.alone(sound, IMAGES[[0, 1, 0]])
    assert consistency.discriminability(twins, 1e-3) == pytest.approx(2 / 3)
