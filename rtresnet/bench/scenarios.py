"""Requests that arrive by themselves: MLPerf's server, and clients that wait for their answers.

`server` is an open loop: arrivals are a Poisson process drawn beforehand, a late system does not
slow them down, and a latency counts from the moment a request was meant to arrive, whether or not
anybody was free to take it. `closed` keeps a number of requests in flight.

Without a batcher requests are served one at a time, in the order of arrival, by the thread that
measures: waiting is then arithmetic on the clock, and there is no other thread to disturb what is
measured. The clock stops while timings are read back and `give_up` is asked, so that both delay no
request. With a batcher, requests go through `submit`, the batcher's threads serve them, and the
timings of single requests are not read.
"""

from __future__ import annotations

import dataclasses
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from rtresnet.bench import load, queueing, stats
from rtresnet.bench.clock import Clock, PausableClock, WallClock
from rtresnet.bench.load import Candidate, Measurement
from rtresnet.core.errors import InputError, QueueFullError

Submit = Callable[[Any], "Future[Any]"]
GiveUp = Callable[[list[float]], bool]
"""Takes the latencies so far, in ms, and says whether going on is of no use."""
PATIENCE = 1.0  # seconds more, for a few arrivals at the pace of a slow net


def server(
    candidate: Candidate,
    *,
    qps: float,
    seconds: float,
    queries: int | None = None,
    seed: int = 0,
    submit: Submit | None = None,
    give_up: GiveUp = lambda latencies: False,
    clock: Clock | None = None,
) -> Measurement:
    """Poisson arrivals, one image a request; `batch` of the result is 1.

    A system that cannot keep up would take for ever: it is left alone when the last arrival has
    waited as long as all of them took to arrive, and `unanswered` tells how many were left.

    Args:
        candidate: What serves, and the requests.
        qps: Arrivals a second, on average.
        seconds: In which requests arrive.
        queries: So many arrivals, instead of `seconds`.
        seed: Of the arrivals.
        submit: A batcher's; it serves in place of `candidate.serve`.
        give_up: Ends a run that cannot come to anything any more.
        clock: For tests; not with `submit`.

    Raises:
        InputError: A rate, a time or a number out of range.
    """
    load.check(batch=1, seconds=seconds, queries=queries)
    if not 0 < qps < float("inf"):
        raise InputError(f"--qps {qps:g}: must be above 0")
    clock = PausableClock(clock or WallClock())
    moments = arrivals(qps, seconds=seconds, queries=queries, seed=seed)
    warm = load.warm_up(candidate, clock)
    moments += clock.now() + 0.01
    if submit is None:
        found = _served(candidate, clock, moments, give_up)
    else:
        found = _submitted(candidate, clock, moments, submit, give_up)
    facts: dict[str, Any] = {
        "qps": qps,
        "late_ms": stats.percentile(found.late, 0.99) if found.late.size else None,
        "refused": found.refused,
        "unanswered": found.unanswered,
        "service_ms": float(np.median(found.service)) if found.service.size else None,
        "md1_p99_ms": None,
    }
    if found.service.size:
        service = facts["service_ms"] / 1e3
        if qps * service < 1:
            facts["md1_p99_ms"] = 1e3 * queueing.latency_quantile(0.99, rate=qps, service=service)
    if not found.latencies.size:
        raise InputError(f"--qps {qps:g}: the batcher refused every request")
    measured = load.result(found.latencies, found.wall, found.parts, 1, warm.steady, open_loop=True)
    return dataclasses.replace(measured, load=facts)


def arrivals(qps: float, *, seconds: float, queries: int | None, seed: int) -> np.ndarray:
    """Moments in seconds of a Poisson process: within `seconds`, one at least, or `queries`."""
    rng = np.random.default_rng(seed)
    count = queries or int(qps * seconds + 6 * np.sqrt(qps * seconds) + 10)
    moments = np.cumsum(rng.exponential(1 / qps, count))
    return moments if queries else moments[: max(1, int(np.searchsorted(moments, seconds)))]


@dataclasses.dataclass(kw_only=True)
class _Found:
    """Milliseconds of latency, of lateness in sending, and of service where it is known."""

    latencies: np.ndarray
    wall: float
    late: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))
    service: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))
    parts: list[load.Part] = dataclasses.field(default_factory=list)
    refused: int = 0
    unanswered: int = 0


def _served(
    candidate: Candidate, clock: PausableClock, moments: np.ndarray, give_up: GiveUp
) -> _Found:
    latencies: list[float] = []
    late: list[float] = []
    service: list[float] = []
    parts: list[load.Part] = []
    unanswered = 0
    requests, serve = candidate.requests, candidate.serve
    free = after = 0.0

    def after_request() -> bool:
        if known := candidate.timings():
            parts.append(known)
        return give_up(latencies)

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
    return _Found(
        latencies=np.asarray(latencies),
        wall=after - float(moments[0]),
        late=np.asarray(late),
        service=np.asarray(service),
        parts=parts,
        unanswered=unanswered,
    )


def _submitted(
    candidate: Candidate, clock: Clock, moments: np.ndarray, submit: Submit, give_up: GiveUp
) -> _Found:
    answers: queue.SimpleQueue[tuple[int, float, Future[Any]]] = queue.SimpleQueue()
    latencies: dict[int, float] = {}
    late: list[float] = []
    sent = refused = 0
    last = 0.0

    def take() -> None:
        nonlocal last
        number, after, future = answers.get()
        future.result()  # raises what the session raised
        latencies[number] = (after - float(moments[number])) * 1e3
        last = max(last, after)

    def answered(number: int) -> Callable[[Future[Any]], None]:
        return lambda future: answers.put((number, clock.now(), future))

    for number, moment in enumerate(moments.tolist()):
        # Not exactly: looking at the clock would take the processor from what is measured.
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
        if give_up(list(latencies.values())):
            break
    while len(latencies) < sent:
        take()
    return _Found(
        latencies=np.asarray([latencies[number] for number in sorted(latencies)]),
        wall=last - float(moments[0]),
        late=np.asarray(late),
        refused=refused,
    )


def closed(
    candidate: Candidate,
    *,
    concurrency: int,
    seconds: float,
    batch: int = 1,
    queries: int | None = None,
    fewest: int = 1,
    submit: Submit | None = None,
    give_up: GiveUp = lambda latencies: False,
    clock: Clock | None = None,
) -> Measurement:
    """As many requests in flight as there are clients; an answer is followed by a request.

    The first requests of all clients come at the same moment, as they never will again; they
    belong to the warm-up.

    Args:
        candidate: What serves, and the requests.
        concurrency: Clients.
        seconds: Of measuring.
        batch: Images a request.
        queries: So many requests, instead of `seconds`.
        fewest: Requests made in any case.
        submit: A batcher's; it serves in place of `candidate.serve`.
        give_up: Ends a run that cannot come to anything any more.
        clock: For tests; not with `submit`.

    Raises:
        InputError: A number out of range.
    """
    load.check(batch=batch, seconds=seconds, queries=queries)
    if concurrency < 1:
        raise InputError(f"--concurrency {concurrency}: must be at least 1")
    clock = PausableClock(clock or WallClock())
    warm = load.warm_up(candidate, clock)
    requests = candidate.requests
    parts: list[load.Part] = []
    latencies: list[float] = []
    answers: queue.SimpleQueue[tuple[float, float, Future[Any]]] = queue.SimpleQueue()
    waiting: deque[float] = deque()
    sent = 0

    def send() -> None:
        nonlocal sent
        request, moment = requests[sent % len(requests)], clock.now()
        sent += 1
        if submit is None:
            waiting.append(moment)
            return
        submit(request).add_done_callback(lambda future: answers.put((moment, clock.now(), future)))

    def answer() -> tuple[float, float]:
        """When the request was sent whose answer is next, and when that came."""
        if submit is None:
            candidate.serve(requests[(sent - len(waiting)) % len(requests)])
            return waiting.popleft(), clock.now()
        moment, after, future = answers.get()
        future.result()
        return moment, after

    def after_request() -> bool:
        if known := candidate.timings():
            parts.append(known)
        return give_up(latencies)

    for _ in range(concurrency):
        send()
    begin = after = clock.now()
    for _ in range(concurrency if concurrency > 1 else 0):
        _, begin = answer()
        send()
    after = begin
    while True:
        moment, after = answer()
        latencies.append((after - moment) * 1e3)
        early_stop = give_up(latencies) if submit else clock.exclude(after_request)
        enough = len(latencies) >= queries if queries else after - begin >= seconds
        if (enough and len(latencies) >= fewest) or early_stop:
            break
        send()
    for _ in range(concurrency - 1 if submit else 0):
        answer()  # nobody waits for these any more; the batcher is left empty
    measured = load.result(np.asarray(latencies), after - begin, parts, batch, warm.steady)
    return dataclasses.replace(measured, load={"concurrency": concurrency})
