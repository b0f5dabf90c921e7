"""The largest batch, or the highest rate, whose p99 still holds a bound.

By bisection over loads in ascending order, which assumes that more load means more latency;
because one measurement is one draw, what lies on either side of the edge is measured again, and the
majority decides. Every measurement is kept: together they are the curve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rtresnet.bench.load import Measurement

REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement of the curve.

    Attributes:
        load: Images a batch, or requests a second.
        p99: Milliseconds; None where the run was given up, because most requests were late.
    """

    load: float
    n: int
    median: float
    p99: float | None
    images_per_second: float | None
    holds: bool


@dataclass(frozen=True, kw_only=True)
class Found:
    """The outcome.

    Attributes:
        best: The largest load that holds the bound; None where none does.
        limit: Whether that is the largest that was allowed, so that more may hold as well.
        points: In ascending order of load, repeats included.
    """

    best: float | None
    limit: bool
    points: tuple[Point, ...]


def early_stop(bound: float) -> Callable[[list[float]], bool]:
    """Whether a run cannot hold a p99 any more: of ten requests or more most are late already."""
    late = 0
    seen = 0

    def give_up(latencies: list[float]) -> bool:
        nonlocal late, seen
        late += sum(latency > bound for latency in latencies[seen:])
        seen = len(latencies)
        return seen >= 10 and late > seen / 2

    return give_up


def largest(
    loads: Sequence[float],
    measure: Callable[[float], Measurement],
    *,
    bound: float,
    gallop: bool,
    on_point: Callable[[Point], None] = lambda point: None,
) -> Found:
    """Searches for the edge.

    Args:
        loads: Ascending.
        measure: Measures one of them.
        bound: Of the p99, in milliseconds.
        gallop: Whether to begin at the smallest and double, where a large load costs much more
            time than a small one; otherwise in the middle.
        on_point: Told of each measurement.
    """
    points: dict[int, list[Point]] = {}

    def holds(index: int, times: int = 1) -> bool:
        known = points.setdefault(index, [])
        while len(known) < times:
            known.append(point(loads[index], measure(loads[index]), bound))
            on_point(known[-1])
        return 2 * sum(entry.holds for entry in known) > len(known)

    low, high = -1, len(loads)  # holds, does not
    step = 0
    while high - low > 1:
        index = min(step, high - 1) if gallop and high == len(loads) else (low + high) // 2
        if holds(index):
            low, step = index, 2 * index + 1
        else:
            high = index
    # The edge is where the majority says it is; it moves until both of its sides agree.
    visited: set[int] = set()
    while low not in visited:
        visited.add(low)
        if low >= 0 and not holds(low, REPEATS):
            low -= 1
        elif low + 1 < len(loads) and holds(low + 1, REPEATS):
            low += 1
    everything = [entry for index in sorted(points) for entry in points[index]]
    return Found(
        best=loads[low] if low >= 0 else None,
        limit=low == len(loads) - 1,
        points=tuple(everything),
    )


def point(load: float, measured: Measurement, bound: float) -> Point:
    """What a measurement says of a bound."""
    latency = measured.latency
    return Point(
        load=load,
        n=latency.n,
        median=latency.median,
        p99=latency.p99,
        images_per_second=latency.images_per_second,
        holds=latency.p99 is not None and latency.p99 <= bound,
    )
