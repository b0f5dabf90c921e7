"""Clocks, power, temperature and throttling of a GPU, from NVIDIA's driver (NVML).

Uses nvidia-ml-py if it is installed; it is optional. What a GPU does not report is None.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtresnet.core.hardware import Gpu

# Bits of nvmlDeviceGetCurrentClocksEventReasons that mean throttling. Idle and clocks that were set
# by a user (bits 0x1, 0x2, 0x10, 0x100) do not.
THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal, by the driver",
    0x40: "thermal, by the hardware",
    0x80: "power brake",
}
HOST_NAMESPACE = "pid:[4026531836]"  # of PIDs; the inode is a constant of Linux, PROC_PID_INIT_INO


@dataclass(frozen=True, kw_only=True)
class GpuSample:
    """State of a GPU at one moment; None if it is unknown.

    Attributes:
        mhz: Clock.
        power_w: Power in W.
        celsius: Temperature.
        throttled: Reasons for throttling.
        others: Number of other processes on the GPU.
    """

    mhz: float | None = None
    power_w: float | None = None
    celsius: float | None = None
    throttled: tuple[str, ...] | None = None
    others: int | None = None


class GpuMonitor:
    """Asks the driver about one GPU, which is matched by its UUID.

    NVML enumerates all GPUs of the machine in its own order, whatever CUDA_VISIBLE_DEVICES says, so
    neither an index nor a name identifies the GPU that computes. On a MIG instance, clocks, power,
    temperature and throttling are those of its GPU; processes are those of the instance.

    Args:
        gpu: As CUDA shows it.

    Raises:
        LookupError: nvidia-ml-py or the driver's library is missing, or NVML has no such GPU.
    """

    def __init__(self, gpu: Gpu) -> None:
        try:
            nvml: Any = importlib.import_module("pynvml")
            nvml.nvmlInit()
        except ImportError:
            raise LookupError("nvidia-ml-py is not installed") from None
        except Exception as error:  # NVMLError, which has no name before the import
            raise LookupError(f"NVML: {error}") from None
        self._nvml = nvml
        try:
            self._instance, self._whole = self._find(gpu)
        except BaseException:
            nvml.nvmlShutdown()
            raise

    def _find(self, gpu: Gpu) -> tuple[Any, Any]:
        """Handles of the device that computes and of the GPU it is part of, mostly the same."""
        nvml = self._nvml
        if gpu.uuid is None:
            return (self._only_one_named(gpu.name),) * 2
        with contextlib.suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{gpu.uuid}")
            return handle, handle
        with contextlib.suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetHandleByUUID(f"MIG-{gpu.uuid}")
            return handle, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        raise LookupError(f"NVML has no GPU with the UUID {gpu.uuid}")

    def _only_one_named(self, name: str) -> Any:
        """Finds a GPU by its name, for drivers without UUIDs."""
        nvml = self._nvml
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        matching = [handle for handle in handles if _text(nvml.nvmlDeviceGetName(handle)) == name]
        if len(matching) != 1:
            raise LookupError(f"NVML has {len(matching)} GPUs called {name}, and CUDA no UUID")
        return matching[0]

    def _ask(self, function: str, *arguments: object) -> Any:
        """NVML's answer, or None if the GPU, the driver or nvidia-ml-py cannot give one."""
        nvml = self._nvml
        unable = (nvml.NVMLError, getattr(nvml, "NVMLLibraryMismatchError", nvml.NVMLError))
        with contextlib.suppress(*unable, AttributeError):
            return getattr(nvml, function)(*arguments)
        return None

    def limits(self) -> dict[str, Any]:
        """Driver, highest clock in MHz, power limit in W: fields of `environment.GpuReport`."""
        nvml, gpu = self._nvml, self._whole
        power = self._ask("nvmlDeviceGetPowerManagementLimit", gpu)
        driver = self._ask("nvmlSystemGetDriverVersion")
        return {
            "driver": None if driver is None else _text(driver),
            "max_mhz": self._ask("nvmlDeviceGetMaxClockInfo", gpu, nvml.NVML_CLOCK_SM),
            "power_limit_w": None if power is None else power / 1e3,
        }

    def sample(self) -> GpuSample:
        """Clock in MHz, power in W, temperature in degrees, throttling, other processes."""
        nvml, gpu = self._nvml, self._whole
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons", gpu)
        power = self._ask("nvmlDeviceGetPowerUsage", gpu)
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses", self._instance)
        throttled = others = None
        if reasons is not None:
            throttled = tuple(why for bit, why in THROTTLING.items() if reasons & bit)
        if processes is not None:
            others = other_processes({process.pid for process in processes})
        return GpuSample(
            mhz=self._ask("nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_SM),
            power_w=None if power is None else power / 1e3,
            celsius=self._ask("nvmlDeviceGetTemperature", gpu, nvml.NVML_TEMPERATURE_GPU),
            throttled=throttled,
            others=others,
        )

    def close(self) -> None:
        """Releases the library."""
        self._nvml.nvmlShutdown()


def other_processes(pids: Set[int], proc: Path = Path("/proc")) -> int | None:
    """Counts the processes on a GPU other than this one.

    In a container the driver may report process ids of the host, which this process cannot match
    with its own.

    Args:
        pids: As NVML reports them, in any PID namespace.
        proc: Where the kernel's files are.

    Returns:
        Their number; None if this process is not among them and its PID namespace is not the
        host's, so that any of them may be this one.
    """
    own = {os.getpid()}
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "self/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                own |= {int(pid) for pid in line.split()[1:]}
    if pids & own:
        return len(pids) - 1
    with contextlib.suppress(OSError):
        if str((proc / "self/ns/pid").readlink()) == HOST_NAMESPACE:
            return len(pids)
    return None if pids else 0


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
