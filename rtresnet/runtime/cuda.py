"""Two dozen operations of the CUDA driver API, with cuda-python or pycuda.

`cuda-python` is the default; RTRESNET_CUDA=pycuda selects pycuda. Both use the device's primary
context, so memory can be shared with torch in both directions. Every call is checked, and an error
names the call and its code.

Device addresses, host addresses and stream handles are plain integers, as TensorRT takes them.
Streams do not synchronize with the legacy default stream. Memory that is shared with another
library must be ordered with an event.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from rtresnet.core import hardware
from rtresnet.core.errors import InputError, UnavailableError, UnknownNameError, missing_package

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
BLOCKING_SYNC, DISABLE_TIMING = 1, 2  # CUevent_flags


class Cuda(Protocol):
    """The CUDA operations that the runtime needs.

    Attributes:
        graphs: Whether the binding can capture a stream into a graph.
    """

    graphs: bool

    def active(self) -> AbstractContextManager[None]:
        """Make the device current in this thread. Call every other operation inside."""
        ...

    def memory(self) -> tuple[int, int]: ...  # free bytes, total bytes
    def stream(self) -> int: ...
    def synchronize(self, stream: int) -> None: ...  # the caller waits
    def destroy_stream(self, stream: int) -> None: ...
    def event(self, timing: bool, blocking: bool) -> Any: ...  # blocking: a waiting thread sleeps
    def record(self, event: Any, stream: int) -> None: ...
    def wait(self, stream: int, event: Any) -> None: ...  # the stream waits, the caller does not
    def join(self, event: Any) -> None: ...  # the caller waits
    def elapsed(self, start: Any, stop: Any) -> float: ...  # milliseconds
    def destroy_event(self, event: Any) -> None: ...
    def allocate(self, size: int) -> int: ...  # aligned to 256 bytes or more
    def free(self, address: int) -> None: ...
    def allocate_pinned(self, size: int) -> int: ...
    def free_pinned(self, address: int) -> None: ...
    def is_pinned(self, address: int) -> bool: ...  # False if unknown
    def to_device(self, target: int, source: int, size: int, stream: int) -> None: ...
    def to_host(self, target: int, source: int, size: int, stream: int) -> None: ...
    def on_device(self, target: int, source: int, size: int, stream: int) -> None: ...
    def zero(self, address: int, size: int, stream: int) -> None: ...
    def begin_capture(self, stream: int) -> None: ...
    def end_capture(self, stream: int) -> Any: ...  # a graph that can be launched
    def launch(self, graph: Any, stream: int) -> None: ...
    def destroy_graph(self, graph: Any) -> None: ...


def open_cuda(device: int = 0) -> Cuda:
    """Open a device's primary context with the binding that RTRESNET_CUDA names.

    Raises:
        UnknownNameError: There is no such binding.
        UnavailableError: There is no GPU, or the binding is not installed.
    """
    if not hardware.gpus():
        raise UnavailableError(
            "this machine has no CUDA device or no driver",
            fix="a plan runs on a GPU only; measure its ONNX file with --device cpu",
        )
    choice = os.environ.get("RTRESNET_CUDA", "cuda-python")
    bindings: dict[str, Callable[[int], Cuda]] = {"cuda-python": CudaPython, "pycuda": PyCuda}
    if choice not in bindings:
        raise UnknownNameError("CUDA binding in RTRESNET_CUDA", choice, bindings)
    return bindings[choice](device)


def host_view(address: int, size: int) -> np.ndarray:
    """Return host memory as an array of bytes, which does not keep it alive."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def pinned(shape: int | Sequence[int], dtype: Any) -> np.ndarray:
    """Allocate an array in page-locked (pinned) host memory, uninitialized, as `np.empty` does.

    A plan copies a batch from pinned memory straight to the GPU; other memory needs one more copy
    on the host. Use it for buffers that many calls reuse: allocating takes milliseconds, and the
    operating system cannot swap the memory out. The memory is freed with the last array that
    refers to it.

    uint8 is recommended: export with `--input uint8-nhwc`, so that the net normalizes on the GPU.
    A batch then has a quarter of the bytes of float32, on the host and on the way to the GPU:
    32 images of 224 pixels are 4.8 MB instead of 19.3 MB.

    Args:
        shape: As for `np.empty`; for a plan [N, S, S, 3] in uint8 or [N, 3, S, S] in float32.
        dtype: NumPy type of the elements.

    Returns:
        An array of this shape and type.

    Raises:
        InputError: The shape or type is not a valid one of NumPy's.
        UnavailableError: There is no GPU, no CUDA binding, or not enough memory.
    """
    return allocate_pinned_array(open_cuda(), shape, dtype)


class _PinnedMemory:
    """Pinned memory that is freed with the last array that refers to it."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        with cuda.active():
            address = cuda.allocate_pinned(size)
        self.__array_interface__ = {
            "version": 3, "shape": (size,), "typestr": "|u1", "data": (address, False),
        }  # fmt: skip
        # At exit arrays may still be in use; the driver frees the memory with the process.
        weakref.finalize(self, _free_pinned, cuda, address).atexit = False


def _free_pinned(cuda: Cuda, address: int) -> None:
    with contextlib.suppress(UnavailableError), cuda.active():  # fails if the device is lost
        cuda.free_pinned(address)


def allocate_pinned_array(cuda: Cuda, shape: int | Sequence[int], dtype: Any) -> np.ndarray:
    """Allocate a `pinned` array on an open device."""
    try:
        dtype = np.dtype(dtype)
        lengths = [int(n) for n in (shape if isinstance(shape, Sequence) else (shape,))]
    except (TypeError, ValueError) as error:
        raise InputError(f"pinned: shape {shape}, type {dtype}: {error}") from error
    if min(lengths, default=0) < 0 or dtype.hasobject:
        raise InputError(f"pinned: shape {shape}, type {dtype}: not an array of numbers")
    size = math.prod(lengths) * dtype.itemsize
    # CUDA does not allocate 0 bytes.
    memory = np.asarray(_PinnedMemory(cuda, max(1, size)))
    array: np.ndarray = memory[:size].view(dtype).reshape(lengths)
    return array


class CudaPython:
    """cuda-python's driver API on the retained primary context.

    Args:
        device: Number of the GPU.
        driver: Module with the functions of `cuda.bindings.driver`, which is the default.
    """

    graphs = True

    def __init__(self, device: int, driver: Any = None) -> None:
        if driver is None:
            try:
                from cuda.bindings import driver as module
            except ImportError:
                raise missing_package("cuda-python", "running a plan") from None
            driver = module
        self._use(driver)
        self._call("cuInit", 0)
        # Never released, because other libraries in this process use it too.
        self._context = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", device))

    def _use(self, driver: Any) -> None:
        self._driver = driver
        self._capture_mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._memory_type = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        self._host_memory = driver.CUmemorytype.CU_MEMORYTYPE_HOST
        self._push, self._pop = driver.cuCtxPushCurrent, driver.cuCtxPopCurrent
        # Operations of every inference call: `_call` would look the function up by its name,
        # which costs as much as the call itself.
        self.synchronize = _checked(driver, "cuStreamSynchronize")
        self.record = _checked(driver, "cuEventRecord")
        self.join = _checked(driver, "cuEventSynchronize")
        self.to_device = _checked(driver, "cuMemcpyHtoDAsync")
        self.to_host = _checked(driver, "cuMemcpyDtoHAsync")
        self.launch = _checked(driver, "cuGraphLaunch")

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._driver, name)(*arguments)
        if code:
            raise _failure(name, code)
        return values[0] if len(values) == 1 else values

    def active(self) -> CudaPython:
        return self  # no new object, because the driver has a stack of contexts for each thread

    def __enter__(self) -> None:
        (code,) = self._push(self._context)
        if code:
            raise _failure("cuCtxPushCurrent", code)

    def __exit__(self, *error: object) -> None:
        code, _ = self._pop()
        if code and error[0] is None:
            raise _failure("cuCtxPopCurrent", code)

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def stream(self) -> int:
        return int(self._call("cuStreamCreate", NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def event(self, timing: bool, blocking: bool) -> Any:
        flags = (0 if timing else DISABLE_TIMING) | (BLOCKING_SYNC if blocking else 0)
        return self._call("cuEventCreate", flags)

    def wait(self, stream: int, event: Any) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def elapsed(self, start: Any, stop: Any) -> float:
        return float(self._call("cuEventElapsedTime", start, stop))

    def destroy_event(self, event: Any) -> None:
        self._call("cuEventDestroy", event)

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def allocate_pinned(self, size: int) -> int:
        return int(self._call("cuMemAllocHost", size))

    def free_pinned(self, address: int) -> None:
        self._call("cuMemFreeHost", address)

    def is_pinned(self, address: int) -> bool:
        # The driver returns an error for memory that CUDA did not allocate.
        code, kind = self._driver.cuPointerGetAttribute(self._memory_type, address)
        return not code and int(kind) == int(self._host_memory)

    def on_device(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("cuMemcpyDtoDAsync", target, source, size, stream)

    def zero(self, address: int, size: int, stream: int) -> None:
        self._call("cuMemsetD8Async", address, 0, size, stream)

    def begin_capture(self, stream: int) -> None:
        # Thread-local, so that other threads may allocate meanwhile.
        self._call("cuStreamBeginCapture", stream, self._capture_mode)

    def end_capture(self, stream: int) -> Any:
        graph = self._call("cuStreamEndCapture", stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cuGraphExecDestroy", graph)


def _checked(driver: Any, name: str) -> Callable[..., None]:
    """Make a function of the driver raise UnavailableError instead of returning a code."""
    function = getattr(driver, name)

    def call(*arguments: Any) -> None:
        code = function(*arguments)[0]
        if code:
            raise _failure(name, code)

    return call


def _failure(name: str, code: Any) -> UnavailableError:
    return UnavailableError(f"{name} failed: {code.name} ({int(code)})")


def _translated(binding: type) -> type:
    """Make every operation of a class raise UnavailableError instead of pycuda's errors."""

    def translated(operation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operation)
        def call(self: Any, *arguments: Any) -> Any:
            try:
                return operation(self, *arguments)
            except UnavailableError:
                raise
            except self._driver.Error as error:
                raise UnavailableError(f"pycuda: {error}") from error  # "cuMemAlloc failed: ..."

        return call

    for name, value in list(vars(binding).items()):
        if inspect.isfunction(value) and not name.startswith("_") and name != "active":
            setattr(binding, name, translated(value))
    return binding


@_translated
class PyCuda:
    """pycuda's driver API on the retained primary context, without CUDA graphs.

    pycuda cannot report whether memory is pinned.
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
        self._pinned: dict[int, Any] = {}

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
        stream = self._driver.Stream(NON_BLOCKING)
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def synchronize(self, stream: int) -> None:
        self._streams[stream].synchronize()

    def destroy_stream(self, stream: int) -> None:
        del self._streams[stream]  # pycuda destroys with the last reference

    def event(self, timing: bool, blocking: bool) -> Any:
        flags = (0 if timing else DISABLE_TIMING) | (BLOCKING_SYNC if blocking else 0)
        return self._driver.Event(flags)

    def record(self, event: Any, stream: int) -> None:
        if stream not in self._streams:  # a stream of another library; pycuda has no object for it
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

    def allocate_pinned(self, size: int) -> int:
        buffer = self._driver.pagelocked_empty(size, "uint8")
        address = int(buffer.__array_interface__["data"][0])
        self._pinned[address] = buffer
        return address

    def free_pinned(self, address: int) -> None:
        allocation: Any = self._pinned.pop(address).base
        allocation.free()

    def is_pinned(self, address: int) -> bool:
        return False

    def to_device(self, target: int, source: int, size: int, stream: int) -> None:
        self._driver.memcpy_htod_async(target, host_view(source, size), self._streams[stream])

    def to_host(self, target: int, source: int, size: int, stream: int) -> None:
        self._driver.memcpy_dtoh_async(host_view(target, size), source, self._streams[stream])

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


def _no_graphs() -> UnavailableError:
    return UnavailableError(
        "pycuda has no CUDA graphs", fix="leave RTRESNET_CUDA unset and pip install cuda-python"
    )
