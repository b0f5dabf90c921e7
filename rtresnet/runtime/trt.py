"""Run the plans of classifiers with TensorRT or TensorRT-RTX.

Loading creates everything that a call needs (`contexts.py`, `execution.py`), so that calls allocate
nothing.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from rtresnet.core.errors import InputError
from rtresnet.runtime.arrays import check_images, make_results
from rtresnet.runtime.contexts import configure_contexts
from rtresnet.runtime.cuda import Cuda, allocate_pinned_array
from rtresnet.runtime.execution import ExecutionStream, Span
from rtresnet.runtime.io_spec import IoSpec, read_io_spec
from rtresnet.runtime.trt_plan import ErrorLog, PlanBackend


class TrtBackend(PlanBackend):
    """A classifier's plan on a GPU. See `runtime.backend.Backend`. Takes calls of several threads.

    Attributes:
        profiles: The plan's optimization profiles.
        graphs: "built in", "by hand" or "none".
        in_flight: Number of batches that `pipeline` keeps in flight: two for each context.

    Raises:
        UnavailableError: See `PlanBackend`.
        ArtifactError: See `PlanBackend`, or the engine is not an image classifier.
    """

    def _load(
        self, trt: Any, contexts: int, graphs: bool | None, kernels: str, cache: bool
    ) -> None:
        self._streams: list[ExecutionStream] = []
        self._free: queue.SimpleQueue[ExecutionStream | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._last_stream: ExecutionStream | None = None
        self.in_flight = 2 * contexts
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
        copy that was not needed took 0. Empty before the first call, without `timings=True`, and
        after `close`.
        """
        with self._all_streams():
            stream = self._last_stream
            if stream is None:
                return {}
            with self._cuda.active():
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
