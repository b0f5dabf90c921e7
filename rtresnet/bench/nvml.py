"""The GPU's clocks, power, heat and reasons for slowing down, asked of NVIDIA's driver.

Through nvidia-ml-py, where it is installed; nothing depends on it. What a GPU does not tell is
None.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons that mean: slower than asked. Idle and clocks that
# were set by somebody (bits 0x1, 0x2, 0x10, 0x100) are no throttling.
THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal, by the driver",
    0x40: "thermal, by the hardware",
    0x80: "power brake",
}


class Gpu:
    """One GPU, found by its name: the driver's order need not be CUDA's.

    Args:
        name: As CUDA calls it.

    Raises:
        LookupError: nvidia-ml-py or the driver's library is not here, or no such GPU.
    """

    def __init__(self, name: str) -> None:
        try:
            nvml: Any = importlib.import_module("pynvml")
            nvml.nvmlInit()
        except ImportError:
            raise LookupError("nvidia-ml-py is not installed") from None
        except Exception as error:  # NVMLError, which has no name before the import
            raise LookupError(f"NVML: {error}") from None
        self._nvml = nvml
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        found = [handle for handle in handles if _text(nvml.nvmlDeviceGetName(handle)) == name]
        if not found:
            nvml.nvmlShutdown()
            raise LookupError(f"NVML knows no GPU called {name}")
        self._handle = found[0]

    def _ask(self, function: Callable[..., Any], *arguments: object) -> Any:
        with contextlib.suppress(self._nvml.NVMLError):
            return function(self._handle, *arguments)
        return None

    def limits(self) -> dict[str, float | str | None]:
        """Driver, highest clock in MHz, power limit in W."""
        nvml, power = self._nvml, self._ask(self._nvml.nvmlDeviceGetPowerManagementLimit)
        return {
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "max_mhz": self._ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
            "power_limit_w": None if power is None else power / 1e3,
        }

    def sample(self) -> dict[str, Any]:
        """Clock in MHz, power in W, temperature in degrees, throttling, other processes."""
        nvml = self._nvml
        reasons = self._ask(nvml.nvmlDeviceGetCurrentClocksEventReasons)
        power = self._ask(nvml.nvmlDeviceGetPowerUsage)
        processes = self._ask(nvml.nvmlDeviceGetComputeRunningProcesses)
        others = [p for p in processes or () if p.pid != os.getpid()]
        return {
            "mhz": self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            "power_w": None if power is None else power / 1e3,
            "celsius": self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            "throttled": None
            if reasons is None
            else [why for bit, why in THROTTLING.items() if reasons & bit],
            "others": None if processes is None else len(others),
        }

    def close(self) -> None:
        """Lets the library go."""
        self._nvml.nvmlShutdown()


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
