"""Ctrl-C and SIGTERM as a request that a loop answers at its next safe point."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Whether the user or the system asked the run to stop."""

    requested = False


@contextlib.contextmanager
def defer_signals(*, alone: bool) -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into `stop.requested`; a second one acts at once.

    A step is completed before the run stops, so that the saved state is complete. No effect outside
    the main thread, where Python delivers no signals.

    Args:
        alone: Whether this is the only process. Otherwise SIGTERM comes from torchrun because a
            process is gone, and a step that waits for it would never end.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    deferred = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    before = {name: signal.signal(name, request) for name in deferred}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
