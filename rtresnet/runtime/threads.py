"""How Python threads share the interpreter in a process that serves or measures."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

SWITCH_SECONDS = 1e-4
"""Python's default of 5 ms is ten times a small net's latency on a GPU."""


@contextlib.contextmanager
def short_switch_interval(seconds: float = SWITCH_SECONDS) -> Iterator[None]:
    """Has threads hand over the GIL sooner, for the whole process, and restores it at the end.

    A thread that waited for the GPU needs the GIL to go on. Next to a thread that computes in
    Python it gets it after `sys.getswitchinterval()`.

    Args:
        seconds: The longest time that a thread keeps the GIL while others wait. A shorter interval
            that is set already stays.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(seconds, before))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
