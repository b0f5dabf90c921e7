"""What one call runs on: CUDA streams, buffers on both sides, and execution contexts.

A batch of numpy images that fits the largest profile takes the short path: one copy into pinned
memory, then copy in, engine and copy out on one stream (for `tensorrt` as one CUDA graph), one
wait, and one copy of the result. Nothing else happens there: no events, no queries of the driver.

A larger batch is split into chunks, whose copies run on a second stream: while one chunk is
computed, the next one is copied in and the last one out, ordered by events.

          copies   in 0   in 1          out 0  in 2         out 1
         compute          chunk 0       chunk 1             chunk 2

Batches that are enqueued with `enqueue` before the one before has been waited for overlap in the
same way.

Does not know the modules of TensorRT and CUDA: contexts are created by a function it is given.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtresnet.core.errors import UnavailableError
from rtresnet.runtime.arguments import Array, make_results
from rtresnet.runtime.cuda import Cuda, host_view
from rtresnet.runtime.device_array import DeviceArray
from rtresnet.runtime.io_spec import PADDED_UP_TO, BatchChunk, IoSpec, TensorSpec, split_batch

ALIGNMENT = 256  # of a tensor's address, as TensorRT asks for
GRAPH_CONTEXTS = 16  # batch sizes that keep a context and a graph of their own, per stream
WARMED = (1, 2, 4, 8, 16, 32)  # batch sizes that are prepared when a plan is loaded
PINNED_FROM = 1 << 18  # bytes: copying less than this is cheaper than asking whether it is pinned
Span = tuple[float, float]
GraphKey = tuple[int, int, int]  # profile, batch size, index of the buffers


class BoundContext:
    """An execution context with the shape and the addresses that it was last given.

    Attributes:
        has_run: Whether it has executed; what TensorRT does at the first time cannot be captured.
        settled: Whether it is known if its batch size can be a CUDA graph.
        whole: Graph of copy in, engine and copy out, or None.
        engine: Graph of the engine, or None.
    """

    def __init__(self, context: Any, io: IoSpec, check_call: Callable[[object, str], None]) -> None:
        self.context = context
        self.has_run = self.settled = False
        self.whole: Any = None
        self.engine: Any = None
        self._io, self._check_call = io, check_call
        self._run = 0
        self._addresses: dict[str, int] = {}
        self._bound: tuple[int, tuple[int, ...]] | None = None

    def bind(self, run: int, addresses: tuple[int, ...]) -> None:
        """Sets the batch size and the addresses of input and outputs where they have changed."""
        if self._bound == (run, addresses):
            return
        self._bound = None  # unknown, should a call fail
        if self._run != run:
            self._run = 0
            shape = (run, *self._io.input.row)
            name = self._io.input.name
            self._check_call(self.context.set_input_shape(name, shape), f"set_input_shape({shape})")
            self._run = run
        for tensor, address in zip((self._io.input, *self._io.outputs), addresses, strict=True):
            if self._addresses.get(tensor.name) != address:
                done = self.context.set_tensor_address(tensor.name, address)
                self._check_call(done, f"set_tensor_address({tensor.name})")
                self._addresses[tensor.name] = address
        self._bound = run, addresses

    def execute(self, stream: int) -> None:
        """Enqueues the engine on a stream."""
        if not self.context.execute_async_v3(stream):
            self._check_call(False, "execute_async_v3")
        self.has_run = True


class IOBuffers:
    """Memory for the largest batch, pinned and on the GPU, and the events of the chunk in it.

    Attributes:
        addresses: Of input and outputs on the GPU, as a context takes them.
        dirty: Rows of `host_in` that may hold images; those after are zeros.
        chunk: The chunk under way, or None.
        results: The arrays that its rows go to.
        source: Address that the chunk is computed from.
        spans: Events between which a part of the chunk ran, by its name; empty without timing.
        enqueue: Milliseconds the host took to enqueue the chunk.
    """

    def __init__(
        self, cuda: Cuda, io: IoSpec, *, timed: bool, blocking: bool, stack: ExitStack
    ) -> None:
        def event(timing: bool, blocking: bool = False) -> Any:
            made = cuda.event(timing, blocking)
            stack.callback(cuda.destroy_event, made)
            return made

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
        """Zeros the rows of `host_in` from `rows` up to `run`; those before will be written."""
        if rows > self.dirty:
            self.dirty = rows
        elif rows < run and rows < self.dirty:
            self.host_in[rows : self.dirty] = 0
            self.dirty = rows


@dataclass(frozen=True, eq=False)
class _Call:
    """Everything about a batch size that does not change from call to call.

    Attributes:
        count: Rows.
        chunks: How they are split. What follows is for a batch of one chunk.
        keys: Profile, batch size and buffers that it runs in, for both sets of buffers.
        copy_in: Target, source, size in bytes with padding, and stream.
        copies_out: The same for each output.
        host_in: The rows of pinned memory that the images are copied into.
        host_out: Those that each result is copied from.
        results: Functions that copy one of them into a new array of the type that is returned.
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
        make_context: Profile, scratch address, stream, and whether only this stream's own buffers
            will be bound, to an execution context in that profile.
        check_call: Takes what a call of TensorRT returned and its name, raises where it failed.
        capture: Whether to capture CUDA graphs; None: where they are possible.
        built_in: Whether TensorRT-RTX captures them; None: where it can.
        pad: Whether batches are padded, so that fewer sizes need a context.
        timed: Whether `timings` and `timeline` are available.
        blocking: Whether a thread that waits for the GPU sleeps; otherwise it spins.
        stack: Frees everything that is made here, last made first.

    Raises:
        UnavailableError: A call failed; or graphs were asked for and are not possible.
    """

    def __init__(
        self,
        cuda: Cuda,
        io: IoSpec,
        make_context: Callable[[int, int, int, bool], Any],
        check_call: Callable[[object, str], None],
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
        self.capture, self.built_in = capture, built_in
        self._timed, self._blocking = timed, blocking
        self.compute, self._copies = self._stream(stack), self._stream(stack)
        self._external = cuda.event(False, False)  # what other libraries' streams have to do first
        stack.callback(cuda.destroy_event, self._external)
        self._zero = cuda.event(True, False)
        stack.callback(cuda.destroy_event, self._zero)
        self._scratch = allocate(cuda, io.scratch, stack)
        self.buffers = [
            IOBuffers(cuda, io, timed=timed, blocking=blocking, stack=stack) for _ in range(2)
        ]
        self._last: IOBuffers | None = None
        self._trace: list[dict[str, Span]] | None = None
        self._turn = 0  # index of the buffers that the next chunk goes to
        self._unfetched: IOBuffers | None = None  # enqueued but for the copy out
        # Images and results that were enqueued; the images' memory is read until they are finished.
        self._pending: deque[tuple[Array, Sequence[Array]]] = deque()
        self._calls: dict[int, _Call] = {}
        # TensorRT-RTX keeps one graph a context, and TensorRT's reads its context: one context for
        # each batch size and set of buffers. The one used longest ago comes first.
        self._graph_contexts: OrderedDict[GraphKey, BoundContext] = OrderedDict()
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
        while self._graph_contexts:
            self._release(self._graph_contexts.popitem()[1])
        self._calls.clear()
        self._plain.clear()

    def _release(self, bound: BoundContext) -> None:
        """Destroys a context's graphs before it."""
        for graph in (bound.whole, bound.engine):
            if graph is not None:
                self._cuda.destroy_graph(graph)

    @property
    def has_graphs(self) -> bool:
        """Whether batches run as CUDA graphs, whoever captures them."""
        return self.capture is not False or self.built_in is not False

    def _warm_up(self) -> None:
        """Prepares the usual batch sizes, so that no caller waits for kernels or a capture."""
        for count in WARMED:
            if not self.has_graphs or count > self._io.largest:
                return
            call = self._call(count)
            if call.keys[0] not in self._graph_contexts:
                bound = self._graph_context(call)
                assert bound is not None
                self._enqueue_staged(call, bound)
                self._cuda.synchronize(self.compute)
                self._settle(bound, call)

    def _call(self, count: int) -> _Call:
        call = self._calls.get(count)
        if call is None:
            chunks = split_batch(count, self._io.profiles, pad=self._pad)
            buffers, run, rows = self.buffers[0], chunks[0].run, chunks[0].rows
            outputs = self._io.outputs
            host_out = tuple(view[:rows] for view in buffers.host_out)
            call = self._calls[count] = _Call(
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
        """Computes a batch of any size and waits for it.

        Args:
            images: On the host, or on the GPU and then computed from where they are.
            results: One array an output, with as many rows as images; on the GPU they are written
                in place. None: numpy arrays are allocated.

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

    def _is_short(self, call: _Call, images: np.ndarray, results: Sequence[Array] | None) -> bool:
        if self._timed or len(call.chunks) > 1:
            return False
        if results is not None and any(isinstance(result, DeviceArray) for result in results):
            return False
        return images.nbytes < PINNED_FROM or not self._is_pinned(images)

    def _run_short(
        self, call: _Call, images: np.ndarray, results: Sequence[Array] | None
    ) -> Sequence[Array]:
        if self.buffers[0].dirty != call.count:
            self.buffers[0].make_room(call.count, call.chunks[0].run)
        call.host_in[...] = images
        bound = self._graph_context(call)
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
            return [copied() for copied in call.results]
        for result, view in zip(results, call.host_out, strict=True):
            result[...] = view  # type: ignore[index]  # none is on the GPU
        return results

    def _enqueue_staged(self, call: _Call, bound: BoundContext) -> None:
        bound.bind(call.chunks[0].run, self.buffers[0].addresses)
        self._cuda.to_device(*call.copy_in)
        bound.execute(self.compute)
        for copy in call.copies_out:
            self._cuda.to_host(*copy)

    def _graph_context(self, call: _Call, index: int = 0) -> BoundContext | None:
        """The context of a batch size and set of buffers that runs as a graph; None: it does not.

        It runs plainly the first time, and is captured at the second call.
        """
        key = call.keys[index]
        bound = self._graph_contexts.get(key)
        if bound is not None:
            self._graph_contexts.move_to_end(key)
            if bound.settled or not bound.has_run:
                return bound
            self._settle(bound, call, index)
            return self._graph_contexts.get(key)
        profile, run = self._io.profiles[key[0]], key[1]
        usual = run <= PADDED_UP_TO or run in (profile.min, profile.opt, profile.max)
        if not self.has_graphs or not usual:
            return None
        if len(self._graph_contexts) == GRAPH_CONTEXTS:
            self._release(self._graph_contexts.popitem(last=False)[1])
        bound = self._graph_contexts[key] = self._context(key[0], owned=True)
        return bound

    def _settle(self, bound: BoundContext, call: _Call, index: int = 0) -> None:
        """Finds out whether a batch size that has run can be a graph, and captures it here."""
        bound.settled = True
        try:
            asked = getattr(bound.context, "is_stream_capturable", None)
            if asked is not None and not asked(self.compute):
                raise UnavailableError(
                    f"TensorRT does not let a batch of {call.keys[0][1]} be captured",
                    fix="build the plan again, or load it with graphs=False",
                )
            if self.capture is not False:
                if self._timed or index:
                    bound.engine = self._capture(lambda: bound.execute(self.compute))
                else:
                    bound.whole = self._capture(lambda: self._enqueue_staged(call, bound))
        except UnavailableError as error:
            if self.capture or self.built_in:
                raise
            self.capture = self.built_in = False
            while self._graph_contexts:
                self._release(self._graph_contexts.popitem()[1])
            warnings.warn(f"no CUDA graphs: {error}", RuntimeWarning, stacklevel=2)

    def _capture(self, enqueue: Callable[[], None]) -> Any:
        self._cuda.begin_capture(self.compute)
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(UnavailableError):  # whatever was captured is no graph
                self._cuda.destroy_graph(self._cuda.end_capture(self.compute))
            raise
        return self._cuda.end_capture(self.compute)

    def enqueue(self, images: Array, results: Sequence[Array]) -> None:
        """Starts a batch and returns; `finish` waits for it.

        Two chunks may be under way: where they are, this waits for the older one first.

        Args:
            images: As for `run`. On the GPU or in pinned memory, they must not be changed before
                the batch is finished.
            results: As for `run`.
        """
        try:
            self._start(self._call(len(images)), images, results, self._copies)
        except BaseException:
            self._drain()
            raise
        self._pending.append((images, results))

    def finish(self) -> Sequence[Array]:
        """Waits for the oldest batch that was enqueued, and returns its results."""
        try:
            _, results = self._pending[0]
            self._last = None  # where the buffers were needed before, the times are gone
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
        """Waits for every batch that was enqueued and not finished, and drops its results."""
        if self._pending:
            self._drain()

    def _run_chunks(self, call: _Call, images: Array, results: Sequence[Array]) -> None:
        """Any batch, by way of both streams where it has several chunks."""
        copies = self.compute if len(call.chunks) == 1 else self._copies
        self._turn = 0
        self._start(call, images, results, copies)
        last = self._unfetched
        self._fetch_last(copies)
        for buffers in (self.buffers[self._turn], self.buffers[1 - self._turn]):
            self._finish(buffers)
        self._last = last

    def _start(self, call: _Call, images: Array, results: Sequence[Array], copies: int) -> None:
        """Enqueues a batch but for the last chunk's copy out, which `_fetch_last` enqueues."""
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
        """Whether the copy in can start from where the images are, without one on the host."""
        if isinstance(images, DeviceArray) or not images.flags.c_contiguous:
            return False
        return self._cuda.is_pinned(images.ctypes.data)

    def _mark(self, event: Any, stream: int) -> None:
        """Records an event that only tells the time."""
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
            copies = self.compute  # which the images' own stream is ordered before
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
        self, buffers: IOBuffers, call: _Call, results: Sequence[Array], copies: int
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
        began = time.perf_counter()
        self._enqueue(buffers, call, (buffers.source, *outputs))
        buffers.enqueue = (time.perf_counter() - began) * 1e3
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
        """Where an output is computed to: straight into the result, where it fits there."""
        if isinstance(result, DeviceArray) and chunk.run == chunk.rows:
            address = result.address + chunk.start * self._io.outputs[index].row_bytes
            if address % ALIGNMENT == 0:
                return address
        return buffers.device_out[index]

    def _enqueue(self, buffers: IOBuffers, call: _Call, addresses: tuple[int, ...]) -> None:
        chunk, bound = buffers.chunk, None
        assert chunk is not None
        if len(call.chunks) == 1 and addresses == buffers.addresses:
            bound = self._graph_context(call, self.buffers.index(buffers))
        if bound is not None and bound.settled and self.capture is not False:
            if bound.engine is None:
                bound.engine = self._capture(functools.partial(bound.execute, self.compute))
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
        """Waits for the chunk in a set of buffers, if any, and copies its rows into the results."""
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
        """Waits until nothing is writing to the buffers, and drops what was under way."""
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
        """Has an IProfiler report the time of every layer."""
        for bound in self._plain:
            bound.context.profiler = profiler

    def timings(self) -> dict[str, float]:
        """Milliseconds of the last chunk, by events, and of the host for `enqueue`."""
        if self._last is None or not self._timed:
            return {}
        spans = {name: self._cuda.elapsed(*span) for name, span in self._last.spans.items()}
        return {"h2d": 0.0, "compute": 0.0, "d2h": 0.0} | spans | {"enqueue": self._last.enqueue}

    def timeline(self, images: Array, results: Sequence[Array]) -> list[dict[str, Span]]:
        """`run`, and when each chunk was copied and computed, in milliseconds from the start."""
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
    """Allocates GPU memory that the stack frees; 0 for none."""
    if not size:
        return 0
    address = cuda.allocate(size)
    stack.callback(cuda.free, address)
    return address
