"""Run batches on a GPU: CUDA streams, buffers on host and device, and the order of the work.

A batch of NumPy images that fits the largest profile takes the short path: one copy into pinned
memory, then copy in, engine and copy out on one stream (for `tensorrt` as one CUDA graph), one
wait, and one copy of the result. The short path uses no events and does not query the driver.

A larger batch is split into chunks, whose copies run on a second stream: while one chunk is
computed, the next one is copied in and the last one out, ordered by events.

          copies   in 0   in 1          out 0  in 2         out 1
         compute          chunk 0       chunk 1             chunk 2

Batches that `enqueue` starts before the previous batch has finished overlap in the same way.

Imports neither TensorRT nor a CUDA binding: a function creates the contexts.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtresnet.core.errors import UnavailableError
from rtresnet.runtime.arrays import Array, DeviceArray, make_results
from rtresnet.runtime.contexts import (
    BoundContext,
    CheckCall,
    GraphContexts,
    GraphKey,
    MakeContext,
)
from rtresnet.runtime.cuda import Cuda, host_view
from rtresnet.runtime.io_spec import BatchChunk, IoSpec, TensorSpec, split_batch

ALIGNMENT = 256  # bytes: TensorRT requires it of a tensor's address
WARMED = (1, 2, 4, 8, 16, 32)  # batch sizes that are prepared when a plan is loaded
PINNED_FROM = 1 << 18  # bytes: copying less is cheaper than asking whether the memory is pinned
Span = tuple[float, float]


class IOBuffers:
    """Memory for the largest batch, pinned and on the GPU, and the events of its current chunk.

    Attributes:
        addresses: Addresses of input and outputs on the GPU, in the order that a context takes.
        dirty: Number of rows of `host_in` that may hold images; the rows after them are zeros.
        chunk: The chunk in progress, or None.
        results: The arrays that receive its rows.
        source: Address of the chunk's input.
        spans: Begin and end event of each part of the chunk by its name; empty without timing.
        enqueue: Milliseconds that the host took to enqueue the chunk.
    """

    def __init__(
        self, cuda: Cuda, io: IoSpec, *, timed: bool, blocking: bool, stack: ExitStack
    ) -> None:
        def event(timing: bool, blocking: bool = False) -> Any:
            handle = cuda.event(timing, blocking)
            stack.callback(cuda.destroy_event, handle)
            return handle

        def pinned(tensor: TensorSpec) -> tuple[int, np.ndarray]:
            size = tensor.row_bytes * io.largest
            address = cuda.allocate_pinned(size)
            stack.callback(cuda.free_pinned, address)
            memory = host_view(address, size).view(tensor.dtype)
            return address, memory.reshape(io.largest, *tensor.row)

        def device(tensor: TensorSpec) -> int:
            return allocate(cuda, tensor.row_bytes * io.largest, stack)

        self.fed, self.computed = event(timed), event(timed)
        self.done = event(timed, blocking)
        self.begin, self.started, self.leaving = (event(True) if timed else None for _ in range(3))
        self.host_in_address, self.host_in = pinned(io.input)
        self.host_in[:] = 0
        self.device_in = device(io.input)
        hosts = [pinned(output) for output in io.outputs]
        self.host_out_addresses = [address for address, _ in hosts]
        self.host_out = [view for _, view in hosts]
        self.device_out = [device(output) for output in io.outputs]
        self.addresses = (self.device_in, *self.device_out)
        self.dirty = 0
        self.chunk: BatchChunk | None = None
        self.results: Sequence[Array] = ()
        self.source = 0
        self.spans: dict[str, tuple[Any, Any]] = {}
        self.enqueue = 0.0

    def make_room(self, rows: int, run: int) -> None:
        """Set rows `rows` to `run` of `host_in` to zero; the caller writes the rows before them."""
        if rows > self.dirty:
            self.dirty = rows
        elif rows < run and rows < self.dirty:
            self.host_in[rows : self.dirty] = 0
            self.dirty = rows


@dataclass(frozen=True, eq=False)
class _CallTemplate:
    """The constant part of all calls with one batch size.

    Attributes:
        count: Number of rows.
        chunks: Chunks of the batch. The other attributes are for a batch of one chunk.
        keys: Keys of its contexts with a graph, for both sets of buffers.
        copy_in: Target, source, size in bytes with padding, and stream.
        copies_out: The same for each output.
        host_in: The rows of pinned memory that the images are copied into.
        host_out: The rows of pinned memory that each result is copied from.
        results: For each output a function that copies these rows into a new array of the type
            that is returned.
    """

    count: int
    chunks: tuple[BatchChunk, ...]
    keys: tuple[GraphKey, GraphKey]
    copy_in: tuple[int, int, int, int]
    copies_out: tuple[tuple[int, int, int, int], ...]
    host_in: np.ndarray
    host_out: tuple[np.ndarray, ...]
    results: tuple[Callable[[], np.ndarray], ...]


class ExecutionStream:
    """Runs one call at a time; several streams run several.

    Args:
        cuda: See `runtime.cuda`.
        io: The engine's input, outputs and profiles.
        make_context: See `MakeContext`.
        check_call: See `CheckCall`.
        capture: Whether to capture CUDA graphs here; None if possible.
        built_in: Whether TensorRT-RTX captures graphs; None if possible.
        pad: Whether batches are padded, so that fewer sizes need a context.
        timed: Whether `timings` and `timeline` are available.
        blocking: Whether a thread that waits for the GPU sleeps; otherwise it spins.
        stack: Frees everything that is created here, in reverse order.

    Raises:
        UnavailableError: A call failed; or graphs are required and not possible.
    """

    def __init__(
        self,
        cuda: Cuda,
        io: IoSpec,
        make_context: MakeContext,
        check_call: CheckCall,
        *,
        capture: bool | None = False,
        built_in: bool | None = False,
        pad: bool = False,
        timed: bool = False,
        blocking: bool = False,
        stack: ExitStack,
    ) -> None:
        self._cuda, self._io, self._check_call = cuda, io, check_call
        self._make_context, self._pad = make_context, pad
        self._timed, self._blocking = timed, blocking
        self.compute, self._copies = self._stream(stack), self._stream(stack)
        self._external = cuda.event(False, False)  # waits for work on other libraries' streams
        stack.callback(cuda.destroy_event, self._external)
        self._zero = cuda.event(True, False)
        stack.callback(cuda.destroy_event, self._zero)
        self._scratch = allocate(cuda, io.scratch, stack)
        self.buffers = [
            IOBuffers(cuda, io, timed=timed, blocking=blocking, stack=stack) for _ in range(2)
        ]
        self._last: IOBuffers | None = None
        self._trace: list[dict[str, Span]] | None = None
        self._turn = 0  # index of the buffers for the next chunk
        self._unfetched: IOBuffers | None = None  # enqueued without its copy out
        # Batches in progress; keeps the images alive, because the GPU may still read them.
        self._pending: deque[tuple[Array, Sequence[Array]]] = deque()
        self._calls: dict[int, _CallTemplate] = {}
        self.graphs = GraphContexts(
            cuda, io, self.compute, functools.partial(self._context, owned=True),
            self._enqueue_staged, capture=capture, built_in=built_in, engine_only=timed,
        )  # fmt: skip
        self._plain: list[BoundContext] = []
        stack.callback(self._release_contexts)
        for profile in range(len(io.profiles)):
            self._plain.append(self._context(profile, owned=False))
        self._warm_up()

    def _stream(self, stack: ExitStack) -> int:
        stream = self._cuda.stream()
        stack.callback(self._cuda.destroy_stream, stream)
        return stream

    def _context(self, profile: int, *, owned: bool) -> BoundContext:
        context = self._make_context(profile, self._scratch, self.compute, owned)
        return BoundContext(context, self._io, self._check_call)

    def _release_contexts(self) -> None:
        self.graphs.clear()
        self._calls.clear()
        self._plain.clear()
        del self._make_context  # refers to the engine, and `graphs` to this object

    def _warm_up(self) -> None:
        """Prepare the usual batch sizes, so that no caller waits for kernels or a capture."""
        for count in WARMED:
            if not self.graphs.enabled or count > self._io.largest:
                return
            call = self._call(count)
            if call.keys[0] not in self.graphs:
                bound = self.graphs.get(call.keys[0], call)
                assert bound is not None
                self._enqueue_staged(call, bound)
                self._cuda.synchronize(self.compute)
                self.graphs.settle(call.keys[0], call)

    def _call(self, count: int) -> _CallTemplate:
        call = self._calls.get(count)
        if call is None:
            chunks = split_batch(count, self._io.profiles, pad=self._pad)
            buffers, run, rows = self.buffers[0], chunks[0].run, chunks[0].rows
            outputs = self._io.outputs
            host_out = tuple(view[:rows] for view in buffers.host_out)
            call = self._calls[count] = _CallTemplate(
                count=count,
                chunks=chunks,
                keys=((chunks[0].profile, run, 0), (chunks[0].profile, run, 1)),
                copy_in=(
                    buffers.device_in, buffers.host_in_address, run * self._io.input.row_bytes,
                    self.compute,
                ),
                copies_out=tuple(
                    (host, device, run * output.row_bytes, self.compute)
                    for host, device, output in zip(
                        buffers.host_out_addresses, buffers.device_out, outputs, strict=True
                    )
                ),
                host_in=buffers.host_in[:rows],
                host_out=host_out,
                results=tuple(
                    view.copy if view.dtype == output.returned_dtype
                    else functools.partial(view.astype, output.returned_dtype)
                    for view, output in zip(host_out, outputs, strict=True)
                ),
            )  # fmt: skip
        return call

    def run(self, images: Array, results: Sequence[Array] | None = None) -> Sequence[Array]:
        """Compute a batch of any size and wait for it.

        Args:
            images: On the host, or on the GPU, where the engine reads them without a copy.
            results: One array for each output, with as many rows as images; on the GPU they are
                written in place. None allocates NumPy arrays.

        Returns:
            `results`, or the arrays that were allocated.
        """
        try:
            count = len(images)
            call = self._calls.get(count) or self._call(count)
            if not isinstance(images, DeviceArray) and self._is_short(call, images, results):
                return self._run_short(call, images, results)
            if results is None:
                results = make_results(self._io, None, count, self.compute)
            self._run_chunks(call, images, results)
        except BaseException:
            self._drain()
            raise
        return results

    def _is_short(
        self, call: _CallTemplate, images: np.ndarray, results: Sequence[Array] | None
    ) -> bool:
        if self._timed or len(call.chunks) > 1:
            return False
        if results is not None and any(isinstance(result, DeviceArray) for result in results):
            return False
        return images.nbytes < PINNED_FROM or not self._is_pinned(images)

    def _run_short(
        self, call: _CallTemplate, images: np.ndarray, results: Sequence[Array] | None
    ) -> Sequence[Array]:
        if self.buffers[0].dirty != call.count:
            self.buffers[0].make_room(call.count, call.chunks[0].run)
        call.host_in[...] = images
        bound = self.graphs.get(call.keys[0], call)
        if bound is not None and bound.whole is not None:
            self._cuda.launch(bound.whole, self.compute)
        else:
            self._enqueue_staged(call, bound or self._plain[call.chunks[0].profile])
        if self._blocking:
            self._cuda.record(self.buffers[0].done, self.compute)
            self._cuda.join(self.buffers[0].done)
        else:
            self._cuda.synchronize(self.compute)
        if results is None:
            return [copy() for copy in call.results]
        for result, view in zip(results, call.host_out, strict=True):
            result[...] = view  # type: ignore[index]  # none is on the GPU
        return results

    def _enqueue_staged(self, call: _CallTemplate, bound: BoundContext) -> None:
        bound.bind(call.chunks[0].run, self.buffers[0].addresses)
        self._cuda.to_device(*call.copy_in)
        bound.execute(self.compute)
        for copy in call.copies_out:
            self._cuda.to_host(*copy)

    def enqueue(self, images: Array, results: Sequence[Array]) -> None:
        """Start a batch and return; `finish` waits for it.

        At most two chunks are in progress. If there are two, this waits for the older one first.

        Args:
            images: As for `run`. On the GPU or in pinned memory, they must not change before the
                batch is finished.
            results: As for `run`.
        """
        try:
            self._start(self._call(len(images)), images, results, self._copies)
        except BaseException:
            self._drain()
            raise
        self._pending.append((images, results))

    def finish(self) -> Sequence[Array]:
        """Wait for the oldest batch that was enqueued, and return its results."""
        try:
            _, results = self._pending[0]
            self._last = None  # unknown if a later batch has used the buffers already
            if self._unfetched is not None and self._unfetched.results is results:
                self._fetch_last(self._copies)
            for buffers in (self.buffers[self._turn], self.buffers[1 - self._turn]):
                if buffers.results is results:
                    self._finish(buffers)
                    self._last = buffers
        except BaseException:
            self._drain()
            raise
        return self._pending.popleft()[1]

    def discard(self) -> None:
        """Wait for every batch that was enqueued and not finished, and drop its results."""
        if self._pending:
            self._drain()

    def _run_chunks(self, call: _CallTemplate, images: Array, results: Sequence[Array]) -> None:
        """Compute any batch; one of several chunks uses both streams."""
        copies = self.compute if len(call.chunks) == 1 else self._copies
        self._turn = 0
        self._start(call, images, results, copies)
        last = self._unfetched
        self._fetch_last(copies)
        for buffers in (self.buffers[self._turn], self.buffers[1 - self._turn]):
            self._finish(buffers)
        self._last = last

    def _start(
        self, call: _CallTemplate, images: Array, results: Sequence[Array], copies: int
    ) -> None:
        """Enqueue a batch without the last chunk's copy out, which `_fetch_last` enqueues."""
        cuda = self._cuda
        pinned = self._is_pinned(images)
        for array in (images, *results):
            if isinstance(array, DeviceArray) and array.after is not None:
                cuda.record(self._external, array.after)
                cuda.wait(self.compute, self._external)
        for chunk in call.chunks:
            buffers = self.buffers[self._turn]
            self._finish(buffers)
            self._feed(buffers, chunk, images, copies, pinned)
            buffers.results = results
            self._fetch_last(copies)
            self._execute(buffers, call, results, copies)
            self._unfetched = buffers
            self._turn = 1 - self._turn

    def _fetch_last(self, copies: int) -> None:
        if self._unfetched is not None:
            self._fetch(self._unfetched, copies)
            self._unfetched = None

    def _is_pinned(self, images: Array) -> bool:
        """Return whether the GPU can read the images where they are, without a copy on the host."""
        if isinstance(images, DeviceArray) or not images.flags.c_contiguous:
            return False
        return self._cuda.is_pinned(images.ctypes.data)

    def _mark(self, event: Any, stream: int) -> None:
        """Record an event that is used for timing only."""
        if event is not None:
            self._cuda.record(event, stream)

    def _feed(
        self, buffers: IOBuffers, chunk: BatchChunk, images: Array, copies: int, pinned: bool
    ) -> None:
        cuda, row = self._cuda, self._io.input.row_bytes
        buffers.chunk, buffers.source, buffers.spans = chunk, buffers.device_in, {}
        size, padding = chunk.rows * row, (chunk.run - chunk.rows) * row
        ordered = self._timed or copies != self.compute
        if isinstance(images, DeviceArray):
            address = images.address + chunk.start * row
            if not padding and address % ALIGNMENT == 0:
                buffers.source = address
                return
            copies = self.compute  # it waits for the images' own stream
            self._mark(buffers.begin, copies)
            cuda.on_device(buffers.device_in, address, size, copies)
        elif pinned:
            self._mark(buffers.begin, copies)
            address = images.ctypes.data + chunk.start * row
            cuda.to_device(buffers.device_in, address, size, copies)
        else:
            piece = images[chunk.start : chunk.start + chunk.rows]
            buffers.make_room(chunk.rows, chunk.run)
            buffers.host_in[: chunk.rows] = piece
            self._mark(buffers.begin, copies)
            size += padding
            cuda.to_device(buffers.device_in, buffers.host_in_address, size, copies)
            padding = 0
        if padding:
            cuda.zero(buffers.device_in + size, padding, copies)
        if ordered:
            cuda.record(buffers.fed, copies)
        if self._timed:
            buffers.spans["h2d"] = (buffers.begin, buffers.fed)

    def _execute(
        self, buffers: IOBuffers, call: _CallTemplate, results: Sequence[Array], copies: int
    ) -> None:
        cuda, chunk = self._cuda, buffers.chunk
        assert chunk is not None
        start = buffers.fed
        if buffers.source != buffers.device_in or copies != self.compute:
            if buffers.source == buffers.device_in:
                cuda.wait(self.compute, buffers.fed)
            self._mark(buffers.started, self.compute)
            start = buffers.started
        outputs = [self._target(buffers, chunk, i, result) for i, result in enumerate(results)]
        begin = time.perf_counter()
        self._enqueue(buffers, call, (buffers.source, *outputs))
        buffers.enqueue = (time.perf_counter() - begin) * 1e3
        for index, (result, output) in enumerate(zip(results, outputs, strict=True)):
            if isinstance(result, DeviceArray) and output == buffers.device_out[index]:
                row = self._io.outputs[index].row_bytes
                target = result.address + chunk.start * row
                cuda.on_device(target, output, chunk.rows * row, self.compute)
        if self._timed or copies != self.compute:
            cuda.record(buffers.computed, self.compute)
        if self._timed:
            buffers.spans["compute"] = (start, buffers.computed)

    def _target(self, buffers: IOBuffers, chunk: BatchChunk, index: int, result: Array) -> int:
        """Return the address that the engine writes an output to: the result itself if suitable."""
        if isinstance(result, DeviceArray) and chunk.run == chunk.rows:
            address = result.address + chunk.start * self._io.outputs[index].row_bytes
            if address % ALIGNMENT == 0:
                return address
        return buffers.device_out[index]

    def _enqueue(self, buffers: IOBuffers, call: _CallTemplate, addresses: tuple[int, ...]) -> None:
        chunk, bound = buffers.chunk, None
        assert chunk is not None
        if len(call.chunks) == 1 and addresses == buffers.addresses:
            bound = self.graphs.get(call.keys[self.buffers.index(buffers)], call)
        if bound is not None and bound.settled and self.graphs.capture is not False:
            if bound.engine is None:
                bound.engine = self.graphs.capture_engine(bound)
            self._cuda.launch(bound.engine, self.compute)
            return
        bound = bound or self._plain[chunk.profile]
        bound.bind(chunk.run, addresses)
        bound.execute(self.compute)

    def _fetch(self, buffers: IOBuffers, copies: int) -> None:
        cuda, chunk = self._cuda, buffers.chunk
        assert chunk is not None
        hosts = [
            i for i, result in enumerate(buffers.results) if not isinstance(result, DeviceArray)
        ]
        if not hosts:
            cuda.record(buffers.done, self.compute)
            return
        leaving = buffers.computed
        if copies != self.compute:
            cuda.wait(copies, buffers.computed)
            self._mark(buffers.leaving, copies)
            leaving = buffers.leaving
        for index in hosts:
            size = chunk.rows * self._io.outputs[index].row_bytes
            cuda.to_host(buffers.host_out_addresses[index], buffers.device_out[index], size, copies)
        cuda.record(buffers.done, copies)
        if self._timed:
            buffers.spans["d2h"] = (leaving, buffers.done)

    def _finish(self, buffers: IOBuffers) -> None:
        """Wait for the chunk in a set of buffers, if any, and copy its rows to the results."""
        chunk = buffers.chunk
        if chunk is None:
            return
        self._cuda.join(buffers.done)
        for index, result in enumerate(buffers.results):
            if not isinstance(result, DeviceArray):
                rows = buffers.host_out[index][: chunk.rows]
                result[chunk.start : chunk.start + chunk.rows] = rows
        if self._trace is not None:
            elapsed = functools.partial(self._cuda.elapsed, self._zero)
            spans = buffers.spans.items()
            self._trace.append({name: (elapsed(a), elapsed(b)) for name, (a, b) in spans})
        buffers.chunk, buffers.results = None, ()

    def _drain(self) -> None:
        """Wait until nothing writes to the buffers, and drop the batches in progress."""
        try:
            for stream in (self._copies, self.compute):
                with contextlib.suppress(UnavailableError):
                    self._cuda.synchronize(stream)
        finally:
            for buffers in self.buffers:
                buffers.chunk, buffers.results = None, ()
            self._unfetched, self._last = None, None
            self._pending.clear()

    def watch(self, profiler: Any) -> None:
        """Make an IProfiler report the time of every layer."""
        for bound in self._plain:
            bound.context.profiler = profiler

    def timings(self) -> dict[str, float]:
        """Return milliseconds of the last chunk by events, and of `enqueue` on the host."""
        if self._last is None or not self._timed:
            return {}
        spans = {name: self._cuda.elapsed(*span) for name, span in self._last.spans.items()}
        return {"h2d": 0.0, "compute": 0.0, "d2h": 0.0} | spans | {"enqueue": self._last.enqueue}

    def timeline(self, images: Array, results: Sequence[Array]) -> list[dict[str, Span]]:
        """Run a batch and return when each chunk was copied and computed, in milliseconds."""
        trace: list[dict[str, Span]] = []
        self._trace = trace
        try:
            self._cuda.record(self._zero, self._copies)
            self._cuda.wait(self.compute, self._zero)
            self.run(images, results)
        finally:
            self._trace = None
        return trace


def allocate(cuda: Cuda, size: int, stack: ExitStack) -> int:
    """Allocate GPU memory that the stack frees. Returns 0 if `size` is 0."""
    if not size:
        return 0
    address = cuda.allocate(size)
    stack.callback(cuda.free, address)
    return address
