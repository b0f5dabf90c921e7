"""TensorRT and TensorRT-RTX plans. The only file of the runtime that runs either.

Checks come first: the sidecar before anything is deserialized (`compatibility.py`), then what
TensorRT-RTX says of the plan's header (`rtx.py`), then the memory. Everything a call needs is
created when the plan is loaded, in `execution.py`, which also orders copies and computation.
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
from rtresnet.runtime.arguments import check_images, make_results
from rtresnet.runtime.compatibility import check_compatible
from rtresnet.runtime.context_config import configure
from rtresnet.runtime.cuda import Cuda, allocate_pinned_array, open_cuda
from rtresnet.runtime.error_log import ErrorLog, logger
from rtresnet.runtime.execution import ExecutionStream, Span
from rtresnet.runtime.io_spec import IoSpec, read_io_spec
from rtresnet.runtime.rtx import REBUILD, KernelCache, check_header


class TrtBackend:
    """A plan on a GPU. See `runtime.backend.Backend`. Takes calls from several threads.

    Args:
        path: The plan.
        sidecar: Its sidecar, or None.
        contexts: Calls that may run at the same time, each with its own buffers; one more waits
            for its turn.
        graphs: CUDA graphs, one a batch size. None: where they are possible; True: or an error;
            False: none. TensorRT-RTX captures them itself; for `tensorrt` they are captured here.
            Batches of numpy images of up to 32, and of a profile's own sizes, run as graphs.
        kernels: When TensorRT-RTX compiles the kernels of a new batch size: "eager" or "lazy".
        cache: Whether TensorRT-RTX's compiled kernels are read from and written to `cache_path`.
        timings: Whether `timings` and `timeline` are available. They cost some events and calls
            of the driver in every `infer`.
        blocking: Whether a thread that waits for the GPU sleeps. It then wakes up some tens of
            microseconds late, where spinning keeps a processor busy.

    Attributes:
        profiles: The plan's optimization profiles.
        graphs: "built in", "by hand" or "none".
        contexts: Calls that may run at the same time.
        in_flight: Batches that `pipeline` keeps in flight: two for each context.

    Raises:
        UnavailableError: No GPU, no TensorRT, too little memory, or TensorRT does not accept it.
        ArtifactError: Version or target do not match, or input and outputs are not those of a net.
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
            raise InputError(f"contexts is {contexts}, at least 1 is needed")
        check_compatible(path, sidecar)
        name = sidecar.plan.builder if sidecar and sidecar.plan else "tensorrt_rtx"
        # Without a device TensorRT ends the process where it should raise: this asks for one.
        self._cuda = open_cuda()
        trt = trt_loading.load_tensorrt(name)
        self.path = Path(path)
        self.provider = trt_loading.MODULES[name]
        # Several distributions bring the module, each under another name: it knows its version.
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
            traceback.clear_frames(error.__traceback__)  # which hold contexts and the engine
            with contextlib.suppress(UnavailableError):  # the first failure is the one to tell
                self._release()
            raise

    def _load(
        self, trt: Any, contexts: int, graphs: bool | None, kernels: str, cache: bool
    ) -> None:
        cuda = self._cuda
        log = logger(trt, self._errors)
        runtime = trt_loading.create(trt, "Runtime", log, self._errors.take)
        data = self.path.read_bytes()
        check_header(trt, runtime, data, self.path)
        self._check_memory(len(data), "its weights")
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            why = self._errors.take()
            raise UnavailableError(
                f"{self.path}: {self.provider} {trt.__version__} does not accept this plan on "
                f"{self.device}: {why}",
                fix=hardware.driver_fix(why) or REBUILD,
            )
        self._engine = engine
        # Contexts need the engine, the engine the runtime, the runtime its logger.
        self._stack.callback(self._forget, [log, runtime, engine])
        del data, log, runtime
        self.io = io = read_io_spec(trt, engine, self.path)
        self._describe(io)
        self._check_memory(
            contexts * io.stream_bytes,
            f"{contexts} x activations and buffers for batches of up to {io.largest}",
        )
        settings = configure(
            trt, engine, self._check_call,
            graphs=graphs,
            binding_has_graphs=cuda.graphs,
            kernels=kernels,
            cache_for=self.path if cache else None,
        )  # fmt: skip
        self._cache = settings.cache
        self._errors.clear()  # a cache of another GPU is replaced, and no failure
        self._stack.callback(self._forget, [settings.cache])
        owned_config, external_config = settings.owned, settings.external
        options: dict[str, Any] = {
            "capture": settings.capture, "built_in": settings.built_in, "pad": settings.pad,
            "timed": self._timed, "blocking": self._blocking, "stack": self._stack,
        }  # fmt: skip
        del settings  # the function below lives as long as its contexts, and the cache must not

        def make_context(profile: int, scratch: int, stream: int, owned: bool) -> Any:
            context = engine.create_execution_context(owned_config if owned else external_config)
            self._check_call(context, "create_execution_context")
            if scratch:
                context.set_device_memory(scratch, io.scratch)
            switched = context.set_optimization_profile_async(profile, stream)
            self._check_call(switched, f"set_optimization_profile_async({profile})")
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
        """Who captures CUDA graphs: "built in", "by hand" or "none"."""
        if any(stream.built_in is not False for stream in self._streams):
            return "built in"
        captured = any(stream.capture is not False for stream in self._streams)
        return "by hand" if captured else "none"

    def _forget(self, objects: list[Any]) -> None:
        """Drops TensorRT's objects, last created first."""
        self._engine = self._cache = None
        while objects:
            objects.pop()

    def _check_memory(self, needed: int, what: str) -> None:
        free, total = self._cuda.memory()
        if needed > free:
            raise UnavailableError(
                f"{self.path}: {what} need {needed / 1e6:,.0f} MB on {self.device}, and "
                f"{free / 1e6:,.0f} of {total / 1e6:,.0f} MB are free",
                fix="fewer contexts, or build it with a smaller --batch maximum",
            )

    def _check_call(self, returned: object, call: str) -> None:
        """Raises where a call of TensorRT failed: most only log, and return False or None."""
        if returned is None or returned is False:
            raise UnavailableError(
                f"{self.path}: {call} failed on {self.device}: {self._errors.take()}"
            )

    def infer(self, images: Any, out: Any = None) -> Any:
        """Runs a batch of any N from 1. See `runtime.backend.Backend.infer`.

        Args:
            images: `input_dtype` [N, 3, S, S], or [N, S, S, 3] as `layout` says: a numpy array;
                or anything on this GPU with DLPack or `__cuda_array_interface__`, C-contiguous,
                which is computed from where it lies. Pinned memory is not copied on the host.
            out: Where the result goes, of its shape and type, on the host or on this GPU; a tuple
                of two for a top-K plan. The call then allocates nothing.

        Returns:
            float32 logits [N, classes], or indices int64 [N, K] and probabilities float32 [N, K]
            of a top-K plan: numpy arrays, or `out` as it was given.

        Raises:
            InputError: Another type or shape, or the backend is closed.
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
        """Waits for a stream that is free; who takes it puts it back."""
        stream = self._free.get()
        if stream is None:
            self._free.put(None)  # for the next caller
            raise InputError(f"{self.path}: infer after close")
        return stream

    def pinned(self, count: int) -> np.ndarray:
        """Allocates pinned memory for `count` images, as `infer` reads them fastest.

        Raises:
            UnavailableError: Not enough memory.
        """
        return allocate_pinned_array(self._cuda, (count, *self.io.input.row), self.input_dtype)

    @contextlib.contextmanager
    def pipeline(self) -> Iterator[Pipeline]:
        """Takes every context, for batches that are enqueued before the last one is computed.

        Other calls wait until the `with` block ends. It drops what was not fetched.
        """
        with self._all_streams():
            if self._closed:
                raise InputError(f"{self.path}: infer after close")
            try:
                yield Pipeline(self._cuda, self.io, self._streams, self._errors)
            finally:
                with self._cuda.active():
                    for stream in self._streams:
                        stream.discard()

    def timings(self) -> dict[str, float]:
        """Milliseconds of the last call's last chunk; empty before the first.

        `h2d`, `compute` and `d2h` by events on the GPU, `enqueue` of the host, for handing the
        work over. What was not copied took 0. Empty unless loaded with `timings=True`.
        """
        last = self._last_stream
        if last is None or self._closed:
            return {}
        with self._all_streams(), self._cuda.active():
            return last.timings()

    @contextlib.contextmanager
    def _all_streams(self) -> Iterator[None]:
        """Waits until no call is running, and holds new ones back."""
        with self._closing:
            taken = [] if self._closed else self._collect()
            try:
                yield
            finally:
                for stream in taken:
                    self._free.put(stream)

    def _collect(self) -> list[ExecutionStream | None]:
        """Takes every stream as it becomes free; puts them back if the wait is interrupted."""
        taken: list[ExecutionStream | None] = []
        try:
            while len(taken) < len(self._streams):
                taken.append(self._free.get())
        except BaseException:
            for stream in taken:
                self._free.put(stream)
            raise
        return taken

    def timeline(self, images: np.ndarray) -> list[dict[str, Span]]:
        """Runs a batch and reports when each chunk was copied and computed.

        Returns:
            For each chunk "h2d", "compute" and "d2h" as (begin, end) in milliseconds since the
            call, by events.

        Raises:
            InputError: The backend was not loaded with `timings=True`.
        """
        if not self._timed:
            raise InputError("a timeline needs events: load with timings=True")
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
        """Has an IProfiler report the time of every layer from now on; runs become synchronous.

        Raises:
            InputError: The backend has CUDA graphs, where IProfiler reports no layers.
        """
        if self.graphs != "none":
            raise InputError("layers cannot be timed inside a CUDA graph: load with graphs=False")
        with self._all_streams():
            for stream in self._streams:
                stream.watch(profiler)

    def close(self) -> None:
        """Waits for running calls, saves the compiled kernels, frees everything.

        Calling it twice is fine.
        """
        with self._closing:
            if self._closed:
                return
            self._collect()
            self._closed = True
            self._free.put(None)
            # With graphs, some batch sizes have run when the plan was loaded.
            has_run = self._last_stream is not None or self.graphs != "none"
            self._last_stream = None
            self._streams.clear()
            self._release(save=has_run)

    def _release(self, *, save: bool = False) -> None:
        """Frees everything, also on a device that is lost and refuses each call."""
        try:
            with self._cuda.active():
                try:
                    # Nothing here may keep the cache: it goes before the engine and the runtime.
                    if save and self._cache is not None:
                        self._cache.save()
                finally:
                    self._stack.close()
        finally:
            self._stack.close()  # of what is left: all of it, where the device was refused already


class Pipeline:
    """Keeps batches in flight: while one is computed, the next one is enqueued.

    `TrtBackend.pipeline` makes it. Results come in the order of the batches. For one thread. A call
    of CUDA or TensorRT that fails loses every batch in flight.

    Attributes:
        depth: Batches that may be in flight before `put` waits for the GPU: two for each stream.
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
        """Enqueues a batch.

        Args:
            images: As for `TrtBackend.infer`. In pinned memory or on the GPU, they must not be
                changed before `get` has returned their result.

        Raises:
            InputError: Another type or shape.
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
        """Waits for the oldest batch in flight and returns its result, as `infer` does.

        Raises:
            InputError: There is none.
            UnavailableError: A call of CUDA failed.
        """
        if not self._busy:
            raise InputError("no batch is in flight: put comes before get")
        self._last = self._busy.popleft()
        with self._cuda.active():
            try:
                results = self._last.finish()
            except BaseException:
                self._discard()
                raise
        return results[0] if len(results) == 1 else tuple(results)

    def _discard(self) -> None:
        """After a failure: waits for every batch in flight and drops its results."""
        self._busy.clear()
        for stream in self._streams:
            stream.discard()

    def timings(self) -> dict[str, float]:
        """Milliseconds of the last result's parts. See `TrtBackend.timings`.

        Empty also where more than `depth` batches were in flight.
        """
        if self._last is None:
            return {}
        with self._cuda.active():
            return self._last.timings()
