"""What the machine did while something was measured, and whether that spoils the result.

    with Watch(gpu=None) as watch:
        ...
    watch.report["remarks"]     # sentences; empty where nothing disturbed

Read from /proc, /sys and, of a GPU, `nvml.py`; a background thread looks once a second. An unknown
is None, as it is off Linux.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rtresnet.bench import nvml
from rtresnet.core import artifacts, hardware

EVERY = 1.0
SHORT = 0.5
"""Seconds that a statement about shares of time needs at least: the kernel counts in 10 ms."""
BUSY, STOLEN, SLOWED = 0.10, 0.02, 0.95
"""Of the cores to other processes, of the time to the hypervisor, of the highest clock seen."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Seconds since boot, all processors together; and of this process.

    Attributes:
        busy: Spent computing, by anybody.
        stolen: Wanted and given to other machines by the hypervisor.
        total: Of all processors, whatever they did.
        own: Spent computing by this process, all threads, and by children that it waited for.
        throttled: In which a control group's quota held its processes back; None if unknown.
    """

    busy: float
    stolen: float
    total: float
    own: float
    throttled: float | None


def counters(root: Path = Path("/")) -> Counters | None:
    """The kernel's counters, or None where there is no /proc/stat."""
    try:
        first = (root / "proc/stat").read_text().split("\n", 1)[0].split()
        ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in first[1:9]]
        user, nice, system, idle, waiting, irq, soft, stolen = ticks
    except (OSError, ValueError):
        return None
    own = os.times()
    throttled = None
    with contextlib.suppress(OSError, ValueError):
        fields = (root / "sys/fs/cgroup/cpu.stat").read_text().split()
        known = dict(zip(fields[::2], fields[1::2], strict=True))
        throttled = int(known["throttled_usec"]) / 1e6 if "throttled_usec" in known else None
    return Counters(
        busy=user + nice + system + irq + soft,
        stolen=stolen,
        total=user + nice + system + idle + waiting + irq + soft + stolen,
        own=sum(own[:4]),
        throttled=throttled,
    )


def megahertz(root: Path = Path("/")) -> float | None:
    """The processors' mean clock now; None where the kernel does not tell."""
    found: list[float] = []
    for file in sorted(
        (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    ):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(file.read_text()) / 1e3)
    if not found:
        with contextlib.suppress(OSError, ValueError):
            lines = (root / "proc/cpuinfo").read_text().splitlines()
            found = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return sum(found) / len(found) if found else None


class Watch:
    """Looks at the machine from the beginning of a `with` block to its end.

    Args:
        gpu: The GPU that computes; None where none does.

    Attributes:
        report: After the block: see `summary`.
    """

    def __init__(self, gpu: hardware.Gpu | None = None) -> None:
        self.report: dict[str, Any] = {}
        self._gpu = gpu
        self._clocks: list[float] = []
        self._monitor: nvml.GpuMonitor | None = None
        self._gpu_samples: list[dict[str, Any]] = []
        self._gpu_unknown: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")

    def __enter__(self) -> Watch:
        if self._gpu is not None:
            try:
                self._monitor = nvml.GpuMonitor(self._gpu)
            except LookupError as error:
                self._gpu_unknown = str(error)
        self._before, self._start = counters(), time.perf_counter()
        self._thread.start()
        return self

    def _look(self) -> None:
        while True:
            clock = megahertz()
            self._clocks += [] if clock is None else [clock]
            if self._monitor is not None:
                self._gpu_samples.append(self._monitor.sample())
            if self._end.wait(EVERY):
                return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        seconds, after = time.perf_counter() - self._start, counters()
        self._end.set()
        self._thread.join()
        gpu: dict[str, Any] | None = None
        if self._gpu is not None:
            gpu = {
                "name": self._gpu.name, "uuid": self._gpu.uuid, "unknown": self._gpu_unknown,
            }  # fmt: skip
            if self._monitor is not None:
                gpu |= self._monitor.limits() | {"samples": self._gpu_samples}
                self._monitor.close()
        self.report = summary(seconds, self._before, after, self._clocks, gpu)


def summary(
    seconds: float,
    before: Counters | None,
    after: Counters | None,
    clocks: Sequence[float],
    gpu: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What was seen, for people and for JSON.

    Returns:
        seconds; host: model, cores, system, mhz (lowest, mean, highest), cores used by this
        process and by others, share stolen by the hypervisor, seconds held back by a quota; gpu;
        remarks: what spoils the result, in sentences.
    """
    cores = os.cpu_count() or 1
    host: dict[str, Any] = {
        "model": hardware.cpu(),
        "cores": cores,
        "system": platform.platform(),
        "mhz": [min(clocks), sum(clocks) / len(clocks), max(clocks)] if clocks else None,
        "own_cores": None, "other_cores": None, "stolen": None, "quota_seconds": None,
    }  # fmt: skip
    if before and after and seconds >= SHORT and after.total > before.total:
        own = after.own - before.own
        host["own_cores"] = own / seconds
        host["other_cores"] = max(0.0, after.busy - before.busy - own) / seconds
        host["stolen"] = (after.stolen - before.stolen) / (after.total - before.total)
        if before.throttled is not None and after.throttled is not None:
            host["quota_seconds"] = after.throttled - before.throttled
    seen = dict(gpu) if gpu else None
    return {"seconds": seconds, "host": host, "gpu": seen, "remarks": list(_remarks(host, seen))}


def _remarks(host: Mapping[str, Any], gpu: Mapping[str, Any] | None) -> Iterator[str]:
    cores = host["cores"]
    if (host["other_cores"] or 0) > BUSY * cores:
        yield f"other processes used {host['other_cores']:.2f} of {cores} cores"
    if (host["stolen"] or 0) > STOLEN:
        yield f"the hypervisor gave {host['stolen']:.0%} of the processors' time to others"
    if (host["quota_seconds"] or 0) > 0.01:
        yield f"a CPU quota held processes back for {host['quota_seconds']:.1f} s"
    if host["mhz"] and host["mhz"][0] < SLOWED * host["mhz"][2]:
        low, _, high = host["mhz"]
        yield f"the processor's clock went from {high:.0f} down to {low:.0f} MHz"
    samples = gpu.get("samples") if gpu else None
    if not samples:
        return
    slowed = [sample for sample in samples if sample["throttled"]]
    if slowed:
        why = ", ".join(sorted({reason for sample in slowed for reason in sample["throttled"]}))
        yield f"the GPU throttled in {len(slowed)} of {len(samples)} looks at it ({why})"
    if others := max((sample["others"] or 0 for sample in samples), default=0):
        yield f"{others} other processes had work on the GPU"


def chain_of(path: str | os.PathLike[str]) -> list[dict[str, str | None]]:
    """An artifact and what it came from, by the hashes in the sidecars; nothing is hashed anew.

    `commit` is git's, of the code that made it.
    """
    found: list[dict[str, str | None]] = []
    current: Path | None = Path(path)
    while current is not None and len(found) < 16:
        sidecar = artifacts.read_sidecar(current)
        if sidecar is None:
            found.append({"file": current.name, "sha256": None, "commit": None})
            return found
        commit = sidecar.made_by.get("commit")
        found.append({"file": current.name, "sha256": sidecar.sha256, "commit": commit})
        current = artifacts.parent_path(current, sidecar)
    return found
