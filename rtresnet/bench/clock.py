"""The clock that loads are measured by, so that a test can bring its own."""

from __future__ import annotations

import time
from typing import Protocol

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
