"""Search for the largest batch, or the highest rate, whose p99 is within a bound.

Bisection over loads in ascending order, which assumes that more load means more latency. A single
measurement is noisy, so the loads on both sides of the edge are measured again, and the majority
decides. All measurements are kept as points of the curve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rtresnet.bench.workload import Measurement

REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement of the curve.

    Attributes:
        load: Images per batch, or requests per second.
        p99: Milliseconds; None if the run was stopped because most requests were late, or had
            too few requests.
        holds: Whether the p99 is within the bound.
    """

    load: float
    n: int
    median: float
    p99: float | None
    images_per_second: float | None
    holds: bool


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        what: "batch" or "qps".
        p99_ms: The bound, in milliseconds.
        best: The largest load within the bound; None if no load is.
        limit: Whether `best` is the largest load that was tried, so that more may be possible.
        points: In ascending order of load, repeats included.
    """

    what: str
    p99_ms: float
    best: float | None
    limit: bool
    points: tuple[Point, ...]


def early_stop(bound: float) -> Callable[[list[float]], bool]:
    """Make a function that stops a run once most of at least ten requests are too late."""
    late = 0
    count = 0

    def stop(latencies: list[float]) -> bool:
        nonlocal late, count
        late += sum(latency > bound for latency in latencies[count:])
        count = len(latencies)
        return count >= 10 and late > count / 2

    return stop


def largest(
    loads: Sequence[float],
    measure: Callable[[float], Measurement],
    *,
    what: str,
    bound: float,
    gallop: bool,
    on_point: Callable[[Point], None] = lambda point: None,
) -> SearchResult:
    """Search for the largest load within a bound.

    Args:
        loads: Loads to try, ascending.
        measure: Function that measures one load.
        what: "batch" or "qps", for the result.
        bound: Bound of the p99, in milliseconds.
        gallop: Whether to begin with the smallest load and double it, which is faster if a
            large load takes much longer to measure than a small one; otherwise bisects from the
            middle.
        on_point: Called with each measurement.
    """
    points: dict[int, list[Point]] = {}

    def holds(index: int, times: int = 1) -> bool:
        measured = points.setdefault(index, [])
        while len(measured) < times:
            measured.append(point(loads[index], measure(loads[index]), bound))
            on_point(measured[-1])
        return 2 * sum(entry.holds for entry in measured) > len(measured)

    low, high = -1, len(loads)  # indices of the last load within the bound, the first beyond it
    step = 0
    while high - low > 1:
        index = min(step, high - 1) if gallop and high == len(loads) else (low + high) // 2
        if holds(index):
            low, step = index, 2 * index + 1
        else:
            high = index
    # The majority decides the position of the edge; it moves until both sides agree.
    visited: set[int] = set()
    while low not in visited:
        visited.add(low)
        if low >= 0 and not holds(low, REPEATS):
            low -= 1
        elif low + 1 < len(loads) and holds(low + 1, REPEATS):
            low += 1
    everything = [entry for index in sorted(points) for entry in points[index]]
    return SearchResult(
        what=what,
        p99_ms=bound,
        best=loads[low] if low >= 0 else None,
        limit=low == len(loads) - 1,
        points=tuple(everything),
    )


def point(load: float, measured: Measurement, bound: float) -> Point:
    """Summarize a measurement and compare its p99 with a bound."""
    latency = measured.latency
    return Point(
        load=load,
        n=latency.n,
        median=latency.median,
        p99=latency.p99,
        images_per_second=latency.images_per_second,
        holds=latency.p99 is not None and latency.p99 <= bound,
    )
