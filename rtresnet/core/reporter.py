"""Progress, notes and warnings of long operations.

Every workflow takes a `Reporter`. In Python the default sends them to
`logging.getLogger("rtresnet")`, which is silent until the application configures it; the command
line draws them with rich on standard error. Results are returned, never reported.

`escape` makes text from files safe for a terminal.
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
        """Update the passed values. A new `total` with a new `description` starts a new phase."""
        ...


class Reporter(Protocol):
    """Messages of a workflow to its caller."""

    def progress(
        self, description: str, total: float | None = None
    ) -> AbstractContextManager[Update]:
        """Report work in progress until the block ends; without `total` its length is unknown."""
        ...

    def note(self, line: str) -> None:
        """Report a one-line note."""
        ...

    def warning(self, title: str, body: str) -> None:
        """Report an important warning."""
        ...


class LogReporter:
    """Sends notes to the logger `rtresnet` as INFO, progress as DEBUG and warnings as WARNING."""

    @contextlib.contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator[Update]:
        """Log the description once."""
        LOGGER.debug("%s", description)
        yield _ignore

    def note(self, line: str) -> None:
        """Log a line."""
        LOGGER.info("%s", line)

    def warning(self, title: str, body: str) -> None:
        """Log title and body as one line."""
        LOGGER.warning("%s: %s", title, body)


def _ignore(
    completed: float | None = None,
    description: str | None = None,
    total: float | None = None,
) -> None:
    """Ignore progress."""


DEFAULT: Reporter = LogReporter()


# Class names, file names and messages of libraries may hold control sequences that move the
# cursor, change the window's title or reverse the reading direction. They are shown as `\x1b`.
_UNSAFE = (
    *range(0x20),  # C0: ESC, which starts a control sequence, and CR, which overwrites the line
    *range(0x7F, 0xA0),  # DEL and C1: CSI and OSC as one character
    0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A),  # reading direction
    0x2028, 0x2029,  # line and paragraph separators
    *range(0xD800, 0xE000),  # bytes of a file name that are not UTF-8
)  # fmt: skip
_CELL = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _UNSAFE}
_LINES = {code: shown for code, shown in _CELL.items() if chr(code) not in "\n\t"}


def escape(text: str) -> str:
    """Return the text with control characters as escapes; keeps line ends and tabs."""
    return text.translate(_LINES)


def plural(count: int, noun: str) -> str:
    """Format a number with its noun: "1 image", "1,200 images", "3 classes"."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def escape_cell(text: str) -> str:
    """Return the text with control characters as escapes, line ends and tabs included."""
    return text.translate(_CELL)
