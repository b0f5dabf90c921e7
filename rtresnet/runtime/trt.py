"""TensorRT and TensorRT-RTX plans. The only file of the runtime that runs either.

What is known is checked first: the sidecar before anything is deserialized (`fits.py`), then what
TensorRT-RTX says of the plan's header (`rtx.py`), then the memory. Everything a call needs is made
when the plan is loaded, in `lanes.py`, which also has the order of copies and computation.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rtresnet import machine
from rtresnet.errors import EnvironmentLack, InputError, missing_package
from rtresnet.runtime.arguments import make_results, take
from rtresnet.runtime.complaints import Complaints, logger
from rtresnet.runtime.configs import configure
from rtresnet.runtime.cuda import open_cuda
from rtresnet.runtime.ends import Ends
from rtresnet.runtime.ends import read as read_ends
from rtresnet.runtime.fits import check_compatible
from rtresnet.runtime.lanes import Lane, Span
from rtresnet.runtime.rtx import REBUILD, KernelCache, check_header
from rtresnet.sidecar import Sidecar


class TrtBackend:
    """A plan on a GPU. See `runtime.backend.Backend`. Takes calls from several threads.

    Args:
        path: The plan.
        sidecar: Its sidecar, where there is one.
        contexts: Calls that may run at the same time, each with buffers of its own; one more
            waits for its turn.
        graphs: CUDA graphs, one a batch size. None: where they are possible; True: or an error;
            False: none. TensorRT-RTX captures them itself, for `tensorrt` it is done here, for the
            first 16 batch sizes of numpy images.
        kernels: When TensorRT-RTX compiles those of a new batch size: "eager" or "lazy".
        cache: Whether TensorRT-RTX's compiled kernels are read from and written to `cache_path`.

    Attributes:
        profiles: The plan's optimization profiles.
        graphs: "built in", "by hand" or "none".

    Raises:
        EnvironmentLack: No GPU, no TensorRT, too little memory, or TensorRT does not accept it.
        ArtifactError: Version or target do not match, or what goes in and out is not a net's.
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
    ) -> None:
        if contexts < 1:
            raise InputError(f"contexts is {contexts}, at least 1 is needed")
        check_compatible(path, sidecar)
        name = sidecar.plan.builder if sidecar and sidecar.plan else "tensorrt_rtx"
        # Without a device TensorRT ends the process where it should raise: this asks for one.
        self._cuda = open_cuda()
        if not machine.installed(name):
            raise missing_package(machine.DISTRIBUTIONS[name], "running a plan")
        trt = importlib.import_module(name)
        self.path = Path(path)
        self.provider = "TensorRT-RTX" if name == "tensorrt_rtx" else "TensorRT"
        self.packages: tuple[str, ...] = (
            "tensorrt-rtx-cu13" if name == "tensorrt_rtx" else "tensorrt",
        )
        self.device = machine.gpus()[0].name
        self._complaints = Complaints()
        self._stack = ExitStack()
        self._lanes: list[Lane] = []
        self._free: queue.LifoQueue[Lane | None] = queue.LifoQueue()
        self._closing, self._closed = threading.Lock(), False
        self._last_lane: Lane | None = None
        self._engine: Any = None
        self._cache: KernelCache | None = None
        self._built_in = False
        try:
            with self._cuda.active():
                self._load(trt, contexts, graphs, kernels, cache)
        except BaseException as error:
            self._closed = True
            traceback.clear_frames(error.__traceback__)  # which hold contexts and the engine
            with contextlib.suppress(EnvironmentLack):  # the first failure is the one to tell
                self._release()
            raise

    def _load(
        self, trt: Any, contexts: int, graphs: bool | None, kernels: str, cache: bool
    ) -> None:
        cuda = self._cuda
        log = logger(trt, self._complaints)
        runtime = trt.Runtime(log)
        data = self.path.read_bytes()
        check_header(trt, runtime, data, self.path)
        self._hold_memory(len(data), "its weights")
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise EnvironmentLack(
                f"{self.path}: {self.provider} {trt.__version__} does not accept this plan on "
                f"{self.device}: {self._complaints.take()}",
                fix=REBUILD,
            )
        self._engine = engine
        # Lanes hold contexts, contexts need the engine, the engine the runtime and its logger.
        self._stack.callback(self._forget, [log, runtime, engine])
        del data, log, runtime
        self.ends = ends = read_ends(trt, engine, self.path)
        self._describe(ends)
        self._hold_memory(
            contexts * ends.lane_bytes,
            f"{contexts} x activations and buffers for batches of up to {ends.largest}",
        )
        configs = configure(
            trt, engine, self._must,
            graphs=graphs,
            binding_has_graphs=cuda.graphs,
            kernels=kernels,
            kernels_beside=self.path if cache else None,
        )  # fmt: skip
        self._built_in, self._cache = configs.built_in, configs.cache
        self._complaints.clear()  # of what a cache that does not fit made it say
        self._stack.callback(self._forget, [configs.cache])
        ours_config, theirs_config, by_hand = configs.ours, configs.theirs, configs.by_hand
        del configs  # what makes contexts must not hold the cache

        def make_context(profile: int, scratch: int, stream: int, ours: bool) -> Any:
            context = engine.create_execution_context(ours_config if ours else theirs_config)
            self._must(context, "create_execution_context")
            if scratch:
                context.set_device_memory(scratch, ends.scratch)
            switched = context.set_optimization_profile_async(profile, stream)
            self._must(switched, f"set_optimization_profile_async({profile})")
            cuda.synchronize(stream)
            return context

        for _ in range(contexts):
            lane = Lane(
                cuda,
                ends,
                make_context,
                self._must,
                graphs=by_hand,
                stack=self._stack,
            )
            self._lanes.append(lane)
            self._free.put(lane)

    def _describe(self, ends: Ends) -> None:
        row = ends.input.row
        self.profiles = ends.profiles
        self.largest = ends.largest
        self.smallest = min(profile.min for profile in ends.profiles)
        self.input_dtype: np.dtype[Any] = ends.input.dtype
        self.layout: Literal["nchw", "nhwc"] = "nchw" if row[0] == 3 else "nhwc"
        self.size: int | None = row[1]

    @property
    def graphs(self) -> str:
        """Who captures CUDA graphs: "built in", "by hand" or "none"."""
        if self._built_in:
            return "built in"
        return "by hand" if any(lane.graphs is not False for lane in self._lanes) else "none"

    def _forget(self, held: list[Any]) -> None:
        """Lets go of TensorRT's objects, last made first."""
        self._engine = self._cache = None
        while held:
            held.pop()

    def _hold_memory(self, needed: int, what: str) -> None:
        free, total = self._cuda.memory()
        if needed > free:
            raise EnvironmentLack(
                f"{self.path}: {what} need {needed / 1e6:,.0f} MB on {self.device}, and "
                f"{free / 1e6:,.0f} of {total / 1e6:,.0f} MB are free",
                fix="fewer contexts, or build it with a smaller --batch maximum",
            )

    def _must(self, returned: object, call: str) -> None:
        """Most calls of TensorRT that fail only log, and return False or None."""
        if returned is None or returned is False:
            raise EnvironmentLack(
                f"{self.path}: {call} failed on {self.device}: {self._complaints.take()}"
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
            EnvironmentLack: A call of CUDA or TensorRT failed; the message names it.
        """
        with self._lane() as lane:
            given = take(self.ends, images, lane.compute)
            results = make_results(self.ends, out, len(given), lane.compute)
            lane.run(given, results)
        if out is not None:
            return out
        return results[0] if len(results) == 1 else tuple(results)

    @contextlib.contextmanager
    def _lane(self) -> Iterator[Lane]:
        lane = self._free.get()
        if lane is None:
            self._free.put(None)  # for the next one who asks
            raise InputError(f"{self.path}: infer after close")
        try:
            self._complaints.clear()
            with self._cuda.active():
                yield lane
            self._last_lane = lane
        finally:
            self._free.put(lane)

    def timings(self) -> dict[str, float]:
        """Milliseconds of the last call's last part; empty before the first.

        `h2d`, `compute` and `d2h` by events on the GPU, `enqueue` of the host, for handing the
        work over. What was not copied took 0.
        """
        last = self._last_lane
        if last is None or self._closed:
            return {}
        with self._all_lanes(), self._cuda.active():
            return last.timings()

    @contextlib.contextmanager
    def _all_lanes(self) -> Iterator[None]:
        """Waits until no call is running, and holds new ones back."""
        with self._closing:
            taken = [] if self._closed else self._collect()
            try:
                yield
            finally:
                for lane in taken:
                    self._free.put(lane)

    def _collect(self) -> list[Lane | None]:
        """Every lane, as they come free; none is lost where the wait is interrupted."""
        taken: list[Lane | None] = []
        try:
            while len(taken) < len(self._lanes):
                taken.append(self._free.get())
        except BaseException:
            for lane in taken:
                self._free.put(lane)
            raise
        return taken

    def timeline(self, images: np.ndarray) -> list[dict[str, Span]]:
        """Runs a batch and tells when each part was copied and computed.

        Returns:
            For each part "h2d", "compute" and "d2h" as (begin, end) in milliseconds since the
            call, by events: where they overlap, they did.
        """
        with self._lane() as lane:
            given = take(self.ends, images, lane.compute)
            return lane.timeline(given, make_results(self.ends, None, len(given), lane.compute))

    def watch(self, profiler: Any) -> None:
        """Has an IProfiler told the time of every layer from now on; each run is then waited for.

        Raises:
            InputError: The backend has CUDA graphs, which have no layers; load with graphs=False.
        """
        if self.graphs != "none":
            raise InputError("layers cannot be timed inside a CUDA graph: load with graphs=False")
        with self._all_lanes():
            for lane in self._lanes:
                lane.watch(profiler)

    def close(self) -> None:
        """Waits for calls that run, keeps the compiled kernels, frees everything.

        Calling it twice is fine.
        """
        with self._closing:
            if self._closed:
                return
            self._collect()
            self._closed = True
            self._free.put(None)
            cache = self._cache if self._last_lane is not None else None
            self._last_lane = None
            self._lanes.clear()
            self._release(cache)

    def _release(self, cache: KernelCache | None = None) -> None:
        """Frees everything, also on a device that is lost and refuses each call."""
        try:
            with self._cuda.active():
                try:
                    if cache is not None:
                        cache.save()
                finally:
                    self._stack.close()
        finally:
            self._stack.close()  # of what is left: all of it, where the device was refused already
