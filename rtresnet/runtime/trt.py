"""Run plans with TensorRT or TensorRT-RTX.

Loading checks the sidecar and the plan's header before it deserializes the plan
(`compatibility.py`), and then the free memory. It creates everything that a call needs
(`contexts.py`, `execution.py`), so that calls allocate nothing.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rtresnet.core import hardware, trt_loading
from rtresnet.core.errors import InputError, UnavailableError
from rtresnet.core.sidecar import Sidecar
from rtresnet.runtime.arrays import check_images, make_results
from rtresnet.runtime.compatibility import REBUILD, check_compatible, check_header
from rtresnet.runtime.contexts import KernelCache, configure_contexts
from rtresnet.runtime.cuda import Cuda, allocate_pinned_array, open_cuda
from rtresnet.runtime.execution import ExecutionStream, Span
from rtresnet.runtime.io_spec import IoSpec, read_io_spec


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


class TrtBackend:
    """A plan on a GPU. See `runtime.backend.Backend`. Takes calls from several threads.

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
        timings: Whether `timings` and `timeline` are available. They add some events and driver
            calls to every `infer`.
        blocking: Whether a thread that waits for the GPU sleeps. It wakes up some tens of
            microseconds late; a thread that spins keeps a CPU core busy.

    Attributes:
        profiles: The plan's optimization profiles.
        graphs: "built in", "by hand" or "none".
        contexts: Number of calls that may run at the same time.
        in_flight: Number of batches that `pipeline` keeps in flight: two for each context.
        tf32: Whether FP32 layers may run as TF32, from the sidecar; None if it is unknown there.

    Raises:
        UnavailableError: There is no GPU, no TensorRT or too little memory, or TensorRT does not
            accept the plan.
        ArtifactError: Version or target do not match, or the engine is not an image classifier.
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
        self._errors = ErrorLog()
        self._stack = ExitStack()
        self._streams: list[ExecutionStream] = []
        self._free: queue.SimpleQueue[ExecutionStream | None] = queue.SimpleQueue()
        self._closing, self._closed = threading.Lock(), False
        self._last_stream: ExecutionStream | None = None
        self._engine: Any = None
        self._cache: KernelCache | None = None
        self._timed, self._blocking = timings, blocking
        self.contexts, self.in_flight = contexts, 2 * contexts
        try:
            with self._cuda.active():
                self._load(trt, contexts, graphs, kernels, cache)
        except BaseException as error:
            self._closed = True
            traceback.clear_frames(error.__traceback__)  # they refer to contexts and the engine
            with contextlib.suppress(UnavailableError):  # report the first failure
                self._release()
            raise

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

    def _load(
        self, trt: Any, contexts: int, graphs: bool | None, kernels: str, cache: bool
    ) -> None:
        cuda = self._cuda
        engine = self._deserialize(trt)
        self.io = io = read_io_spec(trt, engine, self.path)
        self._describe(io)
        self._check_memory(
            contexts * io.stream_bytes,
            f"{contexts} x activations and buffers for batches of up to {io.largest}",
        )
        settings = configure_contexts(
            trt, engine, self._check_call,
            graphs=graphs,
            binding_has_graphs=cuda.graphs,
            kernels=kernels,
            cache_for=self.path if cache else None,
        )  # fmt: skip
        self._cache = settings.cache
        self._errors.clear()  # TensorRT logs an error for a cache of another GPU, which is fine
        self._stack.callback(self._forget, [settings.cache])
        owned_config, external_config = settings.owned, settings.external
        options: dict[str, Any] = {
            "capture": settings.capture, "built_in": settings.built_in, "pad": settings.pad,
            "timed": self._timed, "blocking": self._blocking, "stack": self._stack,
        }  # fmt: skip
        del settings  # `make_context` outlives the cache, so it must not refer to it

        def make_context(profile: int, scratch: int, stream: int, owned: bool) -> Any:
            context = engine.create_execution_context(owned_config if owned else external_config)
            self._check_call(context, "create_execution_context")
            if scratch:
                context.set_device_memory(scratch, io.scratch)
            succeeded = context.set_optimization_profile_async(profile, stream)
            self._check_call(succeeded, f"set_optimization_profile_async({profile})")
            cuda.synchronize(stream)
            return context

        for _ in range(contexts):
            stream = ExecutionStream(cuda, io, make_context, self._check_call, **options)
            self._streams.append(stream)
            self._free.put(stream)

    def _describe(self, io: IoSpec) -> None:
        row = io.input.row
        self.profiles = io.profiles
        self.largest = io.largest
        self.smallest = min(profile.min for profile in io.profiles)
        self.input_dtype: np.dtype[Any] = io.input.dtype
        self.layout: Literal["nchw", "nhwc"] = "nchw" if row[0] == 3 else "nhwc"
        self.size: int | None = row[1]

    @property
    def graphs(self) -> str:
        """Who captures CUDA graphs: "built in" (TensorRT-RTX), "by hand" or "none"."""
        if any(stream.graphs.built_in is not False for stream in self._streams):
            return "built in"
        captured = any(stream.graphs.capture is not False for stream in self._streams)
        return "by hand" if captured else "none"

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

    def infer(self, images: Any, out: Any = None) -> Any:
        """Run a batch of any N from 1. See `runtime.backend.Backend.infer`.

        Args:
            images: `input_dtype` [N, 3, S, S] or [N, S, S, 3], depending on `layout`: a NumPy
                array, or a C-contiguous array on this GPU with DLPack or
                `__cuda_array_interface__`, which is read in place. Images in pinned memory are not
                copied on the host.
            out: Array for the result, of its shape and type, on the host or on this GPU; a tuple
                of two for a top-K plan. The call then allocates nothing.

        Returns:
            float32 logits [N, classes], or indices int64 [N, K] and probabilities float32 [N, K]
            of a top-K plan, as NumPy arrays; or `out`.

        Raises:
            InputError: Wrong type or shape, or the backend is closed.
            UnavailableError: A call of CUDA or TensorRT failed; the message names it.
        """
        stream = self._take_stream()
        try:
            with self._cuda.active():
                self._errors.clear()
                images = check_images(self.io, images, stream.compute)
                results = None
                if out is not None:
                    results = make_results(self.io, out, len(images), stream.compute)
                results = stream.run(images, results)
            self._last_stream = stream
        finally:
            self._free.put(stream)
        if out is not None:
            return out
        return results[0] if len(results) == 1 else tuple(results)

    def _take_stream(self) -> ExecutionStream:
        """Wait for a free stream. The caller puts it back."""
        stream = self._free.get()
        if stream is None:
            self._free.put(None)  # for the next caller
            raise InputError(f"{self.path}: infer: the session is closed")
        return stream

    def pinned(self, count: int) -> np.ndarray:
        """Allocate pinned memory for `count` images, which `infer` reads without a copy.

        Raises:
            UnavailableError: There is not enough memory.
        """
        return allocate_pinned_array(self._cuda, (count, *self.io.input.row), self.input_dtype)

    @contextlib.contextmanager
    def pipeline(self) -> Iterator[Pipeline]:
        """Take every context to keep several batches in flight.

        Other calls wait until the `with` block ends. Results that were not fetched are dropped.
        """
        with self._all_streams():
            if self._closed:
                raise InputError(f"{self.path}: infer: the session is closed")
            try:
                yield Pipeline(self._cuda, self.io, self._streams, self._errors)
            finally:
                with self._cuda.active():
                    for stream in self._streams:
                        stream.discard()

    def timings(self) -> dict[str, float]:
        """Return the milliseconds of the last call's last chunk.

        `h2d`, `compute` and `d2h` are measured by events on the GPU, `enqueue` on the host. A
        copy that was not needed took 0. Empty before the first call and without `timings=True`.
        """
        stream = self._last_stream
        if stream is None or self._closed:
            return {}
        with self._all_streams(), self._cuda.active():
            return stream.timings()

    @contextlib.contextmanager
    def _all_streams(self) -> Iterator[None]:
        """Wait until no call is running, and block new calls."""
        with self._closing:
            streams = [] if self._closed else self._collect()
            try:
                yield
            finally:
                for stream in streams:
                    self._free.put(stream)

    def _collect(self) -> list[ExecutionStream | None]:
        """Take every stream as it becomes free; put them back if the wait is interrupted."""
        streams: list[ExecutionStream | None] = []
        try:
            while len(streams) < len(self._streams):
                streams.append(self._free.get())
        except BaseException:
            for stream in streams:
                self._free.put(stream)
            raise
        return streams

    def timeline(self, images: np.ndarray) -> list[dict[str, Span]]:
        """Run a batch and return when each chunk was copied and computed.

        Returns:
            For each chunk "h2d", "compute" and "d2h" as (begin, end) in milliseconds since the
            start of the call, measured by events.

        Raises:
            InputError: The backend was not loaded with `timings=True`.
        """
        if not self._timed:
            raise InputError(
                "the backend records no events, which a timeline needs",
                fix="load with timings=True",
            )
        stream = self._take_stream()
        try:
            with self._cuda.active():
                self._errors.clear()
                batch = check_images(self.io, images, stream.compute)
                results = make_results(self.io, None, len(batch), stream.compute)
                timeline = stream.timeline(batch, results)
            self._last_stream = stream
        finally:
            self._free.put(stream)
        return timeline

    def watch(self, profiler: Any) -> None:
        """Make an IProfiler report the time of every layer. Calls become synchronous.

        Raises:
            InputError: The backend uses CUDA graphs, inside of which IProfiler reports no layers.
        """
        if self.graphs != "none":
            raise InputError(
                "layers cannot be timed inside a CUDA graph", fix="load with graphs=False"
            )
        with self._all_streams():
            for stream in self._streams:
                stream.watch(profiler)

    def close(self) -> None:
        """Wait for running calls, save the compiled kernels, and free everything.

        Calling it twice is fine.
        """
        with self._closing:
            if self._closed:
                return
            self._collect()
            self._closed = True
            self._free.put(None)
            # With graphs, loading has already run some batch sizes.
            has_run = self._last_stream is not None or self.graphs != "none"
            self._last_stream = None
            self._streams.clear()
            self._release(save=has_run)

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


class Pipeline:
    """Keeps batches in flight: while the GPU computes one, the next one is enqueued.

    `TrtBackend.pipeline` creates it. Results come in the order of the batches. It is for one
    thread. If a call of CUDA or TensorRT fails, every batch in flight is lost.

    Attributes:
        depth: Number of batches in flight from which on `put` waits: two for each stream.
    """

    def __init__(
        self, cuda: Cuda, io: IoSpec, streams: list[ExecutionStream], errors: ErrorLog
    ) -> None:
        self.depth = 2 * len(streams)
        self._cuda, self._io, self._errors = cuda, io, errors
        self._streams = deque(streams)
        self._busy: deque[ExecutionStream] = deque()
        self._last: ExecutionStream | None = None

    def put(self, images: Any) -> None:
        """Enqueue a batch.

        Args:
            images: As for `TrtBackend.infer`. In pinned memory or on the GPU, they must not
                change before `get` has returned their result.

        Raises:
            InputError: Wrong type or shape.
            UnavailableError: A call of CUDA or TensorRT failed.
        """
        stream = self._streams[0]
        with self._cuda.active():
            self._errors.clear()
            batch = check_images(self._io, images, stream.compute)
            results = make_results(self._io, None, len(batch), stream.compute)
            try:
                stream.enqueue(batch, results)
            except BaseException:
                self._discard()
                raise
        self._streams.rotate(-1)
        self._busy.append(stream)

    def get(self) -> Any:
        """Wait for the oldest batch in flight and return its result, as `infer` does.

        Raises:
            InputError: No batch is in flight.
            UnavailableError: A call of CUDA failed.
        """
        if not self._busy:
            raise InputError("no batch is in flight", fix="call put before get")
        self._last = self._busy.popleft()
        with self._cuda.active():
            try:
                results = self._last.finish()
            except BaseException:
                self._discard()
                raise
        return results[0] if len(results) == 1 else tuple(results)

    def _discard(self) -> None:
        """Wait for every batch in flight and drop the results."""
        self._busy.clear()
        for stream in self._streams:
            stream.discard()

    def timings(self) -> dict[str, float]:
        """Return the milliseconds of the last result's parts. See `TrtBackend.timings`.

        Also empty if more than `depth` batches were in flight.
        """
        if self._last is None:
            return {}
        with self._cuda.active():
            return self._last.timings()
