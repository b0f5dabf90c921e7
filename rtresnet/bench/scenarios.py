"""MLPerf's scenarios: single-stream, multi-stream and offline; server; and a closed loop.

`measure` serves one request after another. Several artifacts are measured in alternating short
slices, in an order drawn for every round, so that other load on the machine affects all of
them; speeds are compared slice by slice. Every request in a slice is a sample. Where requests are
short, one uncounted request is served before each slice, because the caches still hold data of the
other artifact. A candidate with a pipeline (a plan, offline) has batches in flight, as in
trtexec: the next batch is enqueued while one is computed, and a sample is the time from one
finished batch to the next.

`server` is an open loop: arrivals are a Poisson process drawn beforehand, a slow system does not
slow them down, and a latency counts from the scheduled arrival of a request, whether or
not the system was idle. `closed` keeps a number of requests in flight.

Without a batcher the measuring thread serves requests one at a time, in the order of arrival:
waiting is then computed from the clock, and no other thread disturbs the measurement. The clock
stops while timings are read back and `early_stop` is called, so neither delays a request. With a
batcher, requests go through `submit`, the batcher's threads serve them, and the timings of single
requests are not read.
"""

from __future__ import annotations

import dataclasses
import queue
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rtresnet.bench import stats, verdict, workload
from rtresnet.bench.workload import (
    Candidate,
    Clock,
    LoadFacts,
    Measurement,
    PausableClock,
    Timings,
    WallClock,
)
from rtresnet.core.errors import InputError, QueueFullError

FEWEST_ROUNDS, SLICE_SECONDS, LONG = 15, 0.05, 0.1
PATIENCE = 1.0  # additional seconds, for a few arrivals at the pace of a slow net

Submit = Callable[[Any], "Future[Any]"]
EarlyStop = Callable[[list[float]], bool]
"""Takes the latencies so far, in ms, and returns whether the run can be stopped."""


@dataclass(kw_only=True)
class _Slices:
    """Samples of one candidate so far, in order of time."""

    slices: list[list[float]] = field(default_factory=list)
    parts: list[Timings] = field(default_factory=list)
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
    """Serve one request after another, the candidates in alternating slices.

    Args:
        candidates: Candidates to measure.
        batch: Images per request.
        seconds: Spent on each candidate after warm-up, on average, in at least 15 slices.
        queries: Number of requests to each candidate, instead of `seconds`.
        seed: Random seed of the order.
        clock: Replaces the wall clock in tests.
        on_progress: Called between slices with the seconds spent on measuring, all candidates
            together.

    Raises:
        InputError: Batch, seconds or queries out of range.
    """
    workload.check(batch=batch, seconds=seconds, queries=queries)
    clock = clock or WallClock()
    rng = np.random.default_rng(seed)
    warm = [workload.warm_up(candidate, clock) for candidate in candidates]
    recorded = [_Slices() for _ in candidates]
    length = SLICE_SECONDS if queries else min(SLICE_SECONDS, seconds / FEWEST_ROUNDS)
    most = -(-queries // FEWEST_ROUNDS) if queries else None

    def done() -> bool:
        if queries:
            return all(entry.count >= queries for entry in recorded)
        rounds, spent = len(recorded[0].slices), sum(entry.wall for entry in recorded)
        return rounds >= FEWEST_ROUNDS and spent >= seconds * len(recorded)

    while not done():
        for index in rng.permutation(len(candidates)):
            limit = min(most, queries - recorded[index].count) if queries and most else None
            _slice(candidates[index], recorded[index], warm[index].seconds, length, limit, clock)
            on_progress(sum(entry.wall for entry in recorded))
    return _paired(recorded, [result.steady for result in warm], batch)


def _paired(recorded: Sequence[_Slices], steady: Sequence[bool], batch: int) -> list[Measurement]:
    """Return the measurements of all candidates, each compared with the first slice by slice."""
    results = [
        workload.measurement(
            np.concatenate(entry.slices), entry.wall, entry.parts, batch, is_steady
        )
        for entry, is_steady in zip(recorded, steady, strict=True)
    ]
    medians = [[float(np.median(part)) for part in entry.slices] for entry in recorded]
    compared = [
        verdict.paired(medians[0], other, comparisons=len(recorded) - 1) for other in medians
    ]
    return [results[0]] + [
        dataclasses.replace(entry, speed=comparison.speed, comparison=comparison)
        for entry, comparison in zip(results[1:], compared[1:], strict=True)
    ]


def _slice(
    candidate: Candidate,
    recorded: _Slices,
    expected: float,
    length: float,
    limit: int | None,
    clock: Clock,
) -> None:
    """Serve for `length` seconds: at least three requests if they are short, at most `limit`.

    Only the requests count: reading timings back from an idle GPU is not part of any
    latency or of the wall time.
    """
    if limit == 0:
        return
    fewest = 3 if expected < LONG else 1
    requests = candidate.requests
    with candidate.serving() as (serve, timings):
        if expected < LONG:
            serve(requests[recorded.served % len(requests)])
        samples: list[float] = []
        wall = 0.0
        before = clock.now()
        while wall < length or len(samples) < fewest:
            serve(requests[recorded.served % len(requests)])
            after = clock.now()
            spent = after - before
            wall += spent
            samples.append(spent * 1e3)
            recorded.served += 1
            if parts := timings():
                recorded.parts.append(parts)
            if len(samples) == limit:
                break
            # Batches in flight continue while timings are read, so that time counts as well.
            before = after if candidate.pipeline else clock.now()
    recorded.slices.append(samples)
    recorded.wall += wall


def compared(measured: Sequence[Measurement], scenario: str) -> list[Measurement]:
    """Return the measurements, each compared with the first, for runs in sequence."""
    first, *others = measured
    result = [first]
    for other in others:
        comparison = verdict.compare_unpaired(
            first.samples, other.samples, figure=verdict.FIGURES[scenario],
            comparisons=len(others),
        )  # fmt: skip
        medians = first.latency.median / other.latency.median
        speed = comparison.speed if comparison else medians
        result.append(dataclasses.replace(other, speed=speed, comparison=comparison))
    return result


def server(
    candidate: Candidate,
    *,
    qps: float,
    seconds: float,
    queries: int | None = None,
    seed: int = 0,
    submit: Submit | None = None,
    early_stop: EarlyStop = lambda latencies: False,
    clock: Clock | None = None,
) -> Measurement:
    """Serve Poisson arrivals, one image per request; `batch` of the result is 1.

    A system that cannot keep up would never finish: the run is stopped when the last arrival has
    waited as long as the whole arrival period, and `unanswered` counts the remaining requests.

    Args:
        candidate: Candidate to measure.
        qps: Arrivals per second, on average.
        seconds: Time in which requests arrive.
        queries: Number of arrivals, instead of `seconds`.
        seed: Random seed of the arrivals.
        submit: A batcher's `submit`, used instead of `candidate.serve`.
        early_stop: Ends a run whose outcome is certain.
        clock: Replaces the wall clock in tests; not with `submit`.

    Raises:
        InputError: A rate, a time or a number out of range.
    """
    workload.check(seconds=seconds, queries=queries)
    if not 0 < qps < float("inf"):
        raise InputError(f"--qps {qps:g}: must be above 0")
    clock = PausableClock(clock or WallClock())
    moments = arrivals(qps, seconds=seconds, queries=queries, seed=seed)
    warm = workload.warm_up(candidate, clock)
    moments += clock.now() + 0.01
    if submit is None:
        run = _serve_arrivals(candidate, clock, moments, early_stop)
    else:
        run = _submit_arrivals(candidate, clock, moments, submit, early_stop)
    if not run.latencies.size:
        raise InputError(f"--qps {qps:g}: the batcher rejected every request")
    service = float(np.median(run.service)) if run.service.size else None
    theory = None
    if service is not None and qps * service / 1e3 < 1:
        theory = 1e3 * stats.md1_latency_quantile(0.99, rate=qps, service=service / 1e3)
    load = LoadFacts(
        qps=qps,
        late_ms=stats.percentile(run.late, 0.99) if run.late.size else None,
        refused=run.refused,
        unanswered=run.unanswered,
        service_ms=service,
        md1_p99_ms=theory,
    )
    return workload.measurement(
        run.latencies, run.wall, run.parts, 1, warm.steady, open_loop=True, load=load
    )


def arrivals(qps: float, *, seconds: float, queries: int | None, seed: int) -> np.ndarray:
    """Draw arrival times (s) of a Poisson process: within `seconds`, or `queries` of them."""
    rng = np.random.default_rng(seed)
    count = queries or int(qps * seconds + 6 * np.sqrt(qps * seconds) + 10)
    moments = np.cumsum(rng.exponential(1 / qps, count))
    return moments if queries else moments[: max(1, int(np.searchsorted(moments, seconds)))]


@dataclass(kw_only=True)
class _Arrivals:
    """Milliseconds of latency, of lateness in sending, and of service if it is known."""

    latencies: np.ndarray
    wall: float
    late: np.ndarray = field(default_factory=lambda: np.empty(0))
    service: np.ndarray = field(default_factory=lambda: np.empty(0))
    parts: list[Timings] = field(default_factory=list)
    refused: int = 0
    unanswered: int = 0


def _serve_arrivals(
    candidate: Candidate, clock: PausableClock, moments: np.ndarray, early_stop: EarlyStop
) -> _Arrivals:
    latencies: list[float] = []
    late: list[float] = []
    service: list[float] = []
    parts: list[Timings] = []
    unanswered = 0
    requests, serve = candidate.requests, candidate.serve
    free = after = 0.0

    def after_request() -> bool:
        if timings := candidate.timings():
            parts.append(timings)
        return early_stop(latencies)

    end = float(2 * moments[-1] - moments[0]) + PATIENCE
    for number, moment in enumerate(moments.tolist()):
        clock.sleep_until(moment, exactly=True)
        before = clock.now()
        serve(requests[number % len(requests)])
        after = clock.now()
        latencies.append((after - moment) * 1e3)
        service.append((after - before) * 1e3)
        late.append((before - max(moment, free)) * 1e3)
        free = after
        if clock.exclude(after_request):
            break
        if after > end:
            unanswered = len(moments) - len(latencies)
            break
    return _Arrivals(
        latencies=np.asarray(latencies),
        wall=after - float(moments[0]),
        late=np.asarray(late),
        service=np.asarray(service),
        parts=parts,
        unanswered=unanswered,
    )


def _submit_arrivals(
    candidate: Candidate,
    clock: Clock,
    moments: np.ndarray,
    submit: Submit,
    early_stop: EarlyStop,
) -> _Arrivals:
    answers: queue.SimpleQueue[tuple[int, float, Future[Any]]] = queue.SimpleQueue()
    latencies: dict[int, float] = {}
    in_order: list[float] = []  # the same latencies, as their answers came
    late: list[float] = []
    sent = refused = 0
    last = 0.0

    def take() -> None:
        nonlocal last
        number, after, future = answers.get()
        future.result()  # raises the session's exception
        latencies[number] = (after - float(moments[number])) * 1e3
        in_order.append(latencies[number])
        last = max(last, after)

    def answered(number: int) -> Callable[[Future[Any]], None]:
        return lambda future: answers.put((number, clock.now(), future))

    for number, moment in enumerate(moments.tolist()):
        # Polling the clock for an exact start would take processor time from the measured system.
        clock.sleep_until(moment, exactly=False)
        late.append((clock.now() - moment) * 1e3)
        try:
            future = submit(candidate.requests[number % len(candidate.requests)])
        except QueueFullError:
            refused += 1
            continue
        sent += 1
        future.add_done_callback(answered(number))
        while not answers.empty():
            take()
        if early_stop(in_order):
            break
    while len(latencies) < sent:
        take()
    return _Arrivals(
        latencies=np.asarray([latencies[number] for number in sorted(latencies)]),
        wall=last - float(moments[0]),
        late=np.asarray(late),
        refused=refused,
    )


class _Clients:
    """Requests in flight; `answer` returns them in the order of their responses."""

    def __init__(self, candidate: Candidate, submit: Submit | None, clock: Clock) -> None:
        self._candidate, self._submit, self._clock = candidate, submit, clock
        self._answers: queue.SimpleQueue[tuple[float, float, Future[Any]]] = queue.SimpleQueue()
        self._waiting: deque[float] = deque()
        self._sent = 0

    def send(self) -> None:
        """Send the next request."""
        clock, requests = self._clock, self._candidate.requests
        request, moment = requests[self._sent % len(requests)], clock.now()
        self._sent += 1
        if self._submit is None:
            self._waiting.append(moment)
            return
        self._submit(request).add_done_callback(
            lambda future: self._answers.put((moment, clock.now(), future))
        )

    def answer(self) -> tuple[float, float]:
        """Return when the request of the next response was sent, and when the response arrived."""
        if self._submit is None:
            requests = self._candidate.requests
            self._candidate.serve(requests[(self._sent - len(self._waiting)) % len(requests)])
            return self._waiting.popleft(), self._clock.now()
        moment, after, future = self._answers.get()
        future.result()
        return moment, after


def closed(
    candidate: Candidate,
    *,
    concurrency: int,
    seconds: float,
    batch: int = 1,
    queries: int | None = None,
    fewest: int = 1,
    submit: Submit | None = None,
    early_stop: EarlyStop = lambda latencies: False,
    clock: Clock | None = None,
) -> Measurement:
    """Keep one request per client in flight; each response is followed by the next request.

    The first requests of all clients arrive at the same time, which is not representative; they
    belong to the warm-up.

    Args:
        candidate: Candidate to measure.
        concurrency: Number of clients.
        seconds: Time to measure.
        batch: Images per request.
        queries: Number of requests, instead of `seconds`.
        fewest: Smallest number of requests.
        submit: A batcher's `submit`, used instead of `candidate.serve`.
        early_stop: Ends a run whose outcome is certain.
        clock: Replaces the wall clock in tests; not with `submit`.

    Raises:
        InputError: A number out of range.
    """
    workload.check(batch=batch, seconds=seconds, queries=queries)
    if concurrency < 1:
        raise InputError(f"--concurrency {concurrency}: must be at least 1")
    clock = PausableClock(clock or WallClock())
    warm = workload.warm_up(candidate, clock)
    clients = _Clients(candidate, submit, clock)
    parts: list[Timings] = []
    latencies: list[float] = []

    def after_request() -> bool:
        if timings := candidate.timings():
            parts.append(timings)
        return early_stop(latencies)

    for _ in range(concurrency):
        clients.send()
    begin = after = clock.now()
    for _ in range(concurrency if concurrency > 1 else 0):
        _, begin = clients.answer()
        clients.send()
    after = begin
    while True:
        moment, after = clients.answer()
        latencies.append((after - moment) * 1e3)
        stop = early_stop(latencies) if submit else clock.exclude(after_request)
        enough = len(latencies) >= queries if queries else after - begin >= seconds
        if (enough and len(latencies) >= fewest) or stop:
            break
        clients.send()
    for _ in range(concurrency - 1 if submit else 0):
        clients.answer()  # not measured; leaves the batcher empty
    return workload.measurement(
        np.asarray(latencies), after - begin, parts, batch, warm.steady,
        load=LoadFacts(concurrency=concurrency),
    )  # fmt: skip
