"""One request after another, timed from outside: single-stream, multi-stream and offline.

Several artifacts are measured in turn, a short slice of the time each, in an order drawn anew for
every round, so that whatever else the machine does meets all of them; their speeds are compared
slice by slice. Input is made before the clock starts. Warm-up ends when three windows in a row
agree within 5 %, or at its cap, and the result says which.

Every request in a slice is a sample. Where requests are short, one more comes before each slice and
is not counted: it finds the caches as the other artifact left them.

A candidate with a pipeline (a plan, offline) has batches in flight, as trtexec has: while one is
computed the next one is enqueued. A sample is then the time from one finished batch to the next.

Requests that arrive by themselves are in `scenarios.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rtresnet.bench import compare, stats
from rtresnet.bench.clock import Clock, WallClock
from rtresnet.core.errors import InputError

WINDOW_CALLS, WINDOW_SECONDS, STEADY, CAP_SECONDS = 3, 0.05, 0.05, 2.0
FEWEST_ROUNDS, SLICE_SECONDS, LONG = 15, 0.05, 0.1

Part = dict[str, float]


class Pipeline(Protocol):
    """Batches in flight: `runtime.trt.Pipeline`.

    Attributes:
        depth: The most that may be in flight.
    """

    depth: int

    def put(self, request: Any) -> None:
        """Enqueues a request."""
        ...

    def get(self) -> object:
        """Waits for the oldest request."""
        ...

    def timings(self) -> Part:
        """Milliseconds of the parts of the request that `get` returned last."""
        ...


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is measured.

    Attributes:
        serve: Takes a request and returns when the result is there.
        requests: Made beforehand, served in turn, over and over.
        timings: Milliseconds of the parts of the last request: h2d, compute, d2h, enqueue; empty
            where only wall time is known.
        pipeline: Keeps requests in flight, in place of `serve`; None: one after another.
    """

    serve: Callable[[Any], object]
    requests: Sequence[Any]
    timings: Callable[[], Part] = dict
    pipeline: Callable[[], AbstractContextManager[Pipeline]] | None = None


@dataclass(frozen=True, kw_only=True)
class WarmupResult:
    """How a warm-up ended.

    Attributes:
        steady: Whether by itself, and not at the cap.
        seconds: A request at its end.
    """

    steady: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One artifact under one load.

    Attributes:
        batch: Images a request.
        latency: The summary.
        speed: Times as fast as the first artifact of the same call.
        comparison: What that rests on; None for the first.
        steady: Whether warm-up ended by itself.
        wall_seconds: Seconds spent on the samples, without those for reading timings back.
        parts: Summaries of h2d, compute, d2h, enqueue on a GPU.
        load: What the scenario has to say of itself: qps, concurrency, ...
        trtexec: What trtexec would have printed.
        samples: Milliseconds, one a request, in order of time.
    """

    batch: int
    latency: stats.Latency
    speed: float
    comparison: compare.Comparison | None = None
    steady: bool
    wall_seconds: float
    parts: dict[str, stats.Latency] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    trtexec: str | None = None
    samples: tuple[float, ...]


@dataclass(kw_only=True)
class _Taken:
    """What one candidate has shown so far; slices in order of time."""

    slices: list[list[float]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    wall: float = 0.0
    served: int = 0

    @property
    def count(self) -> int:
        return sum(map(len, self.slices))


def measure(
    candidates: Sequence[Candidate],
    *,
    batch: int,
    seconds: float,
    queries: int | None = None,
    seed: int = 0,
    clock: Clock | None = None,
    on_progress: Callable[[float], None] = lambda elapsed: None,
) -> list[Measurement]:
    """Times every candidate, in turn.

    Args:
        candidates: What to time.
        batch: Images a request.
        seconds: Spent on each candidate after warm-up, on average; 15 slices are made at least.
        queries: So many requests to each candidate, instead of `seconds`.
        seed: Of the order.
        clock: For tests.
        on_progress: Called between slices with the seconds spent on measuring, all candidates
            together.

    Raises:
        InputError: Batch, seconds or queries out of range.
    """
    check(batch=batch, seconds=seconds, queries=queries)
    clock = clock or WallClock()
    rng = np.random.default_rng(seed)
    warm = [warm_up(candidate, clock) for candidate in candidates]
    taken = [_Taken() for _ in candidates]
    length = SLICE_SECONDS if queries else min(SLICE_SECONDS, seconds / FEWEST_ROUNDS)

    most = -(-queries // FEWEST_ROUNDS) if queries else None

    def done() -> bool:
        if queries:
            return all(entry.count >= queries for entry in taken)
        rounds, spent = len(taken[0].slices), sum(entry.wall for entry in taken)
        return rounds >= FEWEST_ROUNDS and spent >= seconds * len(taken)

    while not done():
        for index in rng.permutation(len(candidates)):
            limit = min(most, queries - taken[index].count) if queries and most else None
            _slice(candidates[index], taken[index], warm[index].seconds, length, limit, clock)
            on_progress(sum(entry.wall for entry in taken))
    results = [
        result(np.concatenate(entry.slices), entry.wall, entry.parts, batch, start.steady)
        for entry, start in zip(taken, warm, strict=True)
    ]
    medians = [[float(np.median(part)) for part in entry.slices] for entry in taken]
    compared = [compare.paired(medians[0], other, comparisons=len(taken) - 1) for other in medians]
    return [results[0]] + [
        dataclasses.replace(entry, speed=found.speed, comparison=found)
        for entry, found in zip(results[1:], compared[1:], strict=True)
    ]


def check(*, batch: int, seconds: float, queries: int | None) -> None:
    """Raises InputError where a load could not be made."""
    if batch < 1:
        raise InputError(f"--batch {batch}: a batch holds at least one image")
    if not 0 < seconds < float("inf"):
        raise InputError(f"--seconds {seconds:g}: must be above 0")
    if queries is not None and queries < 1:
        raise InputError(f"--queries {queries}: must be at least 1")


def _slice(
    candidate: Candidate,
    taken: _Taken,
    expected: float,
    length: float,
    limit: int | None,
    clock: Clock,
) -> None:
    """Serves for `length` seconds: at least three requests where they are short, at most `limit`.

    Only the requests count: reading timings back from a GPU that is idle meanwhile is part of no
    latency and not of the wall time.
    """
    if limit == 0:
        return
    fewest = 3 if expected < LONG else 1
    requests = candidate.requests
    with _serving(candidate) as (serve, timings):
        if expected < LONG:
            serve(requests[taken.served % len(requests)])
        samples: list[float] = []
        wall = 0.0
        before = clock.now()
        while wall < length or len(samples) < fewest:
            serve(requests[taken.served % len(requests)])
            after = clock.now()
            spent = after - before
            wall += spent
            samples.append(spent * 1e3)
            taken.served += 1
            if parts := timings():
                taken.parts.append(parts)
            if len(samples) == limit:
                break
            # What is in flight goes on while timings are read: that time is the device's as well.
            before = after if candidate.pipeline else clock.now()
    taken.slices.append(samples)
    taken.wall += wall


@contextlib.contextmanager
def _serving(
    candidate: Candidate,
) -> Iterator[tuple[Callable[[Any], object], Callable[[], Part]]]:
    """What serves the next request, and reads the timings of the last one.

    With a pipeline, each call enqueues a request and waits for the oldest: all but one are then in
    flight. What is left at the end is dropped.
    """
    if candidate.pipeline is None:
        yield candidate.serve, candidate.timings
        return
    with candidate.pipeline() as pipeline:
        for _ in range(pipeline.depth - 1):
            pipeline.put(candidate.requests[0])

        def serve(request: Any) -> None:
            pipeline.put(request)
            pipeline.get()

        yield serve, pipeline.timings


def result(
    samples: np.ndarray,
    wall: float,
    parts: Sequence[Mapping[str, float]],
    batch: int,
    steady: bool,
    *,
    open_loop: bool = False,
) -> Measurement:
    """Samples in milliseconds, and the seconds they took, as a measurement."""
    # A request that was split has no parts of its own.
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
        trtexec=stats.trtexec(samples, wall_seconds=wall, parts=by_name),
        samples=tuple(round(float(sample), 6) for sample in samples),
    )


def warm_up(candidate: Candidate, clock: Clock) -> WarmupResult:
    """Serves until three windows have medians within 5 %, or for two seconds.

    A window is three requests, and 50 ms of them where they are short.
    """
    with _serving(candidate) as (serve, _):
        return _until_steady(serve, candidate.requests, clock)


def _until_steady(
    serve: Callable[[Any], object], requests: Sequence[Any], clock: Clock
) -> WarmupResult:
    medians: list[float] = []
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
