"""A build that can be watched and stopped: TensorRT's progress monitor, and Ctrl-C.

The builder runs in a thread of its own, without Python's lock, so that this one hears Ctrl-C at
once. TensorRT can be stopped between two of its steps only; the longest takes seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def run(trt: Any, maker: Any, network: Any, config: Any, progress: Callable[[str], None]) -> Any:
    """Builds; returns the serialized engine, or None where the builder failed.

    Args:
        trt: The TensorRT module.
        maker: Its Builder.
        network: What to build.
        config: How.
        progress: Called with the builder's own words for what it does.

    Raises:
        KeyboardInterrupt: Ctrl-C, once the builder has stopped.
    """
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    result: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(maker.build_serialized_network(network, config))
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    # Not Thread.join: before Python 3.13, one that Ctrl-C interrupts takes its thread for ended.
    done = threading.Event()
    thread = threading.Thread(target=work, name="build")
    thread.start()
    while not done.is_set():
        try:
            done.wait()
        except KeyboardInterrupt:
            if not monitor.cancelled:
                progress("cancelling: waits for the builder's current step")
            monitor.cancelled = True
    thread.join()
    config.progress_monitor = None  # the builder's objects must not outlive it
    if monitor.cancelled:
        raise KeyboardInterrupt
    if failure:
        raise failure[0]
    return result[0]


def _monitor(trt: Any, progress: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells the innermost phase, and stops the builder when `cancelled`."""

        def __init__(self) -> None:
            super().__init__()
            self.cancelled = False
            self.phases: list[str] = []

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.append(phase_name)
            self._tell()

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.phases:
                self.phases.remove(phase_name)
            self._tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not self.cancelled

        def _tell(self) -> None:
            if self.phases and not self.cancelled:
                progress(self.phases[-1].lower())

    return Monitor()
