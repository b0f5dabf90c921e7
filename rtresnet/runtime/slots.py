"""What a lane holds: buffers with their events, and contexts that know what they were last told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from rtresnet.runtime.cuda import Cuda
from rtresnet.runtime.ends import Ends, Part, Tensor


class Bound:
    """A context with the shape and the addresses it was last given."""

    def __init__(self, context: Any, ends: Ends, must: Callable[[object, str], None]) -> None:
        self.context = context
        self.graph: Any = None
        self.ran = False
        self._ends, self._must = ends, must
        self._run = 0
        self._addresses: dict[str, int] = {}

    def bind(self, run: int, addresses: Sequence[int]) -> None:
        """Tells the context the batch and where input and outputs lie, if that is news to it."""
        if self._run != run:
            self._run = 0  # unknown, should the call fail
            shape = (run, *self._ends.input.row)
            name = self._ends.input.name
            self._must(self.context.set_input_shape(name, shape), f"set_input_shape({shape})")
            self._run = run
        for tensor, address in zip((self._ends.input, *self._ends.outputs), addresses, strict=True):
            if self._addresses.get(tensor.name) != address:
                done = self.context.set_tensor_address(tensor.name, address)
                self._must(done, f"set_tensor_address({tensor.name})")
                self._addresses[tensor.name] = address

    def execute(self, stream: int) -> None:
        """Puts the work on a stream."""
        self._must(self.context.execute_async_v3(stream), "execute_async_v3")
        self.ran = True


class Slot:
    """Buffers for the largest batch on both sides, and the events of the part that is in them."""

    def __init__(self, cuda: Cuda, ends: Ends, stack: ExitStack) -> None:
        def pinned(tensor: Tensor) -> np.ndarray:
            buffer = cuda.allocate_pinned(tensor.bytes * ends.largest)
            stack.callback(cuda.free_pinned, buffer)
            return buffer.view(tensor.dtype).reshape(ends.largest, *tensor.row)

        def device(tensor: Tensor) -> int:
            return allocate(cuda, tensor.bytes * ends.largest, stack)

        names = ("begin", "fed", "started", "computed", "leaving", "done")
        self.begin, self.fed, self.started, self.computed, self.leaving, self.done = (
            event(cuda, stack) for _ in names
        )
        self.host_in, self.device_in = pinned(ends.input), device(ends.input)
        self.host_out = [pinned(output) for output in ends.outputs]
        self.device_out = [device(output) for output in ends.outputs]
        self.part: Part | None = None  # on its way
        self.source = 0  # the address that is computed from
        self.spans: dict[str, tuple[Any, Any]] = {}  # which events say what
        self.enqueue = 0.0  # milliseconds of the host


def event(cuda: Cuda, stack: ExitStack) -> Any:
    """An event that the stack destroys."""
    made = cuda.event()
    stack.callback(cuda.destroy_event, made)
    return made


def allocate(cuda: Cuda, size: int, stack: ExitStack) -> int:
    """Memory on the GPU that the stack gives back; 0 for none."""
    if not size:
        return 0
    address = cuda.allocate(size)
    stack.callback(cuda.free, address)
    return address
