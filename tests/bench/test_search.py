from __future__ import annotations

import numpy as np
import pytest

from rtresnet.bench import search, workload
from rtresnet.bench.workload import Measurement


def measured(p99: float) -> Measurement:
    return workload.measurement(np.full(100, p99), 1.0, [], 1, True)


@pytest.mark.parametrize("gallop", [True, False])
@pytest.mark.parametrize("edge", [1, 2, 3, 7, 8, 100, 255, 256])
def test_largest_returns_the_largest_load_within_the_bound(edge: int, gallop: bool) -> None:
    tried: list[float] = []

    def measure(count: float) -> Measurement:
        tried.append(count)
        return measured(10.0 if count <= edge else 10.1)

    largest = search.largest(range(1, 257), measure, what="batch", bound=10, gallop=gallop)
    assert largest.best == edge and largest.limit == (edge == 256)
    assert [point.load for point in largest.points] == sorted(tried)
    assert tried.count(edge) == search.REPEATS
    assert edge == 256 or tried.count(edge + 1) == search.REPEATS
    assert not gallop or max(tried) <= 2 * edge + 1
    assert len(tried) <= 24


def test_largest_without_any_load_within_the_bound_returns_none() -> None:
    largest = search.largest(
        range(1, 9), lambda count: measured(11), what="batch", bound=10, gallop=True
    )
    assert largest.best is None and not any(point.holds for point in largest.points)


def test_largest_noisy_edge_is_decided_by_majority() -> None:
    calls: dict[float, int] = {}

    def measure(count: float) -> Measurement:
        calls[count] = calls.get(count, 0) + 1
        lucky = count == 5 and calls[count] == 1
        return measured(9 if count <= 4 or lucky else 11)

    assert search.largest(range(1, 65), measure, what="batch", bound=10, gallop=True).best == 4


def test_largest_pure_noise_terminates() -> None:
    rng = np.random.default_rng(0)
    largest = search.largest(
        range(1, 65),
        lambda count: measured(rng.uniform(5, 15)),
        what="batch",
        bound=10,
        gallop=False,
    )
    assert len(largest.points) < 64 * search.REPEATS


def test_early_stop_stops_when_most_of_ten_are_late() -> None:
    stop = search.early_stop(10)
    latencies: list[float] = []
    for _ in range(9):
        latencies.append(11)
        assert not stop(latencies)
    assert stop([*latencies, 11])
    patient = search.early_stop(10)
    assert not patient([9.0] * 50 + [11.0] * 50)


def test_point_with_too_few_samples_does_not_hold() -> None:
    few = workload.measurement(np.full(99, 1.0), 1.0, [], 1, True)
    assert not search.point(1, few, 10).holds
