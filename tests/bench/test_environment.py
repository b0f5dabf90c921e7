from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import types
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from rtresnet.bench import environment
from rtresnet.bench.environment import Counters, GpuReport, GpuSample, summary
from rtresnet.core.hardware import Gpu


def counted(busy: float, own: float, stolen: float = 0, throttled: float | None = 0) -> Counters:
    return Counters(busy=busy, stolen=stolen, total=100 + busy, own=own, throttled=throttled)


START = Counters(busy=0, stolen=0, total=0, own=0, throttled=0)


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)


def test_summary_quiet_machine_has_no_remarks() -> None:
    report = summary(10, START, counted(20.5, 20), [2400.0, 2410.0], None)
    assert report.remarks == ()
    assert report.host.own_cores == 2 and report.host.other_cores == 0.05
    assert report.host.mhz == (2400, 2405, 2410)


def test_summary_disturbances_are_remarks() -> None:
    report = summary(10, START, counted(35, 20, stolen=9, throttled=2), [3000, 1500], None)
    busy, stolen, quota, clock = report.remarks
    assert busy == "other processes used 1.50 of 4 cores"
    assert "hypervisor gave 7%" in stolen and "quota stopped processes for 2.0 s" in quota
    assert clock == "the processor's clock fell from 3000 to 1500 MHz"


def test_summary_short_time_or_unknown_machine_has_no_remarks() -> None:
    for report in (
        summary(0.1, START, counted(35, 0), [], None),
        summary(10, START, START, [], None),
    ):
        assert report.remarks == () and report.host.other_cores is None
        assert report.host.mhz is None


def test_summary_throttling_gpu_is_a_remark() -> None:
    samples = (
        GpuSample(throttled=(), others=0),
        GpuSample(throttled=("power cap",), others=2),
        GpuSample(),
    )
    report = summary(1, START, START, [], GpuReport(name="Test GPU", samples=samples))
    assert report.remarks == (
        "the GPU throttled in 1 of 3 samples (power cap)",
        "2 other processes used the GPU",
    )


def test_watch_child_counts_as_own_once_waited_for() -> None:
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
    host = ours.report.host
    assert host.own_cores * ours.report.seconds > 0.9
    host = others.report.host
    assert host.other_cores > 0.2 and host.own_cores < 0.2
    assert ours.report.gpu is None


def test_counters_agree_with_the_kernel() -> None:
    first, second = environment.counters(), environment.counters()
    assert 0 < first.busy <= second.busy <= second.total and first.stolen >= 0
    assert 0 < first.own <= second.own


def test_counters_read_the_cgroups_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "CGROUP_CPU", tmp_path / "cpu.stat")
    assert environment.counters().throttled is None
    (tmp_path / "cpu.stat").write_text("usage_usec 5\nthrottled_usec 2500000\n")
    assert environment.counters().throttled == 2.5
    (tmp_path / "cpu.stat").write_text("usage_usec a b\n")
    assert environment.counters().throttled is None


@pytest.mark.parametrize("frequency", [None, SimpleNamespace(current=0.0), FileNotFoundError()])
def test_megahertz_that_is_not_reported_is_none(
    frequency: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cpu_freq() -> object:
        if isinstance(frequency, Exception):
            raise frequency
        return frequency

    monkeypatch.setattr("psutil.cpu_freq", cpu_freq)
    assert environment.megahertz() is None


class NvmlError(Exception):
    pass


FIRST, SECOND, INSTANCE = (str(uuid.UUID(int=number)) for number in (1, 2, 3))
HANDLES = {f"GPU-{FIRST}": "gpu0", f"GPU-{SECOND}": "gpu1", f"MIG-{INSTANCE}": "mig"}


def visible(uuid: str | None) -> Gpu:
    """Return what CUDA shows of two GPUs of the same name, one of them divided by MIG."""
    return Gpu(name="Test GPU", capability=(9, 0), memory=1 << 36, uuid=uuid)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The functions of nvidia-ml-py 13 that are used; the clocks say which GPU was asked."""
    fake = types.ModuleType("pynvml")

    def unsupported(handle: str) -> int:
        raise NvmlError("Not Supported")

    def by_uuid(uuid: str) -> str:
        if uuid not in HANDLES:
            raise NvmlError("Not Found")
        return HANDLES[uuid]

    for name, value in {
        "NVMLError": NvmlError,
        "NVMLLibraryMismatchError": type("NVMLLibraryMismatchError", (Exception,), {}),
        "NVML_CLOCK_SM": 1,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: f"gpu{index}",
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": {"mig": "gpu1"}.__getitem__,
        "nvmlDeviceGetName": lambda handle: b"Test GPU",
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetMaxClockInfo": lambda handle, clock: 1980,
        "nvmlDeviceGetPowerManagementLimit": lambda handle: 700_000,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x04 | 0x01,
        "nvmlDeviceGetPowerUsage": lambda handle: 699_500,
        "nvmlDeviceGetClockInfo": lambda handle, clock: {"gpu0": 300, "gpu1": 1200}[handle],
        "nvmlDeviceGetTemperature": lambda handle, sensor: 71,
        "nvmlDeviceGetComputeRunningProcesses": unsupported,
    }.items():
        setattr(fake, name, value)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_watch_gpu_report_has_clocks_power_and_throttling(driver: types.ModuleType) -> None:
    with environment.Watch(visible(SECOND)) as watch:
        pass
    gpu = watch.report.gpu
    assert gpu.driver == "580.1" and gpu.power_limit_w == 700 and gpu.unknown is None
    assert gpu.uuid == SECOND
    assert gpu.samples[0] == GpuSample(
        mhz=1200, power_w=699.5, celsius=71, throttled=("power cap",), others=None
    )
    assert any("power cap" in remark for remark in watch.report.remarks)


@pytest.mark.parametrize(
    ("uuid", "mhz", "asked_for_processes"),
    [(FIRST, 300, "gpu0"), (SECOND, 1200, "gpu1"), (INSTANCE, 1200, "mig")],
    ids=["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1", "a MIG instance"],
)
def test_monitor_gpus_of_one_name_are_identified_by_uuid(
    uuid: str, mhz: int, asked_for_processes: str, driver: types.ModuleType
) -> None:
    requested = []

    def processes(handle: str) -> list[types.SimpleNamespace]:
        requested.append(handle)
        return [types.SimpleNamespace(pid=os.getpid())]

    driver.nvmlDeviceGetComputeRunningProcesses = processes  # type: ignore[attr-defined]
    sample = environment.GpuMonitor(visible(uuid)).sample()
    assert sample.mhz == mhz and sample.others == 0
    assert requested == [asked_for_processes]


def test_monitor_without_uuid_takes_a_name_only_where_it_is_unique(
    driver: types.ModuleType,
) -> None:
    with pytest.raises(LookupError, match="2 GPUs"):
        environment.GpuMonitor(visible(None))
    driver.nvmlDeviceGetCount = lambda: 1  # type: ignore[attr-defined]
    assert environment.GpuMonitor(visible(None)).sample().mhz == 300


def test_monitor_gpu_unknown_to_nvml_or_no_nvml_is_reported_as_unknown(
    driver: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(uuid.UUID(int=9))
    with pytest.raises(LookupError, match=other):
        environment.GpuMonitor(visible(other))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with environment.Watch(visible(FIRST)) as watch:
        pass
    assert watch.report.gpu == GpuReport(
        name="Test GPU", uuid=FIRST, unknown="nvidia-ml-py is not installed"
    )


def test_monitor_library_older_than_nvidia_ml_py_answers_none(driver: types.ModuleType) -> None:
    def mismatch(*arguments: object) -> None:
        raise driver.NVMLLibraryMismatchError  # type: ignore[attr-defined]

    driver.nvmlDeviceGetComputeRunningProcesses = mismatch  # type: ignore[attr-defined]
    del driver.nvmlDeviceGetCurrentClocksEventReasons  # type: ignore[attr-defined]
    sample = environment.GpuMonitor(visible(SECOND)).sample()
    assert sample.others is None and sample.throttled is None and sample.mhz == 1200


def test_nvidia_ml_py_has_every_function_that_is_called() -> None:
    real = pytest.importorskip("pynvml")
    names = set(re.findall(r"\bnvml[A-Z]\w+|\bNVML\w+", Path(environment.__file__).read_text()))
    assert names > {"nvmlInit", "nvmlDeviceGetHandleByUUID", "NVMLError", "NVML_CLOCK_SM"}
    assert [name for name in sorted(names) if not hasattr(real, name)] == []


def proc_of(folder: Path, pids: str, namespace: str) -> Path:
    (folder / "self/ns").mkdir(parents=True)
    (folder / "self/status").write_text(f"Name:\tpython\nNSpid:\t{pids}\nThreads:\t1\n")
    (folder / "self/ns/pid").symlink_to(namespace)
    return folder


@pytest.mark.parametrize(
    ("pids", "nspid", "namespace", "expected"),
    [
        ({4242, 7}, "4242", environment.HOST_NAMESPACE, 1),
        ({7, 8}, "4242", environment.HOST_NAMESPACE, 2),
        (set(), "4242", environment.HOST_NAMESPACE, 0),
        ({90001}, "17", "pid:[4026532500]", None),  # the host's number of this very process?
        ({17, 18}, "17", "pid:[4026532500]", 1),  # a driver that translates them
        ({90001, 5}, "90001\t17", "pid:[4026532500]", 1),  # the host's /proc in the container
        (set(), "17", "pid:[4026532500]", 0),
    ],
)
def test_other_processes_in_any_pid_namespace_never_counts_this_one(
    pids: set[int], nspid: str, namespace: str, expected: int | None, tmp_path: Path
) -> None:
    assert environment.other_processes(pids, proc_of(tmp_path, nspid, namespace)) == expected


def test_other_processes_without_proc_knows_its_own_pid(tmp_path: Path) -> None:
    assert environment.other_processes({os.getpid(), 1}, tmp_path) == 1
    assert environment.other_processes({1}, tmp_path) is None
