"""State of the machine during a measurement, and remarks if it disturbs the result.

    with Watch(gpu=None) as watch:
        ...
    watch.report.remarks     # sentences; empty if nothing disturbed the measurement

Reads the operating system through psutil, and the GPU through NVIDIA's driver (NVML) with
nvidia-ml-py, which is optional. A background thread samples once per second. Unknown values are
None.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rtresnet.core import artifacts, hardware

EVERY = 1.0
SHORT = 0.5
"""Shortest duration, in seconds, for shares of time: the kernel counts in steps of 10 ms."""
COMPUTING = ("user", "nice", "system", "irq", "softirq")
CGROUP_CPU = Path("/sys/fs/cgroup/cpu.stat")
BUSY, STOLEN, SLOWED = 0.10, 0.02, 0.95
"""Thresholds of the remarks: share of the cores that other processes used, share of the time that
the hypervisor took, and lowest clock as a share of the highest."""
# Bits of nvmlDeviceGetCurrentClocksEventReasons that mean throttling. Idle and clocks that were set
# by a user (bits 0x1, 0x2, 0x10, 0x100) do not.
THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal, by the driver",
    0x40: "thermal, by the hardware",
    0x80: "power brake",
}
HOST_NAMESPACE = (
    "pid:[4026531836]"  # PID namespace; the inode is Linux's constant PROC_PID_INIT_INO
)


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Processor time in seconds, all processors together.

    Attributes:
        busy: Computing, by any process.
        stolen: Taken by the hypervisor for other machines while a process was ready to run.
        total: All time of all processors.
        own: Computing, by this process and its finished children.
        throttled: Time during which a cgroup's CPU quota stopped processes; None if unknown.
    """

    busy: float
    stolen: float
    total: float
    own: float
    throttled: float | None


def counters() -> Counters:
    """Read the counters of the operating system."""
    times, process_times = psutil.cpu_times()._asdict(), os.times()
    parts = {name: times.get(name, 0.0) for name in (*COMPUTING, "idle", "iowait", "steal")}
    throttled = None
    with contextlib.suppress(OSError, ValueError):
        fields = CGROUP_CPU.read_text().split()
        values = dict(zip(fields[::2], fields[1::2], strict=True))
        throttled = int(values["throttled_usec"]) / 1e6 if "throttled_usec" in values else None
    return Counters(
        busy=sum(parts[name] for name in COMPUTING),
        stolen=parts["steal"],
        total=sum(parts.values()),
        own=sum(process_times[:4]),
        throttled=throttled,
    )


def megahertz() -> float | None:
    """Return the processors' mean clock; None if the operating system does not report it."""
    with contextlib.suppress(OSError, NotImplementedError, RuntimeError):
        frequency = psutil.cpu_freq()
        return float(frequency.current) if frequency and frequency.current else None
    return None


@dataclass(frozen=True, kw_only=True)
class HostReport:
    """The machine during a measurement; None if it is unknown.

    Attributes:
        model: Name of the processor.
        cores: Number of logical processors.
        system: Operating system and kernel.
        mhz: Lowest, mean and highest clock of the processors.
        own_cores: Processors that this process used, on average.
        other_cores: Processors that other processes used, on average.
        stolen: Share of the time that the hypervisor gave to other machines.
        quota_seconds: Time during which a CPU quota stopped processes.
    """

    model: str
    cores: int
    system: str
    mhz: tuple[float, float, float] | None = None
    own_cores: float | None = None
    other_cores: float | None = None
    stolen: float | None = None
    quota_seconds: float | None = None


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


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """The GPU during a measurement; None if it is unknown.

    Attributes:
        unknown: Reason why the driver could not be queried.
        driver: Version of the driver.
        max_mhz: Highest clock.
        power_limit_w: Power limit in W.
        samples: One per second.
    """

    name: str
    uuid: str | None = None
    unknown: str | None = None
    driver: str | None = None
    max_mhz: float | None = None
    power_limit_w: float | None = None
    samples: tuple[GpuSample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EnvironmentReport:
    """State of the machine during a measurement.

    Attributes:
        seconds: Duration.
        remarks: Sentences on disturbances of the result.
    """

    seconds: float
    host: HostReport
    gpu: GpuReport | None
    remarks: tuple[str, ...]


class Watch:
    """Observes the machine during a `with` block.

    Args:
        gpu: The GPU that computes, or None.

    Attributes:
        report: The observations; available after the block.
    """

    report: EnvironmentReport

    def __init__(self, gpu: hardware.Gpu | None = None) -> None:
        self._gpu = gpu
        self._clocks: list[float] = []
        self._monitor: GpuMonitor | None = None
        self._gpu_samples: list[GpuSample] = []
        self._gpu_unknown: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._observe, daemon=True, name="watch")

    def __enter__(self) -> Watch:
        if self._gpu is not None:
            try:
                self._monitor = GpuMonitor(self._gpu)
            except LookupError as error:
                self._gpu_unknown = str(error)
        self._before, self._start = counters(), time.perf_counter()
        self._thread.start()
        return self

    def _observe(self) -> None:
        while True:
            clock = megahertz()
            self._clocks += [] if clock is None else [clock]
            if self._monitor is not None:
                self._gpu_samples.append(self._monitor.sample())
            if self._end.wait(EVERY):
                return

    def __exit__(self, *error: object) -> None:
        seconds, after = time.perf_counter() - self._start, counters()
        self._end.set()
        self._thread.join()
        gpu = None
        if self._gpu is not None:
            gpu = GpuReport(
                name=self._gpu.name, uuid=self._gpu.uuid, unknown=self._gpu_unknown,
                samples=tuple(self._gpu_samples),
            )  # fmt: skip
            gpu = self._monitor.with_limits(gpu) if self._monitor else gpu
        if self._monitor is not None:
            self._monitor.close()
        self.report = summary(seconds, self._before, after, self._clocks, gpu)


def summary(
    seconds: float,
    before: Counters,
    after: Counters,
    clocks: Sequence[float],
    gpu: GpuReport | None,
) -> EnvironmentReport:
    """Summarize the observations, with remarks on disturbances of the result.

    Args:
        seconds: Duration.
        before: Counters at the beginning.
        after: Counters at the end.
        clocks: Mean clock of the processors in MHz, once per second.
        gpu: Observations of the GPU.
    """
    usage: dict[str, Any] = {}
    if seconds >= SHORT and after.total > before.total:
        process = after.own - before.own
        usage = {
            "own_cores": process / seconds,
            "other_cores": max(0.0, after.busy - before.busy - process) / seconds,
            "stolen": (after.stolen - before.stolen) / (after.total - before.total),
        }
        if before.throttled is not None and after.throttled is not None:
            usage["quota_seconds"] = after.throttled - before.throttled
    host = HostReport(
        model=hardware.cpu(), cores=os.cpu_count() or 1, system=platform.platform(),
        mhz=(min(clocks), sum(clocks) / len(clocks), max(clocks)) if clocks else None, **usage,
    )  # fmt: skip
    return EnvironmentReport(
        seconds=seconds, host=host, gpu=gpu, remarks=tuple(_remarks(host, gpu))
    )


def _remarks(host: HostReport, gpu: GpuReport | None) -> Iterator[str]:
    if (host.other_cores or 0) > BUSY * host.cores:
        yield f"other processes used {host.other_cores:.2f} of {host.cores} cores"
    if (host.stolen or 0) > STOLEN:
        yield f"the hypervisor gave {host.stolen:.0%} of the processors' time to others"
    if (host.quota_seconds or 0) > 0.01:
        yield f"a CPU quota stopped processes for {host.quota_seconds:.1f} s"
    if host.mhz and host.mhz[0] < SLOWED * host.mhz[2]:
        low, _, high = host.mhz
        yield f"the processor's clock fell from {high:.0f} to {low:.0f} MHz"
    samples = gpu.samples if gpu else ()
    slowed = [sample.throttled for sample in samples if sample.throttled]
    if slowed:
        why = ", ".join(sorted({reason for reasons in slowed for reason in reasons}))
        yield f"the GPU throttled in {len(slowed)} of {len(samples)} samples ({why})"
    if others := max((sample.others or 0 for sample in samples), default=0):
        yield f"{others} other processes used the GPU"


@dataclass(frozen=True, kw_only=True)
class ChainLink:
    """One file of the chain from checkpoint to plan.

    Attributes:
        commit: Git commit of the code that made the file.
    """

    file: str
    sha256: str | None = None
    commit: str | None = None


def chain_of(path: str | os.PathLike[str]) -> tuple[ChainLink, ...]:
    """Return an artifact and its ancestors, as the sidecars state them; nothing is hashed again."""
    links: list[ChainLink] = []
    current: Path | None = Path(path)
    while current is not None and len(links) < 16:
        sidecar = artifacts.read_sidecar(current)
        if sidecar is None:
            links.append(ChainLink(file=current.name))
            break
        commit = sidecar.made_by.get("commit")
        links.append(ChainLink(file=current.name, sha256=sidecar.sha256, commit=commit))
        current = artifacts.parent_path(current, sidecar)
    return tuple(links)


class GpuMonitor:
    """Queries the driver about one GPU, which is matched by its UUID.

    NVML enumerates all GPUs of the machine in its own order, regardless of CUDA_VISIBLE_DEVICES, so
    neither an index nor a name identifies the GPU that computes. On a MIG instance, clocks, power,
    temperature and throttling are those of its GPU; processes are those of the instance.

    Args:
        gpu: The GPU as CUDA reports it.

    Raises:
        LookupError: nvidia-ml-py or the driver's library is missing, or NVML has no such GPU.
    """

    def __init__(self, gpu: hardware.Gpu) -> None:
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

    def _find(self, gpu: hardware.Gpu) -> tuple[Any, Any]:
        """Return the handles of the compute device and of its GPU, which are usually equal."""
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
        """Find a GPU by its name, for drivers without UUIDs."""
        nvml = self._nvml
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        matching = [handle for handle in handles if _text(nvml.nvmlDeviceGetName(handle)) == name]
        if len(matching) != 1:
            raise LookupError(
                f"NVML has {len(matching)} GPUs called {name}, and CUDA reports no UUID"
            )
        return matching[0]

    def _ask(self, function: str, *arguments: object) -> Any:
        """Return NVML's value, or None if GPU, driver or nvidia-ml-py do not support it."""
        nvml = self._nvml
        unable = (nvml.NVMLError, getattr(nvml, "NVMLLibraryMismatchError", nvml.NVMLError))
        with contextlib.suppress(*unable, AttributeError):
            return getattr(nvml, function)(*arguments)
        return None

    def with_limits(self, report: GpuReport) -> GpuReport:
        """Add driver, highest clock in MHz and power limit in W to a report."""
        nvml, gpu = self._nvml, self._whole
        power = self._ask("nvmlDeviceGetPowerManagementLimit", gpu)
        driver = self._ask("nvmlSystemGetDriverVersion")
        return dataclasses.replace(
            report,
            driver=None if driver is None else _text(driver),
            max_mhz=self._ask("nvmlDeviceGetMaxClockInfo", gpu, nvml.NVML_CLOCK_SM),
            power_limit_w=None if power is None else power / 1e3,
        )

    def sample(self) -> GpuSample:
        """Read clock in MHz, power in W, temperature in degrees, throttling and other processes."""
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
        """Release the library."""
        self._nvml.nvmlShutdown()


def other_processes(pids: Set[int], proc: Path = Path("/proc")) -> int | None:
    """Count the processes on a GPU other than this one.

    In a container the driver may report process ids of the host, which this process cannot match
    with its own.

    Args:
        pids: Process ids as NVML reports them, in any PID namespace.
        proc: Where the kernel's files are.

    Returns:
        The number of other processes; None if this process is not listed and its PID namespace is
        not the host's, because then any listed process can be this one.
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
