"""Load a plan with TensorRT or TensorRT-RTX: what all kinds of plans have in common.

Loading checks the sidecar and the plan's header before it deserializes the plan
(`compatibility.py`), and then the free memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from abc import ABC, abstractmethod
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rtresnet.core import hardware, trt_loading
from rtresnet.core.errors import InputError, UnavailableError
from rtresnet.core.sidecar import Sidecar
from rtresnet.runtime.compatibility import REBUILD, check_compatible, check_header
from rtresnet.runtime.contexts import KernelCache
from rtresnet.runtime.cuda import open_cuda


class ErrorLog:
    """The last errors of each thread, because several threads may be in a call."""

    def __init__(self) -> None:
        self._entries: deque[tuple[int, str]] = deque(maxlen=32)

    def add(self, message: str) -> None:
        """Record an error that a call of this thread logged."""
        self._entries.append((threading.get_ident(), message.strip()))

    def clear(self) -> None:
        """Drop the errors of earlier calls of this thread."""
        if not self._entries:  # the usual case, on every call
            return
        thread = threading.get_ident()
        for entry in [entry for entry in tuple(self._entries) if entry[0] == thread]:
            self._entries.remove(entry)

    def take(self) -> str:
        """Return and drop the errors of this thread, or those of all threads if it has none."""
        thread, entries = threading.get_ident(), tuple(self._entries)
        messages = [message for owner, message in entries if owner == thread]
        self.clear()
        if not messages:  # the builder and the kernel compiler log from their own threads
            messages = [message for _, message in entries]
        return " | ".join(dict.fromkeys(messages)) or "TensorRT gave no reason"


def logger(trt: Any, errors: ErrorLog) -> Any:
    """Create an ILogger that records errors.

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


class PlanBackend(ABC):
    """A plan that is loaded on a GPU. Subclasses create its contexts and run them.

    Args:
        path: The plan.
        sidecar: The plan's sidecar, or None.
        contexts: Number of calls that may run at the same time, each with its own buffers.
            Further calls wait.
        graphs: Whether calls run as CUDA graphs, one for each batch size: None uses graphs where
            possible, True requires them, False uses none. TensorRT-RTX captures graphs itself; for
            `tensorrt` they are captured here. Batches of NumPy images of up to 32 rows, and of the
            sizes of a profile, run as graphs.
        kernels: When TensorRT-RTX compiles the kernels of a new batch size: "eager" or "lazy".
        cache: Whether TensorRT-RTX's compiled kernels are read from and written to `cache_path`.
        timings: Whether `timings` and `timeline` of a classifier are available. They add some
            events and driver calls to every `infer`.
        blocking: Whether a thread that waits for a classifier sleeps. It wakes up some tens of
            microseconds late; a thread that spins keeps a CPU core busy.

    Attributes:
        contexts: Number of calls that may run at the same time.
        tf32: Whether FP32 layers may run as TF32, from the sidecar; None if it is unknown there.

    Raises:
        UnavailableError: There is no GPU, no TensorRT or too little memory, or TensorRT does not
            accept the plan.
        ArtifactError: Version or target do not match.
    """

    threads: int | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        sidecar: Sidecar | None,
        *,
        contexts: int = 1,
        graphs: bool | None = None,
        kernels: str = "eager",
        cache: bool = True,
        timings: bool = False,
        blocking: bool = False,
    ) -> None:
        if contexts < 1:
            raise InputError(f"contexts is {contexts}, but must be at least 1")
        check_compatible(path, sidecar)
        plan = sidecar.plan if sidecar else None
        name = plan.builder if plan else "tensorrt_rtx"
        self.tf32 = plan.tf32 if plan else None
        # First, because without a device TensorRT ends the process instead of raising.
        self._cuda = open_cuda()
        trt = trt_loading.load_tensorrt(name)
        self.path = Path(path)
        self.provider = trt_loading.MODULES[name]
        # Several distributions provide the module, so ask the module for its version.
        key = "tensorrt-rtx-cu13" if name == "tensorrt_rtx" else "tensorrt"
        self.versions = {key: str(trt.__version__)}
        self.device = hardware.gpus()[0].name
        self.contexts = contexts
        self._timed, self._blocking = timings, blocking
        self._errors = ErrorLog()
        self._stack = ExitStack()
        self._closed = False
        self._engine: Any = None
        self._cache: KernelCache | None = None
        try:
            with self._cuda.active():
                self._load(trt, contexts, graphs, kernels, cache)
        except BaseException as error:
            self._closed = True
            traceback.clear_frames(error.__traceback__)  # they refer to contexts and the engine
            with contextlib.suppress(UnavailableError):  # report the first failure
                self._release()
            raise

    @abstractmethod
    def _load(
        self, trt: Any, contexts: int, graphs: bool | None, kernels: str, cache: bool
    ) -> None:
        """Deserialize the engine and create its contexts; what must be freed goes to `_stack`."""

    def timings(self) -> dict[str, float]:
        """Return the milliseconds of the last call's parts; empty if they are not measured."""
        return {}

    def _deserialize(self, trt: Any) -> Any:
        """Check the plan's header and the free memory, and load the engine."""
        log = logger(trt, self._errors)
        runtime = trt_loading.create(trt, "Runtime", log, self._errors.take)
        data = self.path.read_bytes()
        check_header(trt, runtime, data, self.path, self._errors)
        self._check_memory(len(data), "its weights")
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            reason = self._errors.take()
            raise UnavailableError(
                f"{self.path}: {self.provider} {trt.__version__} does not accept this plan on "
                f"{self.device}: {reason}",
                fix=hardware.driver_fix(reason) or REBUILD,
            )
        self._engine = engine
        # Contexts refer to the engine, the engine to the runtime, the runtime to its logger.
        self._stack.callback(self._forget, [log, runtime, engine])
        return engine

    def _forget(self, objects: list[Any]) -> None:
        """Drop TensorRT's objects in reverse order of creation."""
        self._engine = self._cache = None
        while objects:
            objects.pop()

    def _check_memory(self, needed: int, buffers: str) -> None:
        free, total = self._cuda.memory()
        if needed > free:
            raise UnavailableError(
                f"{self.path}: {buffers} need {needed / 1e6:,.0f} MB on {self.device}, but only "
                f"{free / 1e6:,.0f} of {total / 1e6:,.0f} MB are free",
                fix="use fewer contexts, or build it with a smaller --batch maximum",
            )

    def _check_call(self, returned: object, call: str) -> None:
        """Raise if a TensorRT call failed. Most calls only log, and return False or None."""
        if returned is None or returned is False:
            raise UnavailableError(
                f"{self.path}: {call} failed on {self.device}: {self._errors.take()}"
            )

    def _release(self, *, save: bool = False) -> None:
        """Free everything, even if the device is lost and every call fails."""
        try:
            with self._cuda.active():
                try:
                    # No local variable may refer to the cache, which is freed before the engine.
                    if save and self._cache is not None:
                        self._cache.save()
                finally:
                    self._stack.close()
        finally:
            self._stack.close()  # frees the rest if the device could not be made current
