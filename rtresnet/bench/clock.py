"""The clock that loads are measured by, so that a test can bring its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")

SPIN = 0.0003
"""Seconds: what a sleep may oversleep by. The rest of a wait is spent looking at the clock."""


class Clock(Protocol):
    """Seconds that only grow."""

    def now(self) -> float:
        """Seconds since some moment."""
        ...

    def sleep_until(self, moment: float, *, exactly: bool) -> None:
        """Returns at `moment` or, where it has passed, at once.

        Args:
            moment: As `now` counts.
            exactly: Whether the last bit of the wait may be spent computing.
        """
        ...


class WallClock:
    """The machine's own."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def sleep_until(self, moment: float, *, exactly: bool) -> None:
        """Returns at `moment`, a tenth of a millisecond later if not `exactly`."""
        left = moment - time.perf_counter() - (SPIN if exactly else 0)
        if left > 0:
            time.sleep(left)
        while time.perf_counter() < moment:
            pass


class PausableClock:
    """A clock that stops while the benchmark does work of its own.

    Everything scheduled by it is postponed by the time it stood still, so that neither latencies
    nor wall time include that work, also where requests queue.

    Args:
        clock: The clock that it follows otherwise.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock, self._stopped = clock, 0.0

    def now(self) -> float:
        """Seconds since some moment, without those spent in `exclude`."""
        return self._clock.now() - self._stopped

    def sleep_until(self, moment: float, *, exactly: bool) -> None:
        """Returns at `moment` as `now` counts. See `Clock.sleep_until`."""
        self._clock.sleep_until(moment + self._stopped, exactly=exactly)

    def exclude(self, work: Callable[[], T]) -> T:
        """Calls a function while the clock is stopped, and returns its result."""
        before = self._clock.now()
        result = work()
        self._stopped += self._clock.now() - before
        return result
