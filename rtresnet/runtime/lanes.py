"""A lane: what one call needs for itself. Two streams, two sets of buffers, execution contexts.

A call that fits the largest profile runs on one stream: copy in, compute, copy out. A larger one
is split, and its copies run on the other stream: while one part is computed the next one is
copied in and the last one out, each waiting for what it needs by events, never by the clock.

          copies   in 0   in 1          out 0  in 2         out 1
         compute          part 0        part 1              part 2

Deliberately unaware of TensorRT's and CUDA's modules: contexts are made by a function it is given.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from rtresnet.errors import EnvironmentLack
from rtresnet.runtime.arguments import Array
from rtresnet.runtime.cuda import Cuda
from rtresnet.runtime.device_array import DeviceArray
from rtresnet.runtime.ends import Ends, Part, split
from rtresnet.runtime.slots import Bound, Slot, allocate, event

ALIGNMENT = 256  # of a tensor's address, as TensorRT asks for
MOST_GRAPHS = 16  # shapes a lane captures; more run without, for each keeps a context
Span = tuple[float, float]


class Lane:
    """Runs one call at a time; several lanes run several.

    Args:
        cuda: See `runtime.cuda`.
        ends: What goes in and comes out.
        make_context: profile, scratch address, stream, and whether all it will ever be bound to
            are the lane's own buffers, to an execution context in that profile.
        must: Takes what a call of TensorRT returned and its name, raises where it failed.
        graphs: Whether to capture a graph for each shape; None for where it is possible.
        stack: Gives back all that is made here, last made first.
    """

    def __init__(
        self,
        cuda: Cuda,
        ends: Ends,
        make_context: Callable[[int, int, int, bool], Any],
        must: Callable[[object, str], None],
        *,
        graphs: bool | None,
        stack: ExitStack,
    ) -> None:
        self._cuda, self._ends, self._must, self._stack = cuda, ends, must, stack
        self._make_context = make_context
        self.graphs = graphs
        self.compute, self.copies = self._stream(), self._stream()
        self._zero, self._theirs = event(cuda, stack), event(cuda, stack)
        self._scratch = allocate(cuda, ends.scratch, stack)
        self.slots = [Slot(cuda, ends, stack) for _ in range(2)]
        self._last: Slot | None = None
        self._trace: list[dict[str, Span]] | None = None
        self._profiler: Any = None
        self._captured: dict[tuple[int, int, int], Bound] = {}
        stack.callback(self._captured.clear)
        self.contexts: list[Any] = []
        stack.callback(self.contexts.clear)
        # A context a slot, and one without graphs for addresses that are not ours: TensorRT-RTX
        # keeps a graph of those it last saw. What not every call needs is made when one does.
        self._plain: dict[tuple[int, int], Bound] = {}
        stack.callback(self._plain.clear)
        for profile in range(len(ends.profiles)):
            self._plain[profile, 0] = self._context(profile)

    def _stream(self) -> int:
        stream = self._cuda.stream()
        self._stack.callback(self._cuda.destroy_stream, stream)
        return stream

    def _context(self, profile: int, ours: bool = True) -> Bound:
        context = self._make_context(profile, self._scratch, self.compute, ours)
        if self._profiler is not None:
            context.profiler = self._profiler
        self.contexts.append(context)
        return Bound(context, self._ends, self._must)

    def run(self, images: Array, results: Sequence[Array]) -> None:
        """Computes a call of any size and waits for it.

        Args:
            images: On the host, or on the GPU and then taken where they lie.
            results: One an output, as many rows as images; on the GPU they are written in place.
        """
        parts = split(len(images), self._ends.profiles)
        copies = self.compute if len(parts) == 1 else self.copies
        pinned = self._is_pinned(images)
        try:
            for array in (images, *results):
                if isinstance(array, DeviceArray) and array.after is not None:
                    self._cuda.record(self._theirs, array.after)
                    self._cuda.wait(self.compute, self._theirs)
            before: Slot | None = None
            for index, part in enumerate(parts):
                slot = self.slots[index % 2]
                self._finish(slot, results)
                self._feed(slot, part, images, copies, pinned)
                if before is not None:
                    self._fetch(before, results, copies)
                self._execute(slot, part, results, copies)
                before = slot
            assert before is not None
            self._fetch(before, results, copies)
            for slot in (self.slots[len(parts) % 2], before):
                self._finish(slot, results)
            self._last = before
        except BaseException:
            self._last = None
            self._calm()
            raise

    def _is_pinned(self, images: Array) -> bool:
        """Whether the copy in can start from where the images are, without one on the host."""
        if isinstance(images, DeviceArray) or not images.flags.c_contiguous:
            return False
        return self._cuda.is_pinned(images)

    def _feed(self, slot: Slot, part: Part, images: Array, copies: int, pinned: bool) -> None:
        cuda, row = self._cuda, self._ends.input.bytes
        slot.part, slot.source, slot.spans = part, slot.device_in, {}
        size, rest = part.rows * row, (part.run - part.rows) * row
        if isinstance(images, DeviceArray):
            address = images.address + part.start * row
            if not rest and address % ALIGNMENT == 0:
                slot.source = address
                return
            copies = self.compute  # which the images' own stream is ordered before
        else:
            piece = images[part.start : part.start + part.rows]
            if not pinned:
                np.copyto(slot.host_in[: part.rows], piece)
                piece = slot.host_in
        cuda.record(slot.begin, copies)
        if isinstance(images, DeviceArray):
            cuda.on_device(slot.device_in, address, size, copies)
        else:
            cuda.to_device(slot.device_in, piece, size, copies)
        if rest:
            cuda.zero(slot.device_in + size, rest, copies)
        cuda.record(slot.fed, copies)
        slot.spans["h2d"] = (slot.begin, slot.fed)

    def _execute(self, slot: Slot, part: Part, results: Sequence[Array], copies: int) -> None:
        cuda, start = self._cuda, slot.fed
        if slot.source != slot.device_in or copies != self.compute:
            if slot.source == slot.device_in:
                cuda.wait(self.compute, slot.fed)
            cuda.record(slot.started, self.compute)
            start = slot.started
        outputs = [self._target(slot, part, i, result) for i, result in enumerate(results)]
        began = time.perf_counter()
        self._enqueue(part, slot, outputs)
        slot.enqueue = (time.perf_counter() - began) * 1e3
        for index, (result, output) in enumerate(zip(results, outputs, strict=True)):
            if isinstance(result, DeviceArray) and output == slot.device_out[index]:
                row = self._ends.outputs[index].bytes
                target = result.address + part.start * row
                cuda.on_device(target, output, part.rows * row, self.compute)
        cuda.record(slot.computed, self.compute)
        slot.spans["compute"] = (start, slot.computed)

    def _target(self, slot: Slot, part: Part, index: int, result: Array) -> int:
        """Where an output is computed to: straight into the result, where it fits there."""
        if isinstance(result, DeviceArray) and part.run == part.rows:
            address = result.address + part.start * self._ends.outputs[index].bytes
            if address % ALIGNMENT == 0:
                return address
        return slot.device_out[index]

    def _enqueue(self, part: Part, slot: Slot, outputs: Sequence[int]) -> None:
        addresses = (slot.source, *outputs)
        ours = addresses == (slot.device_in, *slot.device_out)
        which = self.slots.index(slot) if ours else len(self.slots)
        bound = None
        if self.graphs is not False and ours:  # a graph is of fixed addresses
            bound = self._for_graph((part.profile, part.run, which))
            if bound is not None and bound.ran and bound.graph is None:
                self._capture(bound, part.run, addresses)
            if bound is not None and bound.graph is not None:
                self._cuda.launch(bound.graph, self.compute)
                return
        if bound is None:
            bound = self._plain.get((part.profile, which))
        if bound is None:
            bound = self._plain[part.profile, which] = self._context(part.profile, ours)
        bound.bind(part.run, addresses)
        bound.execute(self.compute)

    def _for_graph(self, key: tuple[int, int, int]) -> Bound | None:
        """A context for one graph only: another shape would change what the graph reads.

        It runs plainly the first time, when TensorRT does what cannot be captured.
        """
        if key not in self._captured and len(self._captured) < MOST_GRAPHS:
            self._captured[key] = self._context(key[0])
        return self._captured.get(key)

    def _capture(self, known: Bound, run: int, addresses: Sequence[int]) -> None:
        cuda = self._cuda
        try:
            known.bind(run, addresses)
            cuda.begin_capture(self.compute)
            try:
                known.execute(self.compute)
            except BaseException:
                with contextlib.suppress(EnvironmentLack):  # whatever was captured is no graph
                    cuda.destroy_graph(cuda.end_capture(self.compute))
                raise
            known.graph = cuda.end_capture(self.compute)
            self._stack.callback(cuda.destroy_graph, known.graph)
        except EnvironmentLack as error:
            if self.graphs:
                raise
            self.graphs = False
            warnings.warn(f"no CUDA graphs: {error}", RuntimeWarning, stacklevel=2)

    def _fetch(self, slot: Slot, results: Sequence[Array], copies: int) -> None:
        cuda, part = self._cuda, slot.part
        assert part is not None
        hosts = [i for i, result in enumerate(results) if not isinstance(result, DeviceArray)]
        if not hosts:
            cuda.record(slot.done, self.compute)
            return
        leaving = slot.computed
        if copies != self.compute:
            cuda.wait(copies, slot.computed)
            cuda.record(slot.leaving, copies)
            leaving = slot.leaving
        for index in hosts:
            size = part.rows * self._ends.outputs[index].bytes
            cuda.to_host(slot.host_out[index], slot.device_out[index], size, copies)
        cuda.record(slot.done, copies)
        slot.spans["d2h"] = (leaving, slot.done)

    def _finish(self, slot: Slot, results: Sequence[Array]) -> None:
        """Waits for the part that is in a slot, if any, and hands its rows over."""
        part = slot.part
        if part is None:
            return
        self._cuda.join(slot.done)
        for index, result in enumerate(results):
            if not isinstance(result, DeviceArray):
                rows = slot.host_out[index][: part.rows]
                np.copyto(result[part.start : part.start + part.rows], rows)
        if self._trace is not None:
            elapsed = functools.partial(self._cuda.elapsed, self._zero)
            spans = slot.spans.items()
            self._trace.append({what: (elapsed(a), elapsed(b)) for what, (a, b) in spans})
        slot.part = None

    def _calm(self) -> None:
        """After a failure: nothing may still be writing when the buffers are used again."""
        try:
            for stream in (self.copies, self.compute):
                with contextlib.suppress(EnvironmentLack):
                    self._cuda.synchronize(stream)
        finally:
            for slot in self.slots:
                slot.part = None

    def watch(self, profiler: Any) -> None:
        """Has an IProfiler told the time of every layer."""
        self._profiler = profiler
        for context in self.contexts:
            context.profiler = profiler

    def timings(self) -> dict[str, float]:
        """Milliseconds of the last part, by events, and of the host for `enqueue`."""
        if self._last is None:
            return {}
        found = {what: self._cuda.elapsed(*span) for what, span in self._last.spans.items()}
        return {"h2d": 0.0, "compute": 0.0, "d2h": 0.0} | found | {"enqueue": self._last.enqueue}

    def timeline(self, images: Array, results: Sequence[Array]) -> list[dict[str, Span]]:
        """`run`, and when each part was copied and computed, in milliseconds from the start."""
        trace: list[dict[str, Span]] = []
        self._trace = trace
        try:
            self._cuda.record(self._zero, self.copies)
            self._cuda.wait(self.compute, self._zero)
            self.run(images, results)
        finally:
            self._trace = None
        return trace
