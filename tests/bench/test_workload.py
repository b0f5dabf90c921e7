"""Workloads on a simulated clock, where every figure is exact."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from rtresnet.bench import workload
from rtresnet.bench.scenarios import measure
from rtresnet.bench.workload import Candidate, warm_up
from rtresnet.core.errors import InputError
from tests.bench.simulated import Simulated, on_gpu


def takes(
    clock: Simulated, *seconds: float, calls: list[str] | None = None, name: str = ""
) -> Candidate:
    """Serve in these times, repeatedly."""
    served = 0

    def serve(request: object) -> None:
        nonlocal served
        clock.time += seconds[served % len(seconds)]
        served += 1
        if calls is not None:
            calls.append(name)

    return Candidate(serve=serve, requests=["images"])


def test_measure_real_clock_latency_is_at_least_the_service_time() -> None:
    """benchmarks/bench_honesty.py holds how close they come; here, that seconds are seconds."""

    def serve(request: object) -> None:
        end = time.perf_counter() + 0.002
        while time.perf_counter() < end:
            pass

    (measured,) = measure([Candidate(serve=serve, requests=[0])], batch=4, seconds=0.5)
    assert min(measured.samples) >= 2.0 and measured.latency.median < 200
    assert 0.5 <= measured.wall_seconds < 30
    assert measured.latency.images_per_second is not None
    assert 4 / 0.2 < measured.latency.images_per_second <= 4 / 0.002


def test_measure_constant_service_gives_its_latency_and_throughput() -> None:
    clock = Simulated()
    (measured,) = measure([takes(clock, 0.002)], batch=4, seconds=2, clock=clock)
    assert measured.latency.median == pytest.approx(2) and measured.latency.p99 == pytest.approx(2)
    assert measured.latency.images_per_second == pytest.approx(2000)
    assert measured.latency.n == len(measured.samples) >= 900
    assert measured.batch == 4 and measured.steady and measured.speed == 1


def test_measure_three_candidates_gives_speed_and_verdict() -> None:
    clock = Simulated()
    first, slower, faster = measure(
        [takes(clock, 0.004), takes(clock, 0.008), takes(clock, 0.002)],
        batch=1, seconds=1, clock=clock,
    )  # fmt: skip
    assert first.comparison is None
    assert (slower.speed, faster.speed) == (pytest.approx(0.5), pytest.approx(2))
    assert slower.comparison and slower.comparison.verdict == "slower"
    assert faster.comparison and faster.comparison.verdict == "faster"


def test_measure_same_candidate_twice_under_noise_shows_no_difference() -> None:
    for seed in range(20):
        clock, rng = Simulated(), np.random.default_rng(seed)
        # Each has its own noise of 10 %, in stretches: neighbours are alike.
        noise = [np.repeat(0.003 * (1 + 0.1 * rng.random(40)), 25) for _ in range(2)]
        _, again = measure(
            [takes(clock, *part) for part in noise], batch=1, seconds=3, seed=seed, clock=clock
        )
        assert again.comparison and again.comparison.verdict == "no difference shown", seed


def test_measure_slowdown_of_5_percent_under_noise_is_slower() -> None:
    for seed in range(20):
        clock, rng = Simulated(), np.random.default_rng(seed)
        noise = [np.repeat(0.003 * (1 + 0.1 * rng.random(40)), 25) for _ in range(2)]
        _, slow = measure(
            [takes(clock, *noise[0]), takes(clock, *(1.05 * noise[1]))],
            batch=1, seconds=20, seed=seed, clock=clock,
        )  # fmt: skip
        assert slow.comparison and slow.comparison.verdict == "slower", seed


def test_measure_order_of_each_round_is_random_and_seeded() -> None:
    def order(seed: int) -> str:
        clock, calls = Simulated(), list[str]()
        candidates = [takes(clock, 0.2, calls=calls, name=n) for n in "abc"]
        measure(candidates, batch=1, seconds=3, seed=seed, clock=clock)
        return "".join(calls)[-45:]

    assert order(1) == order(1) != order(2)
    rounds = [order(1)[start : start + 3] for start in range(0, 45, 3)]
    assert all(sorted(part) == ["a", "b", "c"] for part in rounds) and len(set(rounds)) > 1


def test_measure_warms_up_all_candidates_first() -> None:
    clock, calls = Simulated(), list[str]()
    candidates = [takes(clock, 0.02, calls=calls, name=n) for n in "ab"]
    measured = measure(candidates, batch=1, seconds=0.5, clock=clock)
    counted = sum(len(entry.samples) for entry in measured)
    uncounted = sum(len(measured) for _ in range(15))  # one before each slice
    warming = calls[: len(calls) - counted - uncounted]
    assert warming == sorted(warming) and min(map(warming.count, "ab")) >= 9


def test_measure_queries_gives_that_many_samples() -> None:
    clock = Simulated()
    for entry in measure(
        [takes(clock, 0.001), takes(clock, 0.001)], batch=1, seconds=1, queries=100, clock=clock
    ):
        assert entry.latency.n == 100


def test_measure_progress_grows_over_all_candidates() -> None:
    clock, output = Simulated(), list[float]()
    measure(
        [takes(clock, 0.01), takes(clock, 0.01)],
        batch=1,
        seconds=1,
        clock=clock,
        on_progress=output.append,
    )
    assert output == sorted(output) and output[0] > 0 and output[-1] >= 2


@pytest.mark.parametrize("batch", [0, -1])
def test_measure_batch_below_1_is_refused(batch: int) -> None:
    with pytest.raises(InputError, match="--batch"):
        measure([takes(Simulated(), 0.1)], batch=batch, seconds=1)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_measure_seconds_out_of_range_are_refused(seconds: float) -> None:
    with pytest.raises(InputError, match="--seconds"):
        measure([takes(Simulated(), 0.1)], batch=1, seconds=seconds)


def test_warm_up_constant_service_is_steady_after_three_windows() -> None:
    clock, calls = Simulated(), list[str]()
    warm = warm_up(takes(clock, 0.03, calls=calls), clock)
    assert warm.steady and warm.seconds == pytest.approx(0.03) and len(calls) == 9


def test_warm_up_erratic_service_ends_at_the_time_limit() -> None:
    clock = Simulated()
    erratic = takes(clock, *([0.03] * 3 + [0.06] * 3 + [0.09] * 3))
    assert not warm_up(erratic, clock).steady
    assert workload.CAP_SECONDS <= clock.time < workload.CAP_SECONDS + 0.3
    (measured,) = measure([erratic], batch=1, seconds=1, clock=clock)
    assert not measured.steady


def test_measure_error_of_a_candidate_is_raised() -> None:
    def breaks(request: object) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure([Candidate(serve=breaks, requests=[0])], batch=1, seconds=0.1)


def test_measure_timings_of_every_request_are_summarized() -> None:
    clock = Simulated()
    plain = takes(clock, 0.01)
    parts: Callable[[], dict[str, float]] = lambda: {"h2d": 1.0, "compute": 7.0, "d2h": 1.0}  # noqa: E731
    candidate = Candidate(serve=plain.serve, requests=plain.requests, timings=parts)
    (measured,) = measure([candidate], batch=1, seconds=1, clock=clock)
    assert measured.parts["compute"].median == 7 and set(measured.parts) == {
        "h2d",
        "compute",
        "d2h",
    }
    assert measured.trtexec and "Throughput: 100" in measured.trtexec


def test_measure_timings_are_slow_to_read_throughput_excludes_it() -> None:
    clock = Simulated()
    (measured,) = measure([on_gpu(clock, 300e-6, 30e-6)], batch=1, seconds=1, clock=clock)
    assert measured.latency.images_per_second == pytest.approx(1 / 300e-6, rel=0.01)
    assert measured.latency.median == pytest.approx(0.3)
    assert measured.wall_seconds == pytest.approx(300e-6 * len(measured.samples))
    assert measured.parts["compute"].n == len(measured.samples)


class InFlight:
    """A device of `service` seconds a batch that works while the host does something else."""

    def __init__(self, clock: Simulated, service: float, reading: float) -> None:
        self.clock, self.service, self.reading = clock, service, reading
        self.depth, self.most, self.opened = 2, 0, 0
        self.ends: list[float] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[InFlight]:
        self.opened += 1
        yield self
        self.ends.clear()

    def put(self, request: object) -> None:
        begin = max([self.clock.time, *self.ends])
        self.ends.append(begin + self.service)
        self.most = max(self.most, len(self.ends))

    def get(self) -> None:
        self.clock.time = max(self.clock.time, self.ends.pop(0))

    def timings(self) -> dict[str, float]:
        self.clock.time += self.reading
        return {"compute": 1e3 * self.service}


def test_measure_batches_in_flight_rate_is_the_devices() -> None:
    """Reading timings delays no batch, and saves none either: the device works meanwhile."""
    clock = Simulated()
    device = InFlight(clock, 300e-6, 30e-6)
    candidate = Candidate(serve=lambda request: None, requests=["images"], pipeline=device)
    (measured,) = measure([candidate], batch=8, seconds=1, clock=clock)
    assert device.most == 2 and device.opened > 15 and not device.ends
    assert measured.latency.images_per_second == pytest.approx(8 / 300e-6, rel=0.01)
    assert measured.latency.median == pytest.approx(0.3)
    assert measured.wall_seconds == pytest.approx(sum(measured.samples) / 1e3, rel=1e-3)
    assert measured.parts["compute"].n == len(measured.samples)


def test_measure_batches_in_flight_queries_are_counted() -> None:
    clock = Simulated()
    device = InFlight(clock, 300e-6, 0)
    candidate = Candidate(serve=lambda request: None, requests=["images"], pipeline=device)
    (measured,) = measure([candidate], batch=8, seconds=1, queries=100, clock=clock)
    assert measured.latency.n == 100 and not device.ends
