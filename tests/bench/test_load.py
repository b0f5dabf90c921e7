from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from rtresnet.bench import load
from rtresnet.bench.load import measure, warm_up
from rtresnet.errors import InputError

Infer = Callable[[np.ndarray], object]


def takes(seconds: float) -> Infer:
    """A candidate that never answers sooner."""

    def infer(images: np.ndarray) -> None:
        time.sleep(seconds)

    return infer


def nothing(images: np.ndarray) -> None:
    pass


def test_the_latency_is_not_below_the_service_time() -> None:
    (found,) = measure([takes(0.002)], batch=4, size=8, seconds=0.15)
    assert min(found.samples) >= 1.99
    assert 1.99 <= found.latency.median < 20
    assert found.latency.n == len(found.samples)
    assert found.latency.images_per_second < 4 / 0.00199
    assert found.batch == 4
    assert found.latency.images_per_second == pytest.approx(
        4 * len(found.samples) / (sum(found.samples) / 1e3)
    )


def test_twice_as_slow_is_half_the_speed() -> None:
    first, second, third = measure(
        [takes(0.004), takes(0.008), takes(0.002)], batch=1, size=8, seconds=0.3
    )
    assert first.speed == 1
    assert 0.35 < second.speed < 0.65
    assert 1.3 < third.speed < 2.7


def test_candidates_take_turns_and_each_round_begins_with_another() -> None:
    calls: list[str] = []

    def called(name: str) -> Infer:
        return lambda images: calls.append(name)

    measure([called(n) for n in "abc"], batch=1, size=8, seconds=1e-9, rounds=3)
    assert "".join(calls[-27:]) == "aaabbbccc" + "bbbcccaaa" + "cccaaabbb"


def test_every_candidate_is_warmed_up_before_any_is_measured() -> None:
    calls: list[str] = []

    def called(name: str) -> Infer:
        return lambda images: calls.append(name)

    found = measure([called("a"), called("b")], batch=1, size=8, seconds=1e-9, rounds=1)
    warming = calls[: -sum(len(entry.samples) for entry in found)]
    assert warming == sorted(warming)
    assert min(warming.count("a"), warming.count("b")) >= 9


@pytest.mark.parametrize("rounds", [1, 5])
def test_at_least_three_requests_are_made_a_round(rounds: int) -> None:
    for found in measure([nothing, nothing], batch=1, size=8, seconds=1e-9, rounds=rounds):
        assert found.latency.n == 3 * rounds
        assert (found.latency.p90 is None) == (rounds == 1)


def test_the_time_is_spent_on_each_candidate() -> None:
    begin = time.perf_counter()
    found = measure([takes(0.001), takes(0.001)], batch=1, size=8, seconds=0.2)
    assert time.perf_counter() - begin >= 0.4
    for entry in found:
        assert 0.199 <= sum(entry.samples) / 1e3 < 0.4


def test_all_see_the_same_float32_images() -> None:
    seen: list[np.ndarray] = []
    measure([seen.append, seen.append], batch=5, size=6, seconds=1e-9, rounds=1)
    assert seen[0].shape == (5, 3, 6, 6)
    assert seen[0].dtype == np.float32 and seen[0].flags.c_contiguous
    assert 0.5 < seen[0].std() < 1.5
    assert all(images is seen[0] for images in seen)


def test_progress_only_grows_and_covers_all_candidates() -> None:
    told: list[float] = []
    measure(
        [takes(0.001), takes(0.001)],
        batch=1,
        size=8,
        seconds=0.05,
        rounds=4,
        on_progress=told.append,
    )
    assert len(told) == 8
    assert told == sorted(told) and told[0] > 0
    assert 0.099 <= told[-1] < 0.3


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_nothing_is_refused(batch: int) -> None:
    with pytest.raises(InputError, match="--batch"):
        measure([nothing], batch=batch, size=8, seconds=1)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_seconds_out_of_range_are_refused(seconds: float) -> None:
    with pytest.raises(InputError, match="--seconds"):
        measure([nothing], batch=1, size=8, seconds=seconds)


def test_an_even_callable_becomes_steady_after_three_windows() -> None:
    calls = []

    def even() -> None:
        calls.append(1)
        time.sleep(0.005)

    assert warm_up(even)
    assert len(calls) >= 9 and len(calls) % 3 == 0


def test_an_erratic_callable_is_not_steady_and_ends_at_the_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "CAP_SECONDS", 0.2)
    calls: list[int] = []

    def erratic() -> None:
        time.sleep((0.001, 0.004, 0.008)[len(calls) // 3 % 3])
        calls.append(1)

    begin = time.perf_counter()
    assert not warm_up(erratic)
    assert 0.2 <= time.perf_counter() - begin < 1
    (found,) = measure([lambda images: erratic()], batch=1, size=8, seconds=0.01)
    assert not found.steady


def test_the_result_says_that_it_was_steady() -> None:
    (found,) = measure([takes(0.005)], batch=1, size=8, seconds=0.05)
    assert found.steady


def test_an_error_of_a_candidate_is_not_swallowed() -> None:
    def breaks(images: np.ndarray) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure([nothing, breaks], batch=1, size=8, seconds=0.1)
