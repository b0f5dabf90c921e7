"""The result of `rtresnet quickstart` as text and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core import artifacts, atomic_io
from rtresnet.reporting import pages, plots
from rtresnet.reporting.tables import DataTable

if TYPE_CHECKING:
    from rtresnet.workflows.quickstart import QuickstartResult


def lines(done: QuickstartResult) -> Iterator[str | DataTable]:
    """Return the table and the conditions of its figures."""
    shown = table(done)
    yield shown
    yield shown.about
    if slow := caveat(done):
        yield slow
    if not all(entry.measurement.steady for entry in done.bench.results):
        yield "Latency is not steady after 2 s of warm-up; other processes may load this machine."
    plan = done.export.plans[0].plan
    yield (
        f"Plans by {plan.builder} {plan.version} for {', '.join(plan.targets)}; built without a "
        "GPU; running them needs one."
    )


def table(done: QuickstartResult) -> DataTable:
    """Return a row for each precision, with the headings."""
    rows = []
    for file, plan in zip(done.export.onnx, done.export.plans, strict=True):
        timings = {
            entry.measurement.batch: entry.measurement
            for entry in done.bench.results
            if entry.artifact.precision == file.precision
        }
        rows.append(
            (
                file.precision,
                f"{file.bytes / 1e6:.2f}",
                f"{plan.bytes / 1e6:.2f}",
                f"{done.evaluations[file.precision].top1_percent:.2f}",
                f"{100 * done.comparisons[file.precision].agreement:.2f}",
                f"{timings[1].latency.median:.3f}",
                f"{timings[8].latency.images_per_second:,.0f}",
                f"{timings[8].speed:.2f}",
            )
        )
    runs = [entry.artifact.run for entry in done.bench.results]
    notes = sorted({f" INT8: {run.cpu_note}." for run in runs if run.cpu_note})
    return DataTable(
        headings=(
            "precision", "ONNX MB", "plan MB", "top-1 %", "agree %", "ms b1", "img/s b8",
            "speed b8",
        ),
        rows=rows,
        about=f"top-1 on {done.evaluations['fp32'].n} test images; agree: same top-1 as the torch "
        "checkpoint; ms b1: median latency of a batch of 1; speed b8: relative to FP32 at batch 8, "
        f"measured alternately. CPU figures of the ONNX files: {runs[0]}.{''.join(notes)}",
    )  # fmt: skip


def caveat(done: QuickstartResult) -> str | None:
    """Return why INT8 is no faster than FP32; None if it is faster."""
    int8 = [entry for entry in done.bench.results if entry.artifact.precision == "int8"]
    slow = [e.measurement.batch for e in int8 if e.measurement.speed <= 1]
    if not slow:
        return None
    return (
        f"INT8 is not faster than FP32 at {' and '.join(f'batch {b}' for b in slow)} here: "
        f"{done.model} has 16 to 64 channels, too few for the integer kernels of "
        f"{int8[0].artifact.run.provider} to save more than the conversions cost. Wider "
        "nets gain; use the plan on a GPU."
    )


def write_page(path: Path, result: QuickstartResult) -> None:
    """Write the page of a quickstart.

    Args:
        path: The HTML file.
        result: All that was measured.

    Raises:
        UnavailableError: matplotlib or Jinja2 is not installed.
    """
    plans = result.export.plans
    rows: list[tuple[Any, ...]] = []
    for built in plans:
        record = built.plan.attested
        assert record is not None
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in record.dtypes.items())
        rows.append((built.path.name, record.convolutions, dtypes, record.layers,
                     round(built.plan.seconds, 2)))  # fmt: skip
    attested = DataTable(
        headings=("plan", "convolutions", "input type", "layers", "built in s"),
        rows=rows,
        about="Read from TensorRT's own layer dump at build time: the type that the kernel of each "
        "convolution takes as input.",
    )
    origin = DataTable(
        headings=("artifact", "precision", "sha256", "state"),
        rows=[
            (link, record and record.precision, record and record.sha256[:16], state)
            for link, record, state in artifacts.chain(plans[-1].path)
        ],
    )
    samples = {
        entry.artifact.precision or "": entry.measurement.samples
        for entry in result.bench.results
        if entry.measurement.batch == 1
    }
    text = pages.render(
        "quickstart.html",
        title=f"{result.model} on {result.data}: FP32, FP16, INT8",
        result=result,
        precisions=table(result),
        caveat=caveat(result),
        curve=plots.svg(
            plots.training_figure(result.log), "training and held-out error against epochs"
        ),
        latency=plots.latency_distribution(samples, "ms per batch of 1"),
        attested=attested,
        origin=origin,
    )
    atomic_io.write_text(path, text)
