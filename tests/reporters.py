"""A reporter that records the messages of a workflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rtresnet.core.reporter import Update


class RecordingReporter:
    """Keeps notes and progress; a warning fails the test."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.completed: list[float] = []

    @contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator[Update]:
        def update(
            completed: float | None = None,
            description: str | None = None,
            total: float | None = None,
        ) -> None:
            if completed is not None:
                self.completed.append(completed)

        yield update

    def note(self, line: str) -> None:
        self.notes.append(line)

    def warning(self, title: str, body: str) -> None:
        raise AssertionError(title)
