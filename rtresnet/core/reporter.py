"""Progress, notes and warnings of work that takes long.

Every workflow takes a `Reporter`. In Python the default sends them to
`logging.getLogger("rtresnet")`, which is silent until the application configures it; the command
line draws them with rich on standard error. Results are returned, never reported.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

LOGGER = logging.getLogger("rtresnet")
LOGGER.addHandler(logging.NullHandler())


class Update(Protocol):
    """Moves a progress bar."""

    def __call__(
        self,
        completed: float | None = None,
        description: str | None = None,
        total: float | None = None,
    ) -> None:
        """Sets what is given. A new `total` with a new `description` starts a new phase."""
        ...


class Reporter(Protocol):
    """What a workflow tells its caller while it runs."""

    def progress(
        self, description: str, total: float | None = None
    ) -> AbstractContextManager[Update]:
        """Reports work in progress until the block ends; without `total` its length is unknown."""
        ...

    def note(self, line: str) -> None:
        """Reports one line that a reader of the result should know."""
        ...

    def warning(self, title: str, body: str) -> None:
        """Reports something that must not be missed."""
        ...


class LogReporter:
    """Sends notes to the logger `rtresnet` as INFO, progress as DEBUG and warnings as WARNING."""

    @contextlib.contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator[Update]:
        """Logs the description once."""
        LOGGER.debug("%s", description)
        yield _ignore

    def note(self, line: str) -> None:
        """Logs a line."""
        LOGGER.info("%s", line)

    def warning(self, title: str, body: str) -> None:
        """Logs title and body as one line."""
        LOGGER.warning("%s: %s", title, body)


def _ignore(
    completed: float | None = None,
    description: str | None = None,
    total: float | None = None,
) -> None:
    """Progress that nobody watches."""


DEFAULT: Reporter = LogReporter()
