"""The only file that touches CUDA: some two dozen operations, two bindings behind them.

`cuda-python` by default; `pycuda` where RTRESNET_CUDA=pycuda asks for it. Both work on the
device's primary context, so an address of torch's is one of ours and the other way round. Every
call is checked; an error names the call and its code.

Addresses and stream handles are plain integers, as TensorRT takes them. Streams do not wait for
the legacy default stream: who shares memory with another library says so with an event.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from rtresnet import machine
from rtresnet.errors import EnvironmentLack, UnknownName, missing_package


class Cuda(Protocol):
    """What the runtime needs of CUDA.

    Attributes:
        graphs: Whether the binding can capture a stream into a graph.
    """

    graphs: bool

    def active(self) -> AbstractContextManager[None]:
        """The device is this thread's own inside; every other call belongs in there."""
        ...

    def memory(self) -> tuple[int, int]: ...  # bytes free, bytes in all
    def stream(self) -> int: ...
    def synchronize(self, stream: int) -> None: ...
    def destroy_stream(self, stream: int) -> None: ...
    def event(self) -> Any: ...
    def record(self, event: Any, stream: int) -> None: ...
    def wait(self, stream: int, event: Any) -> None: ...  # the stream waits, the caller does not
    def join(self, event: Any) -> None: ...  # the caller waits
    def elapsed(self, start: Any, stop: Any) -> float: ...  # milliseconds
    def destroy_event(self, event: Any) -> None: ...
    def allocate(self, size: int) -> int: ...  # aligned to 256 bytes or more
    def free(self, address: int) -> None: ...
    def allocate_pinned(self, size: int) -> np.ndarray: ...  # uint8
    def free_pinned(self, buffer: np.ndarray) -> None: ...
    def is_pinned(self, array: np.ndarray) -> bool: ...  # False where it cannot be known
    def to_device(self, address: int, source: np.ndarray, size: int, stream: int) -> None: ...
    def to_host(self, target: np.ndarray, address: int, size: int, stream: int) -> None: ...
    def on_device(self, target: int, source: int, size: int, stream: int) -> None: ...
    def zero(self, address: int, size: int, stream: int) -> None: ...
    def begin_capture(self, stream: int) -> None: ...
    def end_capture(self, stream: int) -> Any: ...  # a graph that can be launched
    def launch(self, graph: Any, stream: int) -> None: ...
    def destroy_graph(self, graph: Any) -> None: ...


def open_cuda(device: int = 0) -> Cuda:
    """The binding asked for, on the device's primary context.

    Raises:
        EnvironmentLack: No GPU, or the binding is not installed.
    """
    if not machine.gpus():
        raise EnvironmentLack(
            "this machine has no CUDA device or no driver",
            fix="a plan runs on a GPU only; measure its ONNX file with --device cpu",
        )
    choice = os.environ.get("RTRESNET_CUDA", "cuda-python")
    bindings: dict[str, Callable[[int], Cuda]] = {"cuda-python": CudaPython, "pycuda": PyCuda}
    if choice not in bindings:
        raise UnknownName("CUDA binding in RTRESNET_CUDA", choice, bindings)
    return bindings[choice](device)


class CudaPython:
    """cuda-python's runtime API; the primary context is implied."""

    graphs = True

    def __init__(self, device: int) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            raise missing_package("cuda-python", "running a plan") from None
        self._rt = runtime
        self._device = device
        with self.active():
            self._call("cudaFree", 0)  # makes the context: what fails here fails early

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._rt, name)(*arguments)
        if code != self._rt.cudaError_t.cudaSuccess:
            self._rt.cudaGetLastError()  # or torch would find it and take it for its own
            raise EnvironmentLack(f"{name} failed: {code.name} ({int(code)})")
        return values[0] if len(values) == 1 else values

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        before = self._call("cudaGetDevice")
        # Also where it is the same: a thread that is new to CUDA has no context until it is set.
        self._call("cudaSetDevice", self._device)
        try:
            yield
        finally:
            if before != self._device:
                self._call("cudaSetDevice", before)

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def event(self) -> Any:
        return self._call("cudaEventCreate")

    def record(self, event: Any, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait(self, stream: int, event: Any) -> None:
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def join(self, event: Any) -> None:
        self._call("cudaEventSynchronize", event)

    def elapsed(self, start: Any, stop: Any) -> float:
        return float(self._call("cudaEventElapsedTime", start, stop))

    def destroy_event(self, event: Any) -> None:
        self._call("cudaEventDestroy", event)

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> np.ndarray:
        address = int(self._call("cudaMallocHost", size))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, buffer: np.ndarray) -> None:
        self._call("cudaFreeHost", _address(buffer))

    def is_pinned(self, array: np.ndarray) -> bool:
        kind = self._call("cudaPointerGetAttributes", _address(array)).type
        return bool(kind == self._rt.cudaMemoryType.cudaMemoryTypeHost)

    def to_device(self, address: int, source: np.ndarray, size: int, stream: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, _address(source), size, kind, stream)

    def to_host(self, target: np.ndarray, address: int, size: int, stream: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", _address(target), address, size, kind, stream)

    def on_device(self, target: int, source: int, size: int, stream: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def zero(self, address: int, size: int, stream: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, stream)

    def begin_capture(self, stream: int) -> None:
        # Other threads may allocate meanwhile: only what this one does must be fit for a graph.
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> Any:
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)


def _translated(binding: type) -> type:
    """Every operation of pycuda raises its own error on a bad code: ours instead, call by call."""

    def with_ours(operation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operation)
        def call(self: Any, *arguments: Any) -> Any:
            try:
                return operation(self, *arguments)
            except EnvironmentLack:
                raise
            except self._driver.Error as error:
                raise EnvironmentLack(f"pycuda: {error}") from error  # "cuMemAlloc failed: ..."

        return call

    for name, value in list(vars(binding).items()):
        if inspect.isfunction(value) and not name.startswith("_") and name != "active":
            setattr(binding, name, with_ours(value))
    return binding


@_translated
class PyCuda:
    """pycuda's driver API on the retained primary context.

    It has no graphs, and cannot tell whether an array is pinned.
    """

    graphs = False

    def __init__(self, device: int) -> None:
        try:
            import pycuda.driver as driver
        except ImportError:
            raise missing_package("pycuda", "RTRESNET_CUDA=pycuda") from None
        self._driver = driver
        driver.init()
        self._context = driver.Device(device).retain_primary_context()
        self._streams: dict[int, Any] = {}
        self._memory: dict[int, Any] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def memory(self) -> tuple[int, int]:
        free, total = self._driver.mem_get_info()
        return int(free), int(total)

    def stream(self) -> int:
        stream = self._driver.Stream(1)  # CU_STREAM_NON_BLOCKING
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def synchronize(self, stream: int) -> None:
        self._streams[stream].synchronize()

    def destroy_stream(self, stream: int) -> None:
        del self._streams[stream]  # pycuda destroys with the last reference

    def event(self) -> Any:
        return self._driver.Event()

    def record(self, event: Any, stream: int) -> None:
        if stream not in self._streams:  # another library's, which pycuda cannot name
            self._context.synchronize()
        event.record(self._streams.get(stream))

    def wait(self, stream: int, event: Any) -> None:
        self._streams[stream].wait_for_event(event)

    def join(self, event: Any) -> None:
        event.synchronize()

    def elapsed(self, start: Any, stop: Any) -> float:
        return float(start.time_till(stop))

    def destroy_event(self, event: Any) -> None:
        pass  # pycuda destroys with the last reference

    def allocate(self, size: int) -> int:
        memory = self._driver.mem_alloc(size)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        self._memory.pop(address).free()

    def allocate_pinned(self, size: int) -> np.ndarray:
        buffer: np.ndarray = self._driver.pagelocked_empty(size, np.uint8)
        return buffer

    def free_pinned(self, buffer: np.ndarray) -> None:
        allocation: Any = buffer.base
        allocation.free()

    def is_pinned(self, array: np.ndarray) -> bool:
        return False

    def to_device(self, address: int, source: np.ndarray, size: int, stream: int) -> None:
        self._driver.memcpy_htod_async(address, _bytes(source, size), self._streams[stream])

    def to_host(self, target: np.ndarray, address: int, size: int, stream: int) -> None:
        self._driver.memcpy_dtoh_async(_bytes(target, size), address, self._streams[stream])

    def on_device(self, target: int, source: int, size: int, stream: int) -> None:
        self._driver.memcpy_dtod_async(target, source, size, self._streams[stream])

    def zero(self, address: int, size: int, stream: int) -> None:
        self._driver.memset_d8_async(address, 0, size, self._streams[stream])

    def begin_capture(self, stream: int) -> None:
        raise _no_graphs()

    def end_capture(self, stream: int) -> Any:
        raise _no_graphs()

    def launch(self, graph: Any, stream: int) -> None:
        raise _no_graphs()

    def destroy_graph(self, graph: Any) -> None:
        raise _no_graphs()


def _no_graphs() -> EnvironmentLack:
    return EnvironmentLack(
        "pycuda has no CUDA graphs", fix="leave RTRESNET_CUDA unset and pip install cuda-python"
    )


def _bytes(array: np.ndarray, size: int) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)[:size]


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
