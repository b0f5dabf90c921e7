"""TensorRT's error log, attached to exceptions."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any


class ErrorLog:
    """The last errors of each thread: several may be in a call at the same time."""

    def __init__(self) -> None:
        self._said: deque[tuple[int, str]] = deque(maxlen=32)

    def add(self, message: str) -> None:
        """Keeps an error that a call of this thread logged."""
        self._said.append((threading.get_ident(), message.strip()))

    def clear(self) -> None:
        """Drops what earlier calls of this thread logged."""
        if not self._said:  # on every call
            return
        me = threading.get_ident()
        for entry in [entry for entry in tuple(self._said) if entry[0] == me]:
            self._said.remove(entry)

    def take(self) -> str:
        """Returns and drops this thread's errors; those of all threads if it has none."""
        me, said = threading.get_ident(), tuple(self._said)
        mine = [message for thread, message in said if thread == me]
        self.clear()
        if not mine:  # the builder and the compiler of kernels log from threads of their own
            mine = [message for _, message in said]
        return " | ".join(dict.fromkeys(mine)) or "TensorRT gave no reason"


def logger(trt: Any, errors: ErrorLog) -> Any:
    """An ILogger that keeps errors.

    Args:
        trt: The TensorRT module.
        errors: Where it keeps them.
    """
    error = trt.ILogger.ERROR.value

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity.value <= error:
                errors.add(message)

    return Log()
