"""Building blocks of a measurement: candidate, requests, clock, warm-up and result.

The scenarios (`scenarios.py`) build on it. It is independent of files: a callable serves requests,
so that every scenario can be tested without an engine.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from rtresnet.bench import stats, verdict
from rtresnet.core.errors import InputError

T = TypeVar("T")
WINDOW_CALLS, WINDOW_SECONDS, STEADY, CAP_SECONDS = 3, 0.05, 0.05, 2.0
SPIN = 0.0003
"""Largest delay of a sleep in seconds. The end of a wait polls the clock instead."""

Timings = dict[str, float]
"""Milliseconds of the parts of one request: h2d, compute, d2h, enqueue."""


class Clock(Protocol):
    """A monotonic clock in seconds; tests replace it."""

    def now(self) -> float:
        """Return the time in seconds since an arbitrary moment."""
        ...

    def sleep_until(self, moment: float, *, exactly: bool) -> None:
        """Wait until `moment`; return at once if it has passed.

        Args:
            moment: Time in the units of `now`.
            exactly: Whether the end of the wait may be spent polling the clock.
        """
        ...


class WallClock:
    """The machine's clock."""

    def now(self) -> float:
        """Return the time in seconds since an arbitrary moment."""
        return time.perf_counter()

    def sleep_until(self, moment: float, *, exactly: bool) -> None:
        """Wait until `moment`, a tenth of a millisecond longer if not `exactly`."""
        left = moment - time.perf_counter() - (SPIN if exactly else 0)
        if left > 0:
            time.sleep(left)
        while time.perf_counter() < moment:
            pass


class PausableClock:
    """A clock that stops while the benchmark does its own work.

    Everything scheduled by it is postponed by the stopped time, so neither latencies nor
    wall time include that work, even where requests queue.

    Args:
        clock: The underlying clock.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock, self._stopped = clock, 0.0

    def now(self) -> float:
        """Return the time in seconds since some moment, without the time spent in `exclude`."""
        return self._clock.now() - self._stopped

    def sleep_until(self, moment: float, *, exactly: bool) -> None:
        """Wait until `moment` on the clock of `now`. See `Clock.sleep_until`."""
        self._clock.sleep_until(moment + self._stopped, exactly=exactly)

    def exclude(self, work: Callable[[], T]) -> T:
        """Call a function while the clock is stopped, and return its result."""
        before = self._clock.now()
        result = work()
        self._stopped += self._clock.now() - before
        return result


class Pipeline(Protocol):
    """Batches in flight: `runtime.trt.Pipeline`.

    Attributes:
        depth: The largest number of batches in flight.
    """

    depth: int

    def put(self, request: Any) -> None:
        """Enqueue a request."""
        ...

    def get(self) -> object:
        """Wait for the oldest request."""
        ...

    def timings(self) -> Timings:
        """Return the timings of the request that `get` returned last."""
        ...


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A callable to measure, with the requests it is called with.

    Attributes:
        serve: Takes a request and returns when the result is available; usually a `Session`.
        requests: Prepared before the clock starts; served cyclically.
        timings: Timings of the last request; empty if only wall time is known.
        pipeline: Keeps requests in flight, instead of `serve`; None serves them sequentially.
    """

    serve: Callable[[Any], object]
    requests: Sequence[Any]
    timings: Callable[[], Timings] = dict
    pipeline: Callable[[], AbstractContextManager[Pipeline]] | None = None

    @contextlib.contextmanager
    def serving(self) -> Iterator[tuple[Callable[[Any], object], Callable[[], Timings]]]:
        """Yield a function that serves the next request, and one that reads its timings.

        With a pipeline, each call enqueues a request and waits for the oldest: all but one are
        then in flight. Requests that remain at the end are dropped.
        """
        if self.pipeline is None:
            yield self.serve, self.timings
            return
        with self.pipeline() as pipeline:
            for _ in range(pipeline.depth - 1):
                pipeline.put(self.requests[0])

            def serve(request: Any) -> None:
                pipeline.put(request)
                pipeline.get()

            yield serve, pipeline.timings


@dataclass(frozen=True, kw_only=True)
class WarmupResult:
    """Result of a warm-up.

    Attributes:
        steady: Whether latencies became steady before the time limit.
        seconds: Latency of a request at its end.
    """

    steady: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LoadFacts:
    """The offered load, and figures that only one scenario measures; None if not applicable.

    Attributes:
        qps: Arrivals per second, on average.
        concurrency: Number of clients, each with one request in flight.
        max_batch: Largest batch formed of single requests.
        max_wait_ms: How long a request waits for others to share its batch; None without batches.
        in_flight: Batches in flight in a pipeline.
        late_ms: p99 of how late requests were sent.
        refused: Requests that a full queue rejected.
        unanswered: Requests that had arrived but were not served when the run was stopped.
        service_ms: Median time of serving one request, without waiting.
        md1_p99_ms: p99 from queueing theory (M/D/1) at this rate and service time.
    """

    qps: float | None = None
    concurrency: int | None = None
    max_batch: int | None = None
    max_wait_ms: float | None = None
    in_flight: int | None = None
    late_ms: float | None = None
    refused: int | None = None
    unanswered: int | None = None
    service_ms: float | None = None
    md1_p99_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One artifact under one load.

    Attributes:
        batch: Images per request.
        latency: The summary.
        speed: Speed relative to the first artifact of the same call; above 1 is faster.
        comparison: The comparison behind `speed`; None for the first.
        steady: Whether latencies became steady during warm-up.
        wall_seconds: Time spent on the samples, without reading timings back.
        parts: Summaries of h2d, compute, d2h and enqueue on a GPU.
        load: The load.
        trtexec: The same samples in trtexec's format.
        samples: Milliseconds of each request, in order of time.
    """

    batch: int
    latency: stats.Latency
    speed: float
    comparison: verdict.Comparison | None = None
    steady: bool
    wall_seconds: float
    parts: dict[str, stats.Latency] = field(default_factory=dict)
    load: LoadFacts = LoadFacts()
    trtexec: str | None = None
    samples: tuple[float, ...]


def check(*, batch: int = 1, seconds: float, queries: int | None) -> None:
    """Raise InputError if a number is out of range."""
    if batch < 1:
        raise InputError(f"--batch {batch}: a batch has at least one image")
    if not 0 < seconds < float("inf"):
        raise InputError(f"--seconds {seconds:g}: must be above 0")
    if queries is not None and queries < 1:
        raise InputError(f"--queries {queries}: must be at least 1")


def measurement(
    samples: np.ndarray,
    wall: float,
    parts: Sequence[Mapping[str, float]],
    batch: int,
    steady: bool,
    *,
    open_loop: bool = False,
    load: LoadFacts = LoadFacts(),
) -> Measurement:
    """Summarize samples in milliseconds, and the seconds they took.

    Args:
        samples: One per request, in order of time.
        wall: Seconds.
        parts: Timings of the requests; ignored if a request has none.
        batch: Images per request.
        steady: Whether latencies became steady during warm-up.
        open_loop: See `stats.summarize`.
        load: The load.
    """
    # A request that was split into several batches has no timings.
    names = set.intersection(*map(set, parts)) if len(parts) == len(samples) else set()
    by_name = {name: np.asarray([part[name] for part in parts]) for name in sorted(names)}
    return Measurement(
        batch=batch,
        latency=stats.summarize(samples, batch=batch, wall_seconds=wall, open_loop=open_loop),
        speed=1.0,
        steady=steady,
        wall_seconds=wall,
        parts={
            name: stats.summarize(values, batch=batch, wall_seconds=None)
            for name, values in by_name.items()
        },
        load=load,
        trtexec=stats.trtexec(samples, wall_seconds=wall, parts=by_name),
        samples=tuple(round(float(sample), 6) for sample in samples),
    )


def warm_up(candidate: Candidate, clock: Clock) -> WarmupResult:
    """Serve until the medians of three windows agree within 5 %, or for two seconds.

    A window is three requests, or 50 ms of them if they are short.
    """
    medians: list[float] = []
    requests = candidate.requests
    with candidate.serving() as (serve, _):
        begin, served = clock.now(), 0
        while True:
            window: list[float] = []
            start = clock.now()
            while len(window) < WINDOW_CALLS or clock.now() - start < WINDOW_SECONDS:
                before = clock.now()
                serve(requests[served % len(requests)])
                window.append(clock.now() - before)
                served += 1
            medians.append(float(np.median(window)))
            last = medians[-3:]
            steady = len(last) == 3 and max(last) <= min(last) * (1 + STEADY)
            if steady or clock.now() - begin > CAP_SECONDS:
                return WarmupResult(steady=steady, seconds=medians[-1])
