from __future__ import annotations

import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from rtresnet.bench import environment, nvml
from rtresnet.bench.environment import Counters, summary


def counted(busy: float, own: float, stolen: float = 0, throttled: float | None = 0) -> Counters:
    return Counters(busy=busy, stolen=stolen, total=100 + busy, own=own, throttled=throttled)


START = Counters(busy=0, stolen=0, total=0, own=0, throttled=0)


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)


def test_a_quiet_machine_has_no_remarks() -> None:
    report = summary(10, START, counted(20.5, 20), [2400.0, 2410.0], None)
    assert report["remarks"] == []
    assert report["host"]["own_cores"] == 2 and report["host"]["other_cores"] == 0.05
    assert report["host"]["mhz"] == [2400, 2405, 2410]


def test_what_disturbs_is_said() -> None:
    report = summary(10, START, counted(35, 20, stolen=9, throttled=2), [3000, 1500], None)
    busy, stolen, quota, clock = report["remarks"]
    assert busy == "other processes used 1.50 of 4 cores"
    assert "hypervisor gave 7%" in stolen and "held processes back for 2.0 s" in quota
    assert clock == "the processor's clock went from 3000 down to 1500 MHz"


def test_too_short_a_time_and_an_unknown_machine_say_nothing() -> None:
    for report in (
        summary(0.1, START, counted(35, 0), [], None),
        summary(10, None, None, [], None),
    ):
        assert report["remarks"] == [] and report["host"]["other_cores"] is None
        assert report["host"]["mhz"] is None


def test_a_throttling_gpu_is_said() -> None:
    samples = [
        {"throttled": [], "others": 0},
        {"throttled": ["power cap"], "others": 2},
        {"throttled": None, "others": None},
    ]
    report = summary(1, None, None, [], {"name": "Test GPU", "samples": samples})
    assert report["remarks"] == [
        "the GPU throttled in 1 of 3 looks at it (power cap)",
        "2 other processes had work on the GPU",
    ]


@pytest.mark.skipif(environment.counters() is None, reason="no /proc/stat here")
def test_a_process_that_computes_is_anothers_until_it_is_waited_for() -> None:
    spin = [sys.executable, "-c", "import time\nwhile time.process_time() < 1.0: pass"]
    with environment.Watch() as ours:
        subprocess.run(spin, check=True)
    busy = subprocess.Popen([*spin[:2], "while True: pass"])
    try:
        with environment.Watch() as others:
            time.sleep(1.2)
    finally:
        busy.kill()
        busy.wait()
    host = ours.report["host"]
    assert host["own_cores"] * ours.report["seconds"] > 0.9
    host = others.report["host"]
    assert host["other_cores"] > 0.2 and host["own_cores"] < 0.2
    assert ours.report["gpu"] is None


def test_the_kernels_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/stat").write_text("cpu  100 200 300 400 500 600 700 800 9 9\ncpu0 1\n")
    (tmp_path / "sys/fs/cgroup/cpu.stat").write_text("usage_usec 5\nthrottled_usec 2500000\n")
    (tmp_path / "proc/cpuinfo").write_text("cpu MHz\t\t: 2000.0\nflags: x\ncpu MHz\t\t: 3000.0\n")
    found = environment.counters(tmp_path)
    assert found is not None
    assert found.busy == 19 and found.stolen == 8 and found.total == 36 and found.throttled == 2.5
    assert environment.megahertz(tmp_path) == 2500
    governor = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    governor.mkdir(parents=True)
    (governor / "scaling_cur_freq").write_text("1800000\n")
    assert environment.megahertz(tmp_path) == 1800


def test_garbage_in_the_kernels_files_is_unknown(tmp_path: Path) -> None:
    assert environment.counters(tmp_path) is None and environment.megahertz(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  a b\n")
    (tmp_path / "proc/cpuinfo").write_text("cpu MHz: fast\n")
    assert environment.counters(tmp_path) is None and environment.megahertz(tmp_path) is None


class NvmlError(Exception):
    pass


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The functions of nvidia-ml-py 13 that are used, for two GPUs, the second throttling."""
    fake = types.ModuleType("pynvml")

    def unsupported(handle: str) -> int:
        raise NvmlError("Not Supported")

    for name, value in {
        "NVMLError": NvmlError,
        "NVML_CLOCK_SM": 1,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: f"gpu{index}",
        "nvmlDeviceGetName": lambda handle: {"gpu0": b"Other", "gpu1": "Test GPU"}[handle],
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetMaxClockInfo": lambda handle, clock: 1980,
        "nvmlDeviceGetPowerManagementLimit": lambda handle: 700_000,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x04 | 0x01,
        "nvmlDeviceGetPowerUsage": lambda handle: 699_500,
        "nvmlDeviceGetClockInfo": lambda handle, clock: 1200,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 71,
        "nvmlDeviceGetComputeRunningProcesses": unsupported,
    }.items():
        setattr(fake, name, value)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_the_gpu_is_watched_through_nvml(driver: types.ModuleType) -> None:
    with environment.Watch("Test GPU") as watch:
        pass
    gpu = watch.report["gpu"]
    assert gpu["driver"] == "580.1" and gpu["power_limit_w"] == 700 and gpu["unknown"] is None
    assert gpu["samples"][0] == {
        "mhz": 1200, "power_w": 699.5, "celsius": 71, "throttled": ["power cap"], "others": None,
    }  # fmt: skip
    assert any("power cap" in remark for remark in watch.report["remarks"])


def test_a_gpu_that_nvml_does_not_know_is_unknown_and_no_error(
    driver: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LookupError, match="no GPU called Mine"):
        nvml.Gpu("Mine")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with environment.Watch("Test GPU") as watch:
        pass
    assert watch.report["gpu"] == {"name": "Test GPU", "unknown": "nvidia-ml-py is not installed"}
