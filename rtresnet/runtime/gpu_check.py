"""Check every CUDA operation that the runtime needs, on the real driver.

`rtresnet doctor --gpu` and benchmarks/accept_gpu.py use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Callable, Iterator
from typing import Any

from rtresnet.core.errors import UnavailableError
from rtresnet.runtime.cuda import Cuda, CudaPython

SIZE = 1 << 20  # bytes of each copy


def check_cuda(driver: Any = None) -> dict[str, str]:
    """Check memory, copies, streams, events and graphs.

    Args:
        driver: Module with the functions of `cuda.bindings.driver`, which is the default.

    Returns:
        "ok" or the error for each group of operations. All groups run, even if one fails.

    Raises:
        UnavailableError: The binding is not installed, or the device's context cannot be created.
    """
    checks: dict[str, Callable[[Cuda], None]] = {
        "memory info": _check_memory_info,
        "copies, pageable": lambda cuda: _check_copies(cuda, pinned=False),
        "copies, pinned": lambda cuda: _check_copies(cuda, pinned=True),
        "events": _check_events,
        "capture": _check_capture,
    }
    outcome = {}
    cuda = CudaPython(0, driver)
    with cuda.active():
        for name, check in checks.items():
            try:
                check(cuda)
                outcome[name] = "ok"
            except Exception as error:  # also a changed signature
                outcome[name] = f"{type(error).__name__}: {error}"
    return outcome


@contextlib.contextmanager
def _handle(
    create: Callable[..., Any], destroy: Callable[[Any], None], *args: Any
) -> Iterator[Any]:
    handle = create(*args)
    try:
        yield handle
    finally:
        destroy(handle)


def _check_memory_info(cuda: Cuda) -> None:
    free, total = cuda.memory()
    if not 0 < free <= total:
        raise UnavailableError(f"cuMemGetInfo: {free} of {total} bytes are free")


def _check_copies(cuda: Cuda, *, pinned: bool) -> None:
    """Copy host to device, device to device, set a part to zero, and copy back."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_handle(cuda.stream, cuda.destroy_stream))
        first, second = (
            stack.enter_context(_handle(cuda.allocate, cuda.free, SIZE)) for _ in range(2)
        )
        if pinned:
            address = stack.enter_context(_handle(cuda.allocate_pinned, cuda.free_pinned, SIZE))
            if not cuda.is_pinned(address):
                raise UnavailableError("cuPointerGetAttribute: pinned memory is not recognized")
        else:
            pageable = ctypes.create_string_buffer(SIZE)
            address = ctypes.addressof(pageable)
        data = random.Random(0).randbytes(SIZE)
        ctypes.memmove(address, data, SIZE)
        cuda.to_device(first, address, SIZE, stream)
        cuda.on_device(second, first, SIZE, stream)
        cuda.zero(second, SIZE // 2, stream)
        cuda.synchronize(stream)
        ctypes.memset(address, 7, SIZE)
        cuda.to_host(address, second, SIZE, stream)
        cuda.synchronize(stream)
        _compare(address, bytes(SIZE // 2) + data[SIZE // 2 :])


def _check_events(cuda: Cuda) -> None:
    """Make one stream wait for another, and measure the time between two events."""
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(_handle(cuda.stream, cuda.destroy_stream)) for _ in range(2)
        )
        begin, end = (
            stack.enter_context(_handle(cuda.event, cuda.destroy_event, True, False))
            for _ in range(2)
        )
        memory = stack.enter_context(_handle(cuda.allocate, cuda.free, SIZE))
        cuda.record(begin, first)
        cuda.zero(memory, SIZE, first)
        cuda.record(end, first)
        cuda.wait(second, end)
        cuda.synchronize(second)
        cuda.join(end)
        if not cuda.elapsed(begin, end) >= 0:
            raise UnavailableError("cuEventElapsedTime: returned a negative time")


def _check_capture(cuda: Cuda) -> None:
    """Capture copies in and out as a graph, and launch it twice with different bytes."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_handle(cuda.stream, cuda.destroy_stream))
        memory = stack.enter_context(_handle(cuda.allocate, cuda.free, SIZE))
        source, target = (
            stack.enter_context(_handle(cuda.allocate_pinned, cuda.free_pinned, SIZE))
            for _ in range(2)
        )
        cuda.begin_capture(stream)
        cuda.to_device(memory, source, SIZE, stream)
        cuda.to_host(target, memory, SIZE, stream)
        graph = cuda.end_capture(stream)
        stack.callback(cuda.destroy_graph, graph)
        for value in (3, 5):
            ctypes.memset(source, value, SIZE)
            ctypes.memset(target, 0, SIZE)
            cuda.launch(graph, stream)
            cuda.synchronize(stream)
            _compare(target, bytes([value]) * SIZE)


def _compare(address: int, expected: bytes) -> None:
    if ctypes.string_at(address, SIZE) != expected:
        raise UnavailableError("cuMemcpy: the copied bytes differ")
