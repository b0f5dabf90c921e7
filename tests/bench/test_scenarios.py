"""Open and closed loops on a simulated clock, compared with queueing theory."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from rtresnet.bench import scenarios
from rtresnet.bench.workload import Candidate
from rtresnet.core.errors import InputError
from rtresnet.runtime.batcher import Batcher
from tests.bench.simulated import Simulated, on_gpu


def constant(clock: Simulated, seconds: float) -> Candidate:
    def serve(request: object) -> None:
        clock.time += seconds

    return Candidate(serve=serve, requests=[0])


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.8])
def test_server_p99_equals_theory(load: float) -> None:
    clock = Simulated()
    measured = scenarios.server(
        constant(clock, 0.005), qps=load / 0.005, seconds=1, queries=200_000, clock=clock
    )
    assert measured.latency.p99 == pytest.approx(measured.load.md1_p99_ms, rel=0.05)


def test_server_slow_system_does_not_slow_arrivals() -> None:
    clock = Simulated()
    measured = scenarios.server(constant(clock, 0.02), qps=100, seconds=10, clock=clock)
    # It serves 50 a second of 100 that come: the last waits for about as long as all the work.
    assert measured.latency.n == pytest.approx(1000, rel=0.15)
    assert max(measured.samples) > 7_000 and measured.load.md1_p99_ms is None


def test_server_overloaded_stops_and_counts_unanswered() -> None:
    clock = Simulated()
    begin = clock.now()
    measured = scenarios.server(constant(clock, 0.01), qps=10_000, seconds=2, clock=clock)
    # 20,000 come, 100 a second are served; two seconds of arrivals, two of waiting, one more.
    assert clock.now() - begin < 6
    assert measured.latency.n + measured.load.unanswered == pytest.approx(20_000, rel=0.05)
    assert measured.latency.n < 600
    calm = scenarios.server(constant(clock, 0.01), qps=10, seconds=2, clock=clock)
    assert calm.load.unanswered == 0


def test_arrivals_are_poisson_and_seeded() -> None:
    moments = scenarios.arrivals(50, seconds=400, queries=None, seed=3)
    gaps = np.diff(moments)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert np.array_equal(moments, scenarios.arrivals(50, seconds=400, queries=None, seed=3))
    assert moments[-1] <= 400


@pytest.mark.parametrize("qps", [0, -3, float("inf"), float("nan")])
def test_server_rate_out_of_range_is_refused(qps: float) -> None:
    clock = Simulated()
    with pytest.raises(InputError, match="--qps"):
        scenarios.server(constant(clock, 0.1), qps=qps, seconds=1, clock=clock)


@pytest.mark.parametrize("clients", [1, 2, 7])
def test_closed_clients_wait_for_each_other(clients: int) -> None:
    clock = Simulated()
    measured = scenarios.closed(
        constant(clock, 0.005), concurrency=clients, seconds=4, batch=2, clock=clock
    )
    # Little's law: requests in flight = throughput times latency.
    assert min(measured.samples) == pytest.approx(5 * clients)
    assert max(measured.samples) == pytest.approx(5 * clients)
    assert measured.latency.images_per_second == pytest.approx(400)
    assert 800 <= measured.latency.n <= 801 and measured.load.concurrency == clients


def test_closed_ends_at_queries_or_early_stop() -> None:
    clock = Simulated()
    serve = constant(clock, 0.005)
    assert (
        scenarios.closed(serve, concurrency=3, seconds=9, queries=25, clock=clock).latency.n == 25
    )
    few = scenarios.closed(serve, concurrency=1, seconds=0.001, fewest=100, clock=clock)
    assert few.latency.n == 100
    given_up = scenarios.closed(
        serve,
        concurrency=1,
        seconds=9,
        early_stop=lambda latencies: len(latencies) == 12,
        clock=clock,
    )
    assert given_up.latency.n == 12


def test_batcher_serves_server_and_closed() -> None:
    sizes: list[int] = []

    def session(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return images

    with Batcher(session, 4, 1.0) as batcher:
        candidate = Candidate(
            serve=lambda image: batcher.submit(image).result(), requests=[np.zeros(1)]
        )
        arrived = scenarios.server(
            candidate, qps=2000, seconds=9, queries=60, submit=batcher.submit
        )
        assert arrived.latency.n == 60 and arrived.load.refused == 0
        assert arrived.load.service_ms is None and min(arrived.samples) > 0
        sizes.clear()
        flown = scenarios.closed(
            candidate, concurrency=8, seconds=9, queries=80, submit=batcher.submit
        )
        assert flown.latency.n == 80 and max(sizes) == 4


def test_server_error_behind_a_batcher_is_raised() -> None:
    def session(images: np.ndarray) -> np.ndarray:
        raise RuntimeError("out of memory")

    with Batcher(session, 4, 1.0) as batcher:
        candidate = Candidate(serve=lambda image: None, requests=[np.zeros(1)])
        with pytest.raises(RuntimeError, match="out of memory"):
            scenarios.server(candidate, qps=1000, seconds=9, queries=20, submit=batcher.submit)


def test_server_full_queue_counts_refused_requests() -> None:
    gate = threading.Event()

    def session(images: np.ndarray) -> np.ndarray:
        gate.wait(30)
        return images

    with Batcher(session, 1, 0.0, 2) as batcher:
        sent = 0

        def submit(image: np.ndarray) -> Future[Any]:
            nonlocal sent
            sent += 1
            if sent == 50:
                gate.set()
            return batcher.submit(image)

        candidate = Candidate(serve=lambda image: None, requests=[np.zeros(1)])
        measured = scenarios.server(candidate, qps=2000, seconds=9, queries=50, submit=submit)
    # One or two are being served, two wait.
    assert measured.load.refused + measured.latency.n == 50 and measured.load.refused >= 45


def test_server_timings_are_slow_to_read_queued_latencies_exclude_it() -> None:
    results = []
    for reading in (0.0, 30e-6):
        clock = Simulated()
        candidate = on_gpu(clock, 300e-6, reading)
        results.append(scenarios.server(candidate, qps=2500, seconds=4, clock=clock))
    plain, timed = results
    assert timed.samples == pytest.approx(plain.samples)
    assert timed.wall_seconds == pytest.approx(plain.wall_seconds)
    assert timed.load.service_ms == pytest.approx(0.3)
    assert timed.load.late_ms == pytest.approx(plain.load.late_ms, abs=1e-9)
    assert timed.parts["compute"].n == timed.latency.n


@pytest.mark.parametrize("clients", [1, 4])
def test_closed_timings_are_slow_to_read_throughput_excludes_it(clients: int) -> None:
    clock = Simulated()
    candidate = on_gpu(clock, 300e-6, 30e-6)
    measured = scenarios.closed(candidate, concurrency=clients, seconds=1, clock=clock)
    assert measured.latency.images_per_second == pytest.approx(1 / 300e-6, rel=0.01)
    assert max(measured.samples) == pytest.approx(0.3 * clients)


def test_server_early_stop_is_slow_latencies_exclude_it() -> None:
    clock = Simulated()

    def stop(latencies: list[float]) -> bool:
        clock.time += 0.01
        return False

    measured = scenarios.server(
        on_gpu(clock, 300e-6, 0), qps=100, seconds=1, early_stop=stop, clock=clock
    )
    assert measured.latency.median == pytest.approx(0.3)
