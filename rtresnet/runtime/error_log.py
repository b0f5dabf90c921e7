"""TensorRT's error log, attached to exceptions."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any


class ErrorLog:
    """The last errors of each thread, because several threads may be in a call."""

    def __init__(self) -> None:
        self._entries: deque[tuple[int, str]] = deque(maxlen=32)

    def add(self, message: str) -> None:
        """Records an error that a call of this thread logged."""
        self._entries.append((threading.get_ident(), message.strip()))

    def clear(self) -> None:
        """Drops the errors of earlier calls of this thread."""
        if not self._entries:  # the usual case, on every call
            return
        thread = threading.get_ident()
        for entry in [entry for entry in tuple(self._entries) if entry[0] == thread]:
            self._entries.remove(entry)

    def take(self) -> str:
        """Returns and drops the errors of this thread; returns those of all threads if none."""
        thread, entries = threading.get_ident(), tuple(self._entries)
        messages = [message for owner, message in entries if owner == thread]
        self.clear()
        if not messages:  # the builder and the kernel compiler log from threads of their own
            messages = [message for _, message in entries]
        return " | ".join(dict.fromkeys(messages)) or "TensorRT gave no reason"


def logger(trt: Any, errors: ErrorLog) -> Any:
    """Creates an ILogger that records errors.

    Args:
        trt: The TensorRT module.
        errors: Receives the errors.
    """
    error = trt.ILogger.ERROR.value

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity.value <= error:
                errors.add(message)

    return Log()
