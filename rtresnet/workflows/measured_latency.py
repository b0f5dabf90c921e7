"""Read results of `benchmark`, to show them next to the bounds of the same plans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core import atomic_io
from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.workflows import result_files
from rtresnet.workflows.result_files import ChainRecord, Entry

if TYPE_CHECKING:
    from rtresnet.bench.roofline import GpuSpec


@dataclass(frozen=True, kw_only=True)
class MeasuredLatency:
    """Measurement by `benchmark` of the same plan on the same GPU at the same batch.

    Attributes:
        file: The result file.
        n: Number of requests.
        median_ms: Latency with the copies to and from the GPU.
        compute_ms: Computation alone, by the GPU's events; None if it was not measured.
    """

    file: str
    n: int
    median_ms: float
    compute_ms: float | None


Benchmark = tuple[Path, list[Entry]]


def read(path: Path) -> Benchmark:
    """Return the entries of a result of `benchmark`.

    Raises:
        InputError: No such file, or not a result of `bench`.
    """
    fix = "create one with: rtresnet bench PLAN --json FILE"
    atomic_io.require_file(path, fix=fix)
    file = result_files.read(str(path))
    if file.verb != "bench":
        raise InputError(f"{path}: not a result of rtresnet bench", fix=fix)
    return path, file.result["results"]


def matching(
    benchmarks: Iterable[Benchmark], sha256: str, batch: int, gpu: GpuSpec
) -> Iterator[MeasuredLatency]:
    """Yield the sequential measurements of a file at a batch size on a GPU."""
    for path, entries in benchmarks:
        for entry in entries:
            links = entry.get("chain") or [ChainRecord()]
            if (
                sha256
                and links[0].get("sha256") == sha256
                and entry["batch"] == batch
                and entry.get("scenario") in (None, "single-stream")
                and not entry.get("with_preprocess")
                and _is_gpu(entry.get("device"), gpu)
            ):
                computed = (entry.get("parts") or {}).get("compute")
                yield MeasuredLatency(
                    file=str(path),
                    n=entry["latency"].get("n") or 0,
                    median_ms=entry["latency"]["median"],
                    compute_ms=computed["median"] if computed else None,
                )


def _is_gpu(device: str | None, gpu: GpuSpec) -> bool:
    from rtresnet.bench import roofline

    try:
        return roofline.find_gpu(device or "") == gpu
    except UnknownNameError:
        return False
