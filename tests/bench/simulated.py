"""A clock for tests: it moves when somebody serves or sleeps, and only then."""

from __future__ import annotations


class Simulated:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float, *, exactly: bool) -> None:
        self.time = max(self.time, moment)
