"""The only file that touches CUDA: a dozen operations, two bindings behind them.

`cuda-python` by default; `pycuda` where RTRESNET_CUDA=pycuda asks for it. Both work on the
device's primary context, so memory can be shared with torch. Every call is checked; an error
names the call and its code.

Addresses and stream handles are plain integers, as TensorRT takes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from rtresnet import machine
from rtresnet.errors import EnvironmentLack, UnknownName, missing_package


class Cuda(Protocol):
    """What the runtime needs of CUDA."""

    def stream(self) -> int: ...
    def synchronize(self, stream: int) -> None: ...
    def destroy_stream(self, stream: int) -> None: ...
    def event(self) -> Any: ...
    def record(self, event: Any, stream: int) -> None: ...
    def elapsed(self, start: Any, stop: Any) -> float: ...  # milliseconds
    def destroy_event(self, event: Any) -> None: ...
    def allocate(self, size: int) -> int: ...
    def free(self, address: int) -> None: ...
    def allocate_pinned(self, size: int) -> np.ndarray: ...  # uint8
    def free_pinned(self, buffer: np.ndarray) -> None: ...
    def to_device(self, address: int, source: np.ndarray, size: int, stream: int) -> None: ...
    def to_host(self, target: np.ndarray, address: int, size: int, stream: int) -> None: ...


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

    def __init__(self, device: int) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            raise missing_package("cuda-python", "running a plan") from None
        self._rt = runtime
        self._call("cudaSetDevice", device)

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._rt, name)(*arguments)
        if code != self._rt.cudaError_t.cudaSuccess:
            raise EnvironmentLack(f"{name} failed: {code.name} ({int(code)})")
        return values[0] if values else None

    def stream(self) -> int:
        return int(self._call("cudaStreamCreate"))

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def event(self) -> Any:
        return self._call("cudaEventCreate")

    def record(self, event: Any, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def elapsed(self, start: Any, stop: Any) -> float:
        return float(self._call("cudaEventElapsedTime", start, stop))

    def destroy_event(self, event: Any) -> None:
        self._call("cudaEventDestroy", event)

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> np.ndarray:
        import ctypes

        address = int(self._call("cudaMallocHost", size))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, buffer: np.ndarray) -> None:
        self._call("cudaFreeHost", buffer.ctypes.data)

    def to_device(self, address: int, source: np.ndarray, size: int, stream: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, source.ctypes.data, size, kind, stream)

    def to_host(self, target: np.ndarray, address: int, size: int, stream: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, address, size, kind, stream)


class PyCuda:
    """pycuda's driver API on the retained primary context; pycuda raises on every bad code."""

    def __init__(self, device: int) -> None:
        try:
            import pycuda.driver as driver
        except ImportError:
            raise missing_package("pycuda", "RTRESNET_CUDA=pycuda") from None
        self._driver = driver
        driver.init()
        self._context = driver.Device(device).retain_primary_context()
        self._context.push()
        self._streams: dict[int, Any] = {}
        self._memory: dict[int, Any] = {}

    def stream(self) -> int:
        stream = self._driver.Stream()
        self._streams[stream.handle] = stream
        return int(stream.handle)

    def synchronize(self, stream: int) -> None:
        self._streams[stream].synchronize()

    def destroy_stream(self, stream: int) -> None:
        del self._streams[stream]  # pycuda destroys with the last reference

    def event(self) -> Any:
        return self._driver.Event()

    def record(self, event: Any, stream: int) -> None:
        event.record(self._streams[stream])

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

    def to_device(self, address: int, source: np.ndarray, size: int, stream: int) -> None:
        self._driver.memcpy_htod_async(address, source[:size], self._streams[stream])

    def to_host(self, target: np.ndarray, address: int, size: int, stream: int) -> None:
        self._driver.memcpy_dtoh_async(target[:size], address, self._streams[stream])
