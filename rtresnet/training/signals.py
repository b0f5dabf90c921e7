"""Ctrl-C and SIGTERM, held back until a step is done, so that what is saved is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Whether somebody asked for the end."""

    asked = False


@contextlib.contextmanager
def defer_signals(*, alone: bool) -> Iterator[Stop]:
    """Turns the first SIGINT or SIGTERM into `stop.asked`; a second one acts at once.

    Does nothing outside of the main thread, where Python hands out no signals.

    Args:
        alone: With other processes SIGTERM is torchrun's, and means that one of them is gone: a
            step that waits for it would never be done.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    held = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    before = {name: signal.signal(name, ask) for name in held}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
