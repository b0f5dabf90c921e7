"""Check the driver and the CUDA binding without the rest of the runtime.

Calls `cuda.bindings.driver` directly and not through `cuda.py`, to distinguish a defect of the
machine from one of the runtime. `rtresnet doctor --gpu` and benchmarks/accept_gpu.py use it. Needs
only the standard library and that binding.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rtresnet.core import hardware
from rtresnet.core.errors import UnavailableError, missing_package

SIZE = 1 << 20  # bytes of each copy
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")


def driver_report() -> dict[str, Any]:
    """Describes the driver and its devices.

    Returns:
        "cuda" (the CUDA version that the driver supports), "kernel_driver" (first line of its
        version file), "devices", and "reason", which is None if there is a device.
    """
    cuda, reason = _driver()
    kernel = None
    with contextlib.suppress(OSError):
        kernel = KERNEL_DRIVER.read_text().splitlines()[0]
    devices = [
        {"name": gpu.name, "target": gpu.target, "memory": gpu.memory, "uuid": gpu.uuid}
        for gpu in hardware.gpus()
    ]
    if not devices and reason is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = "the driver lists no device"
        if visible is not None:
            reason += f" with CUDA_VISIBLE_DEVICES={visible!r}"
    return {"cuda": cuda, "kernel_driver": kernel, "devices": devices, "reason": reason}


def _driver() -> tuple[str | None, str | None]:
    """Returns the driver's CUDA version, and the reason why it cannot be used."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return None, f"no NVIDIA driver: {error}"
    version = ctypes.c_int()
    known = driver.cuDriverGetVersion(ctypes.byref(version)) == 0
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}" if known else None
    code = driver.cuInit(0)
    if code == 0:
        return cuda, None
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    return cuda, f"cuInit failed: {(name.value or b'unknown').decode()} ({code})"


class Driver:
    """Wraps `cuda.bindings.driver` and checks every return code.

    Args:
        binding: The module; imported by default.

    Raises:
        UnavailableError: The binding is not installed.
    """

    def __init__(self, binding: Any = None) -> None:
        if binding is None:
            try:
                from cuda.bindings import driver
            except ImportError:
                raise missing_package("cuda-python", "the CUDA check") from None
            binding = driver
        self.binding = binding

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a function of the driver.

        Returns:
            Its result without the code; a tuple of several, None if there is none.

        Raises:
            UnavailableError: The call failed.
        """
        code, *values = getattr(self.binding, name)(*arguments)
        if int(code) != 0:
            raise UnavailableError(f"{name} failed: {getattr(code, 'name', '')} ({int(code)})")
        return values[0] if len(values) == 1 else tuple(values) or None

    @contextlib.contextmanager
    def context(self, device: int = 0) -> Iterator[None]:
        """Makes a device's primary context current. It stays retained, as in the runtime."""
        self.call("cuInit", 0)
        handle = self.call("cuDeviceGet", device)
        self.call("cuCtxPushCurrent", self.call("cuDevicePrimaryCtxRetain", handle))
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent")

    @contextlib.contextmanager
    def made(self, create: str, destroy: str, *arguments: Any) -> Iterator[Any]:
        """Yields the result of `create`, and calls `destroy` with it at the end."""
        handle = self.call(create, *arguments)
        try:
            yield handle
        finally:
            self.call(destroy, handle)


def free_memory() -> int:
    """Returns the free bytes of the first device.

    Raises:
        UnavailableError: The binding is not installed, or a call failed.
    """
    driver = Driver()
    with driver.context():
        return int(driver.call("cuMemGetInfo")[0])


def check_cuda(binding: Any = None) -> dict[str, str]:
    """Checks every operation that the runtime needs: memory, streams, events and graphs.

    Args:
        binding: Module with the functions of `cuda.bindings.driver`, which is the default.

    Returns:
        "ok" or the error for each group of operations. All groups run, even if one fails.

    Raises:
        UnavailableError: The binding is not installed, or no context can be created.
    """
    driver = Driver(binding)
    checks: dict[str, Callable[[Driver], None]] = {
        "memory info": _check_memory_info,
        "copies, pageable": lambda driver: _check_copies(driver, pinned=False),
        "copies, pinned": lambda driver: _check_copies(driver, pinned=True),
        "events": _check_events,
        "capture": _check_capture,
    }
    outcome = {}
    with driver.context():
        for name, check in checks.items():
            try:
                check(driver)
                outcome[name] = "ok"
            except Exception as error:  # also a signature that has changed
                outcome[name] = f"{type(error).__name__}: {error}"
    return outcome


def _stream(driver: Driver) -> contextlib.AbstractContextManager[Any]:
    return driver.made("cuStreamCreate", "cuStreamDestroy", 1)  # CU_STREAM_NON_BLOCKING


def _memory(driver: Driver) -> contextlib.AbstractContextManager[Any]:
    return driver.made("cuMemAlloc", "cuMemFree", SIZE)


def _check_memory_info(driver: Driver) -> None:
    free, total = driver.call("cuMemGetInfo")
    if not 0 < free <= total:
        raise UnavailableError(f"cuMemGetInfo: {free} of {total} bytes are free")


def _check_copies(driver: Driver, *, pinned: bool) -> None:
    """Copies host to device, device to device, sets a part, and copies back."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_stream(driver))
        first, second = (stack.enter_context(_memory(driver)) for _ in range(2))
        if pinned:
            address = int(stack.enter_context(driver.made("cuMemAllocHost", "cuMemFreeHost", SIZE)))
            attribute = driver.binding.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
            kind = driver.call("cuPointerGetAttribute", attribute, address)
            if int(kind) != 1:  # CU_MEMORYTYPE_HOST
                raise UnavailableError(f"pinned memory has type {int(kind)}")
        else:
            pageable = ctypes.create_string_buffer(SIZE)
            address = ctypes.addressof(pageable)
        sent = random.Random(0).randbytes(SIZE)
        ctypes.memmove(address, sent, SIZE)
        driver.call("cuMemcpyHtoDAsync", first, address, SIZE, stream)
        driver.call("cuMemcpyDtoDAsync", second, first, SIZE, stream)
        driver.call("cuMemsetD8Async", second, 7, SIZE // 2, stream)
        driver.call("cuStreamSynchronize", stream)
        ctypes.memset(address, 0, SIZE)
        driver.call("cuMemcpyDtoHAsync", address, second, SIZE, stream)
        driver.call("cuStreamSynchronize", stream)
        _compare(address, bytes([7]) * (SIZE // 2) + sent[SIZE // 2 :])


def _check_events(driver: Driver) -> None:
    """Makes one stream wait for another, and measures the time between two events."""
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(_stream(driver)) for _ in range(2))
        begin, end = (
            stack.enter_context(driver.made("cuEventCreate", "cuEventDestroy", 0)) for _ in range(2)
        )
        memory = stack.enter_context(_memory(driver))
        driver.call("cuEventRecord", begin, first)
        driver.call("cuMemsetD8Async", memory, 1, SIZE, first)
        driver.call("cuEventRecord", end, first)
        driver.call("cuStreamWaitEvent", second, end, 0)
        driver.call("cuStreamSynchronize", second)
        driver.call("cuEventSynchronize", end)
        if not float(driver.call("cuEventElapsedTime", begin, end)) >= 0:
            raise UnavailableError("cuEventElapsedTime: a negative time")


def _check_capture(driver: Driver) -> None:
    """Captures copies in and out as a graph, and launches it twice with different bytes."""
    mode = driver.binding.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    with contextlib.ExitStack() as stack:
        stream, memory = stack.enter_context(_stream(driver)), stack.enter_context(_memory(driver))
        source, target = (
            int(stack.enter_context(driver.made("cuMemAllocHost", "cuMemFreeHost", SIZE)))
            for _ in range(2)
        )
        driver.call("cuStreamBeginCapture", stream, mode)
        driver.call("cuMemcpyHtoDAsync", memory, source, SIZE, stream)
        driver.call("cuMemcpyDtoHAsync", target, memory, SIZE, stream)
        graph = driver.call("cuStreamEndCapture", stream)
        stack.callback(driver.call, "cuGraphDestroy", graph)
        ready = driver.call("cuGraphInstantiate", graph, 0)
        stack.callback(driver.call, "cuGraphExecDestroy", ready)
        for value in (3, 5):
            ctypes.memset(source, value, SIZE)
            ctypes.memset(target, 0, SIZE)
            driver.call("cuGraphLaunch", ready, stream)
            driver.call("cuStreamSynchronize", stream)
            _compare(target, bytes([value]) * SIZE)


def _compare(address: int, sent: bytes) -> None:
    if ctypes.string_at(address, SIZE) != sent:
        raise UnavailableError("bytes came back changed")
