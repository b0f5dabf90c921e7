"""The console of the command line: rich, with escaped output, and progress on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich import console
from rich.segment import Segment
from rich.text import Text

from rtresnet.core.reporter import Update, escape, escape_cell

SECONDS_BETWEEN_LINES = 30.0  # between lines of progress, if no bar can be drawn


class Console(console.Console):
    """Print text without markup, emoji codes and control characters.

    A string is one line: its line ends are escaped, so that a name from a file cannot forge a line
    of output. Print several lines with several calls, or as a `rich.text.Text`.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, *arguments: Any, **options: Any) -> Text:
        """Escape characters that rich would drop, and line ends."""
        return super().render_str(escape_cell(text), *arguments, **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        """Escape the text of every renderable, keeping the line ends of its layout."""
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else Segment(escape(segment.text), segment.style)


def on_terminal() -> bool:
    """Return whether progress can be drawn on standard error; elsewhere it comes in lines."""
    return sys.stderr.isatty()


class TerminalReporter:
    """Draw progress, notes and warnings on standard error; see `core.reporter.Reporter`."""

    @contextlib.contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator[Update]:
        """Show a bar with the time left (a spinner without `total`); print lines elsewhere."""
        description = escape_cell(description)
        if not on_terminal():
            self.note(description)
            yield _lines(self, description, total)
            return
        from rich import progress as rich

        columns = [rich.SpinnerColumn(), rich.TextColumn("{task.description}", markup=False)]
        if total is None:
            columns += [rich.TimeElapsedColumn()]
        else:
            columns += [rich.BarColumn(20), rich.TimeRemainingColumn(), rich.TextColumn("left")]
        with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task, phase = bar.add_task(description, total=total), description

            def update(
                completed: float | None = None,
                description: str | None = None,
                total: float | None = None,
            ) -> None:
                nonlocal phase
                if total is not None and description not in (None, phase):
                    bar.reset(task, total=total)
                phase = description or phase
                shown = None if description is None else escape_cell(description)
                bar.update(task, completed=completed, description=shown, total=total)

            yield update

    def note(self, line: str) -> None:
        """Print a line, above a progress bar if there is one."""
        print(escape_cell(line), file=sys.stderr)

    def warning(self, title: str, body: str) -> None:
        """Print a warning in a frame."""
        from rich import box
        from rich.panel import Panel

        heading = Text(f"WARNING: {escape_cell(title)}")
        Console(stderr=True).print(
            Panel(Text(body), title=heading, style="bold yellow", box=box.HEAVY, width=78)
        )


def _lines(reporter: TerminalReporter, description: str, total: float | None) -> Update:
    """Report progress in lines with the time left, if no bar can be drawn."""
    printed = time.monotonic()
    phase, goal = description, total
    start: tuple[float, float] | None = None  # seconds and completed work at the start of the phase

    def update(
        completed: float | None = None,
        description: str | None = None,
        total: float | None = None,
    ) -> None:
        nonlocal printed, phase, goal, start
        now = time.monotonic()
        if total is not None and description not in (None, phase):
            goal, start = total, None
        phase = description or phase
        if completed is None or goal is None:
            return
        start = start or (now, completed)
        began, before = start
        if before < completed < goal and now - printed >= SECONDS_BETWEEN_LINES:
            left = (now - began) * (goal - completed) / (completed - before)
            reporter.note(f"{phase}: {100 * completed / goal:.0f} %, about {left:.0f} s left")
            printed = now

    return update
