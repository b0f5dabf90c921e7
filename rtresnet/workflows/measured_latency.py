"""Read results of `benchmark`, to show them next to the bounds of the same plans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta
from typing_extensions import NotRequired, TypedDict  # in typing from Python 3.11

from rtresnet.core import atomic_io, serialization
from rtresnet.core.errors import InputError, UnknownNameError

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


class _Summary(TypedDict):
    n: int
    median: Annotated[float, Meta(gt=0)]


class _Link(TypedDict):
    sha256: NotRequired[str | None]


class _Entry(TypedDict):
    """Fields of an entry of a benchmark that are read."""

    device: NotRequired[str | None]
    batch: int
    scenario: NotRequired[str | None]
    with_preprocess: NotRequired[bool | None]
    latency: _Summary
    parts: NotRequired[dict[str, _Summary] | None]
    chain: NotRequired[list[_Link] | None]


class _Bench(TypedDict):
    results: list[_Entry]


Benchmark = tuple[Path, list[_Entry]]


def read(path: Path) -> Benchmark:
    """Return the entries of a result of `benchmark`.

    Raises:
        InputError: No such file, or not a result of `bench`.
    """
    fix = "create one with: rtresnet bench PLAN --json FILE"
    atomic_io.require_file(path, fix=fix)
    document = serialization.load(path, fix=fix)
    if not isinstance(document, dict) or document.get("verb") != "bench":
        raise InputError(f"{path}: not a result of rtresnet bench", fix=fix)
    bench: _Bench = serialization.convert(
        document.get("result"), _Bench, at="result", where=str(path), fix=fix
    )
    return path, bench["results"]


def matching(
    benchmarks: Iterable[Benchmark], sha256: str, batch: int, gpu: GpuSpec
) -> Iterator[MeasuredLatency]:
    """Yield the sequential measurements of a file at a batch size on a GPU."""
    for path, entries in benchmarks:
        for entry in entries:
            links = entry.get("chain") or [_Link()]
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
                    n=entry["latency"]["n"],
                    median_ms=entry["latency"]["median"],
                    compute_ms=computed["median"] if computed else None,
                )


def _is_gpu(device: str | None, gpu: GpuSpec) -> bool:
    from rtresnet.bench import roofline

    try:
        return roofline.find_gpu(device or "") == gpu
    except UnknownNameError:
        return False
