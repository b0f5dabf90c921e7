"""Describe this machine: processor, memory, GPUs, driver and versions.

Standard library only. The GPU is queried through the driver (libcuda) by ctypes, because a CUDA
binding need not be installed to know that there is no device; everything that *uses* a GPU is in
`runtime/cuda.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
# Where a module's name is not that of the package that brings it.
DISTRIBUTIONS = {
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "tensorrt": "tensorrt-cu13",
    "onnxruntime_ep_openvino": "onnxruntime-ep-openvino",
    "cuda.bindings": "cuda-python",
    "pynvml": "nvidia-ml-py",
    "sklearn": "scikit-learn",
}
# Values of oneDNN's ONEDNN_MAX_CPU_ISA that rule VNNI out.
ISAS_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")
# cudaErrorInsufficientDriver, as CUDA, TensorRT and ONNX Runtime print it.
TOO_OLD_DRIVER = re.compile(
    r"InsufficientDriver|driver version is insufficient|(failure|error:?|code) 35\b"
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One CUDA device.

    Attributes:
        name: Name reported by the driver.
        capability: Its compute capability.
        memory: Total bytes.
        uuid: 8-4-4-4-12 hexadecimal digits, the same in CUDA and NVML; of the instance where the
            GPU is divided by MIG. None if the driver does not report it.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    uuid: str | None = None

    @property
    def target(self) -> str:
        """Name of the compute capability for builders: sm_89."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """Return every CUDA device that is visible to this process, in CUDA's order.

    The order and number are those of CUDA_VISIBLE_DEVICES, which the driver applies itself. Empty
    without a driver or a device.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    devices = []
    for index in range(count.value):
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        calls = (
            driver.cuDeviceGet(ctypes.byref(device), index),
            driver.cuDeviceGetName(name, 256, device),
            driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),
            driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
            driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
        )
        if not any(calls):
            capability = (major.value, minor.value)
            devices.append(
                Gpu(
                    name=name.value.decode(), capability=capability, memory=memory.value,
                    uuid=_uuid(driver, device),
                )
            )  # fmt: skip
    return tuple(devices)


def driver_error() -> str | None:
    """Return the reason why CUDA's driver does not start; None if it does."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no NVIDIA driver: {error}"
    if (code := driver.cuInit(0)) == 0:
        return None
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    return f"cuInit failed: {(name.value or b'unknown').decode()} ({code})"


def _uuid(driver: ctypes.CDLL, device: ctypes.c_int) -> str | None:
    """Return the UUID of a device; from driver r470 on that of a MIG instance, not of its GPU."""
    for function in ("cuDeviceGetUuid_v2", "cuDeviceGetUuid"):
        identifier = (ctypes.c_ubyte * 16)()
        if hasattr(driver, function) and getattr(driver, function)(identifier, device) == 0:
            return str(uuid.UUID(bytes=bytes(identifier)))
    return None


@functools.cache
def cuda_version() -> tuple[int, int] | None:
    """Return the newest CUDA version of the driver, as (13, 0); None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    value = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(value)) != 0:
        return None
    return value.value // 1000, value.value % 1000 // 10


def driver_fix(message: str = "") -> str | None:
    """Return the fix for a driver that is too old for CUDA 13; None if the age is unknown.

    Args:
        message: An error of CUDA, TensorRT or ONNX Runtime that decides it; without one the driver
            is queried for its version.
    """
    if message:
        too_old = TOO_OLD_DRIVER.search(message) is not None
    else:
        too_old = (cuda_version() or (13, 0)) < (13, 0)
    return "install NVIDIA driver r580 or newer, which CUDA 13 needs" if too_old else None


def cpu() -> str:
    """Return the processor's name and the cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {cores()} cores"


def int8_sums_saturate() -> bool:
    """Return whether INT8 kernels saturate at 16 bits on this processor (x86 without VNNI).

    ONEDNN_MAX_CPU_ISA (DNNL_MAX_CPU_ISA), which limits oneDNN and OpenVINO to an older processor's
    instructions, counts as the processor's limit, so that tests can force the answer.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return _isa_limit() in ISAS_WITHOUT_VNNI or not {"avx512_vnni", "avx_vnni"} & _flags()


def native_bf16() -> bool:
    """Return whether the processor has bfloat16 instructions, twice as fast as float32."""
    return _isa_limit() not in ISAS_WITHOUT_VNNI and bool({"avx512_bf16", "amx_bf16"} & _flags())


def _isa_limit() -> str:
    """Return the instruction set that oneDNN is limited to; empty without a limit."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return limit.upper()


@functools.cache
def _flags() -> set[str]:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("flags"):
                return set(line.split())
    return set()


def wait_passively() -> None:
    """Let OpenMP's threads sleep soon when they wait for each other, unless the user has set this.

    Spinning threads slow down training and other processes. GNU's OpenMP spins 1,000 times before
    it sleeps, which costs next to nothing on an idle machine (benchmarks/train_threads.py). OpenMP
    reads the settings when it starts: call this before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def cores_in_use(seconds: float = 0.2) -> float:
    """Return how many of the cores that this process may use are used by others; 0 if unknown.

    Args:
        seconds: Duration of the measurement, in which this process sleeps.
    """

    def busy() -> float:  # seconds since boot, see proc(5), less those of this process
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        with open("/proc/stat", encoding="ascii") as file:
            lines = [line.split() for line in file if line.partition(" ")[0] in mine]
        ticks = sum(int(field) for line in lines for field in (*line[1:4], *line[6:9]))
        own = os.times()
        return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system

    try:
        before, start = busy(), time.monotonic()
        time.sleep(seconds)
        used = (busy() - before) / (time.monotonic() - start)
    except (OSError, ValueError, AttributeError):  # not Linux
        return 0.0
    return min(max(used, 0.0), float(cores()))


def keep_freed_memory() -> None:
    """Make glibc keep freed large blocks instead of returning them to the kernel.

    A training step on the CPU frees and allocates the same hundreds of MB each time. Without this
    setting it spends a tenth of its time in page faults. Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def available_memory() -> int | None:
    """Return the bytes of free memory, within the limit of a container; None if unknown."""
    limits = []
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="utf-8") as file:
        limits += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError):
        limits += _free_in_groups(CGROUPS, Path("/proc/self/cgroup").read_text())
    return min(limits, default=None)


def _free_in_groups(root: Path, membership: str) -> Iterator[int]:
    """Yield the bytes that are left in each control group of a process with a limit of memory.

    Args:
        root: Where the groups are mounted. In a container that is often its own group, so that
            the path in `membership` does not exist below it.
        membership: Content of /proc/PID/cgroup, see cgroups(7): version 2 has no controllers.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        limit, used, cached = names
        group = top / path.lstrip("/")
        while group != top.parent:
            # A limit of "max" is none, and no whole number either.
            with contextlib.suppress(OSError, ValueError):
                free = int((group / limit).read_text()) - int((group / used).read_text())
                stat = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
                # The kernel drops files that were read and not used since before it runs out.
                yield max(0, free + int(stat.get(cached, 0)))
            group = group.parent


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def commit() -> str | None:
    """Return the git commit of the checkout that this code runs from; None if installed."""
    git = Path(__file__).parents[2] / ".git"
    with contextlib.suppress(OSError):
        if git.is_file():  # a worktree's: "gitdir: PATH"
            git = Path(git.read_text().partition(": ")[2].strip())
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        common = git / "commondir"
        shared = git / common.read_text().strip() if common.exists() else git
        if (shared / name).exists():
            return (shared / name).read_text().strip()
        packed = (line.partition(" ") for line in (shared / "packed-refs").read_text().splitlines())
        return next((digest for digest, _, ref in packed if ref == name), None)
    return None


def installed(module: str) -> bool:
    """Return whether a module could be imported, without importing more than its parents."""
    parent = module.rpartition(".")[0]
    return (not parent or installed(parent)) and importlib.util.find_spec(module) is not None


def version(*distributions: str) -> str | None:
    """Return the version of the first of these distributions that is installed."""
    from importlib import metadata

    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the version of each installed distribution, and of Python."""
    result = {"python": platform.python_version()}
    return result | {name: text for name in distributions if (text := version(name))}
