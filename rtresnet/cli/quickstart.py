"""`rtresnet quickstart`: the whole pipeline once, on real images, on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.serialization import to_builtins
from rtresnet.workflows.quickstart import QuickstartConfig

if TYPE_CHECKING:
    from rtresnet.reporting.tables import DataTable
    from rtresnet.workflows.quickstart import QuickstartResult


@click.command("quickstart")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="runs/quickstart",
    help="Folder; an earlier quickstart in it is replaced.  [default: runs/quickstart]",
)
@config_options(QuickstartConfig)
@common.json_option
def command(out: Path, config: QuickstartConfig, json_file: str | None) -> None:
    """Train, export, quantize, build and measure a small net; write a page.

    ResNet-20 on the digits that scikit-learn ships, about a minute on two cores.
    """
    from rtresnet.cli.console import REPORTER
    from rtresnet.cli.train import show
    from rtresnet.reporting import pages
    from rtresnet.workflows.quickstart import quickstart

    done = quickstart(out, config, reporter=REPORTER)
    done = dataclasses.replace(done, train=dataclasses.replace(done.train, page=show(done.train)))
    _show(done)
    pages.write_quickstart(out / "index.html", done, table(done), caveat(done))
    record = to_builtins(done)
    record["train"]["log"] = record["log"]
    common.write_json(str(out / "quickstart.json"), "quickstart", record)
    common.say(f"page: {out / 'index.html'}   ({done.seconds:.0f} s in all)")
    common.say(f"next: rtresnet inspect {out / 'engines' / (done.model + '-int8.plan')}")
    common.write_json(json_file, "quickstart", record)


def table(done: QuickstartResult) -> DataTable:
    """Return a row for each precision, with what its columns are."""
    from rtresnet.reporting.tables import DataTable

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
    notes = sorted({f" INT8: {run.int8_note}." for run in runs if run.int8_note})
    return DataTable(
        headings=(
            "precision", "ONNX MB", "plan MB", "top-1 %", "agree %", "ms b1", "img/s b8",
            "speed b8",
        ),
        rows=rows,
        about=f"top-1 on {done.evaluations['fp32'].n} test images; agree: same top-1 as the torch "
        "checkpoint; ms b1: median latency of a batch of 1; speed b8: against FP32 at batch 8, in "
        f"turn. CPU figures of the ONNX files: {runs[0]}.{''.join(notes)}",
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
        "nets gain; the plan is for a GPU."
    )


def _show(done: QuickstartResult) -> None:
    from rtresnet.reporting import tables

    console, shown = common.out_console(), table(done)
    tables.show(console, shown.headings, shown.rows)
    console.print(shown.about, markup=False)
    if slow := caveat(done):
        console.print(slow, markup=False)
    if not all(entry.measurement.steady for entry in done.bench.results):
        console.print("Not steady after 2 s of warm-up: another load on this machine?")
    plan = done.export.plans[0].plan
    console.print(
        f"Plans by {plan.builder} {plan.version} for {', '.join(plan.targets)}; built without a "
        "GPU, they run on one.",
        markup=False,
    )
