"""Results of `rtresnet bench` as tables and sentences, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.reporting.tables import DataTable, number

if TYPE_CHECKING:
    from rtresnet.bench.verdict import Judgement
    from rtresnet.workflows.benchmark import BenchmarkedArtifact, BenchmarkEntry, BenchmarkResult
    from rtresnet.workflows.benchmark_search import BenchmarkSearchResult

HOW = {
    "single-stream": "Latency in ms per batch, wall time, sequential requests.",
    "multi-stream": "Latency in ms per query of 8 images, sequential queries.",
    "offline": "Time in ms per batch, sequential batches; throughput is the relevant figure.",
}


def lines(
    result: BenchmarkResult, *, intervals: bool = False, trtexec: bool = False
) -> Iterator[str | DataTable]:
    """Return the table, followed by how and where it was measured."""
    entries = result.results
    several = len({entry.artifact.asked for entry in entries}) > 1 or any(
        entry.measurement.comparison for entry in entries
    )
    yield from (f"NOTE: {note}" for note in result.notes)
    headings = ["file", "batch", "median", "p90", "p95", "p99", "img/s", "n"]
    rows: list[tuple[object, ...]] = []
    for entry in entries:
        measured = entry.measurement
        latency = measured.latency
        rows.append(
            (
                Path(entry.artifact.measured).name, measured.batch, latency.median, latency.p90,
                latency.p95, latency.p99, latency.images_per_second, latency.n,
                *((f"{measured.speed:.2f}",) if several else ()),
            )
        )  # fmt: skip
    yield DataTable(headings=[*headings, *(["speed"] if several else [])], rows=rows)
    yield from _lines(result, several)
    yield from (f"NOTE: {remark}" for remark in result.environment.remarks)
    if intervals:
        yield _intervals(entries)
    for entry in entries if trtexec else ():
        yield f"{entry.name} in trtexec's format:"
        yield from str(entry.measurement.trtexec).splitlines()
    for entry, judgement in zip(entries, result.regressions or (), strict=False):
        yield f"{entry.name}, against {judgement.baseline}: {_judgement(judgement)}"


def _lines(result: BenchmarkResult, several: bool) -> Iterator[str]:
    entries, scenario = result.results, result.scenario
    if scenario == "server":
        yield f"Latency in ms from the scheduled arrival of a request, {result.qps:g} per second."
    elif scenario == "closed":
        clients = entries[0].measurement.load.concurrency
        yield f"Latency in ms per request, with {clients} requests in flight."
    elif scenario != "offline" or not all(entry.measurement.load.in_flight for entry in entries):
        yield HOW[scenario]
    if result.with_preprocess:
        yield "Measured from encoded bytes, including decoding, cropping and normalizing."
    for entry in entries:
        yield from _facts(entry)
    if several:
        how = (
            "one file after the other"
            if scenario in ("server", "closed")
            else "in alternating slices"
        )
        yield f"Speed against the first file, measured {how}."
        compared = [entry.measurement.comparison for entry in entries]
        if any(comparison and comparison.level > 0.951 for comparison in compared):
            yield "The intervals of one batch size hold together with 95 %."
        yield from (_verdict(entry) for entry in entries if entry.measurement.comparison)
    yield from _where(entry.artifact for entry in entries)
    if any(entry.artifact.untrained for entry in entries):
        yield "Untrained weights: latency is meaningful, accuracy is not."
    if not all(entry.measurement.steady for entry in entries):
        yield "Latency is not steady after 2 s of warm-up; other processes may load this machine."


def _facts(entry: BenchmarkEntry) -> Iterator[str]:
    """Yield the remarks on one result that its row cannot show."""
    load, parts, name = entry.measurement.load, entry.measurement.parts, entry.name
    if load.md1_p99_ms is not None:
        yield (
            f"{name}: expected p99 from queueing theory (M/D/1) at {load.service_ms:.3g} ms per "
            f"request: {load.md1_p99_ms:.3g} ms."
        )
    elif load.service_ms is not None:
        yield f"{name}: overloaded; one request takes {load.service_ms:.3g} ms."
    if load.in_flight:
        yield (
            f"{name}: {load.in_flight} batches in flight; time in ms between finished batches; "
            "throughput is the relevant figure."
        )
    if load.unanswered:
        arrived = entry.measurement.latency.n + load.unanswered
        yield (
            f"{name}: {load.unanswered:,} of {arrived:,} requests were unanswered when the run was "
            "stopped; all latencies are lower bounds."
        )
    if (load.late_ms or 0) > 1:
        yield f"{name}: requests were sent up to {load.late_ms:.2g} ms late (p99)."
    if load.refused:
        yield f"{name}: {load.refused} requests were rejected because the queue was full."
    if parts:
        medians = ", ".join(f"{part} {latency.median:.3g}" for part, latency in parts.items())
        yield f"{name}: medians measured with CUDA events, in ms: {medians}"
        enqueue, compute = parts.get("enqueue"), parts.get("compute")
        if enqueue and compute and enqueue.median > 0.8 * compute.median:
            yield f"{name}: enqueueing takes as long as computing; the CPU limits the rate."


def _verdict(entry: BenchmarkEntry) -> str:
    comparison = entry.measurement.comparison
    assert comparison is not None
    pairs = "rounds" if comparison.paired else "samples, not paired"
    return (
        f"{entry.name}: {comparison.verdict} ({comparison.low:.2f} to {comparison.high:.2f} times "
        f"as fast, {100 * comparison.level:.0f} %, {comparison.n} {pairs})"
    )


def _judgement(judgement: Judgement) -> str:
    comparison = judgement.comparison
    if comparison is None:
        return f"too few samples for a {judgement.figure}"
    return (
        f"{judgement.figure} latency {comparison.speed:.3f} times as fast ({comparison.low:.3f} to "
        f"{comparison.high:.3f}): "
        + ("REGRESSION" if judgement.regression else "no regression shown")
        + f" beyond {100 * judgement.tolerance:g} %"
    )


def _intervals(entries: Iterable[BenchmarkEntry]) -> DataTable:
    def cell(bounds: tuple[float, float] | None) -> str | None:
        return None if bounds is None else " to ".join(number(bound) for bound in bounds)

    rows = [
        (
            Path(entry.artifact.measured).name,
            entry.measurement.batch,
            *(
                cell(entry.measurement.latency.intervals[name])
                for name in ("median", "p99", "p999", "images_per_second")
            ),
        )
        for entry in entries
    ]
    headings = ["file", "batch", "median", "p99", "p99.9", "img/s"]
    return DataTable(headings=headings, rows=rows, title="95 % intervals")


def search_lines(result: BenchmarkSearchResult) -> Iterator[str | DataTable]:
    """Return the measurements of each search as a table, and the largest load."""
    notes = (entry.artifact.note for entry in result.searches)
    yield from (f"NOTE: {note}" for note in notes if note)
    for entry in result.searches:
        variable, best = entry.search.what, entry.search.best
        rows = [
            (
                f"{point.load:g}", point.median, point.p99, point.images_per_second, point.n,
                "yes" if point.holds else "no",
            )
            for point in entry.search.points
        ]  # fmt: skip
        yield DataTable(headings=[variable, "median", "p99", "img/s", "n", "holds"], rows=rows)
        if best is not None:
            more = ", the largest one tried" if entry.search.limit else ""
            yield (
                f"{Path(entry.artifact.measured).name}: {variable} {best:g} keeps the p99 within "
                f"{entry.search.p99_ms:g} ms{more}."
            )
    yield from _where(entry.artifact for entry in result.searches)
    yield from (f"NOTE: {remark}" for remark in result.environment.remarks)


def write_plot(target: Path, result: BenchmarkSearchResult) -> None:
    """Draw the searches as SVG or PNG, by the file's suffix.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    from rtresnet.core import atomic_io
    from rtresnet.core.serialization import to_builtins
    from rtresnet.reporting import plots

    figure = plots.search_figure(
        [(entry.artifact.measured, to_builtins(entry.search)) for entry in result.searches]
    )
    if target.suffix.lower() == ".svg":
        atomic_io.write_text(target, plots.svg(figure, "latency against load") + "\n")
    else:
        plots.save_png(figure, target)


def _where(artifacts: Iterable[BenchmarkedArtifact]) -> list[str]:
    """Return each device with its provider and versions once, then notes on the files."""
    runs = [artifact.run for artifact in artifacts]
    notes = ({run.cpu_note for run in runs}, {run.batch_note for run in runs})
    return [
        *sorted({str(run) for run in runs}),
        *(line for group in notes for line in sorted(filter(None, group))),
    ]
