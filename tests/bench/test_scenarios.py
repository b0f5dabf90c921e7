"""Open and closed loops on a simulated clock, held against theory."""

from __future__ import annotations

import numpy as np
import pytest

from rtresnet.bench import scenarios
from rtresnet.bench.load import Candidate
from rtresnet.errors import InputError


class Simulated:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float, *, exactly: bool) -> None:
        self.time = max(self.time, moment)


def constant(clock: Simulated, seconds: float) -> Candidate:
    def serve(request: object) -> None:
        clock.time += seconds

    return Candidate(serve=serve, requests=[0])


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.8])
def test_the_p99_of_a_server_is_that_of_theory(load: float) -> None:
    clock = Simulated()
    found = scenarios.server(
        constant(clock, 0.005), qps=load / 0.005, seconds=1, queries=200_000, clock=clock
    )
    assert found.latency.p99 == pytest.approx(found.load["md1_p99_ms"], rel=0.05)


def test_a_late_system_does_not_slow_the_arrivals_down() -> None:
    clock = Simulated()
    found = scenarios.server(constant(clock, 0.02), qps=100, seconds=10, clock=clock)
    # It serves 50 a second of 100 that come: the last waits for about as long as all the work.
    assert found.latency.n == pytest.approx(1000, rel=0.15)
    assert max(found.samples) > 7_000 and found.load["md1_p99_ms"] is None


def test_arrivals_are_poisson_and_seeded() -> None:
    moments = scenarios.arrivals(50, seconds=400, queries=None, seed=3)
    gaps = np.diff(moments)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert np.array_equal(moments, scenarios.arrivals(50, seconds=400, queries=None, seed=3))
    assert moments[-1] <= 400


@pytest.mark.parametrize("qps", [0, -3, float("inf"), float("nan")])
def test_a_rate_out_of_range_is_refused(qps: float) -> None:
    clock = Simulated()
    with pytest.raises(InputError, match="--qps"):
        scenarios.server(constant(clock, 0.1), qps=qps, seconds=1, clock=clock)
