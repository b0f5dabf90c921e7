"""What the machine did during a measurement, and whether that spoils the result.

    with Watch(gpu=None) as watch:
        ...
    watch.report.remarks     # sentences; empty if nothing disturbed the measurement

Reads the operating system through psutil and the GPU through `nvml.py`; a background thread samples
once a second. What is unknown is None.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rtresnet.bench import nvml
from rtresnet.core import artifacts, hardware

EVERY = 1.0
SHORT = 0.5
"""Shortest duration, in seconds, for shares of time: the kernel counts in steps of 10 ms."""
COMPUTING = ("user", "nice", "system", "irq", "softirq")
CGROUP_CPU = Path("/sys/fs/cgroup/cpu.stat")
BUSY, STOLEN, SLOWED = 0.10, 0.02, 0.95
"""Thresholds of the remarks: share of the cores that other processes used, share of the time that
the hypervisor took, and lowest clock as a share of the highest."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Processor time in seconds, all processors together.

    Attributes:
        busy: Computing, by any process.
        stolen: Taken by the hypervisor for other machines while a process was ready to run.
        total: All time of all processors.
        own: Computing, by this process and by children that it has waited for.
        throttled: Time during which a cgroup's CPU quota stopped processes; None if unknown.
    """

    busy: float
    stolen: float
    total: float
    own: float
    throttled: float | None


def counters() -> Counters:
    """Reads the counters of the operating system."""
    times, own = psutil.cpu_times()._asdict(), os.times()
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
        own=sum(own[:4]),
        throttled=throttled,
    )


def megahertz() -> float | None:
    """The mean clock of the processors now; None if the operating system does not report it."""
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
class GpuReport:
    """The GPU during a measurement; None if it is unknown.

    Attributes:
        unknown: Why the driver could not be asked.
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
    samples: tuple[nvml.GpuSample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EnvironmentReport:
    """What the machine did during a measurement.

    Attributes:
        seconds: Duration.
        remarks: What spoils the result, in sentences.
    """

    seconds: float
    host: HostReport
    gpu: GpuReport | None
    remarks: tuple[str, ...]


class Watch:
    """Observes the machine during a `with` block.

    Args:
        gpu: The GPU that computes; None if none does.

    Attributes:
        report: What was observed; available after the block.
    """

    report: EnvironmentReport

    def __init__(self, gpu: hardware.Gpu | None = None) -> None:
        self._gpu = gpu
        self._clocks: list[float] = []
        self._monitor: nvml.GpuMonitor | None = None
        self._gpu_samples: list[nvml.GpuSample] = []
        self._gpu_unknown: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._observe, daemon=True, name="watch")

    def __enter__(self) -> Watch:
        if self._gpu is not None:
            try:
                self._monitor = nvml.GpuMonitor(self._gpu)
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
                samples=tuple(self._gpu_samples), **self._monitor.limits() if self._monitor else {},
            )  # fmt: skip
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
    """Summarizes what was observed, with remarks on what spoils the result.

    Args:
        seconds: Duration.
        before: Counters at the beginning.
        after: Counters at the end.
        clocks: Mean clock of the processors in MHz, once per second.
        gpu: What was observed of the GPU.
    """
    usage: dict[str, Any] = {}
    if seconds >= SHORT and after.total > before.total:
        own = after.own - before.own
        usage = {
            "own_cores": own / seconds,
            "other_cores": max(0.0, after.busy - before.busy - own) / seconds,
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
        yield f"the processor's clock went from {high:.0f} down to {low:.0f} MHz"
    samples = gpu.samples if gpu else ()
    slowed = [sample.throttled for sample in samples if sample.throttled]
    if slowed:
        why = ", ".join(sorted({reason for reasons in slowed for reason in reasons}))
        yield f"the GPU throttled in {len(slowed)} of {len(samples)} samples ({why})"
    if others := max((sample.others or 0 for sample in samples), default=0):
        yield f"{others} other processes had work on the GPU"


@dataclass(frozen=True, kw_only=True)
class ChainLink:
    """One file of the chain from checkpoint to plan.

    Attributes:
        commit: git's, of the code that made the file.
    """

    file: str
    sha256: str | None = None
    commit: str | None = None


def chain_of(path: str | os.PathLike[str]) -> tuple[ChainLink, ...]:
    """An artifact and its ancestors, as the sidecars state them; nothing is hashed again."""
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
