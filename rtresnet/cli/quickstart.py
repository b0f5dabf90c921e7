"""`rtresnet quickstart`: the whole pipeline once, on real images, on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from rtresnet.cli import bench_show, common
from rtresnet.cli.options import config_options
from rtresnet.core.serialization import to_builtins
from rtresnet.workflows.quickstart import QuickstartConfig


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
    from rtresnet.reporting import run_pages
    from rtresnet.workflows.quickstart import quickstart

    done = quickstart(out, config, reporter=REPORTER)
    done = dataclasses.replace(done, train=dataclasses.replace(done.train, page=show(done.train)))
    result = to_builtins(done)
    result["train"]["log"] = result["log"]
    _show(result)
    run_pages.write_quickstart(
        out / "index.html",
        result,
        headings=HEADINGS,
        rows=rows(result),
        legend=legend(result),
        caveat=caveat(result),
    )
    common.write_json(str(out / "quickstart.json"), "quickstart", result)
    common.say(f"page: {out / 'index.html'}   ({result['seconds']:.0f} s in all)")
    common.say(f"next: rtresnet inspect {out / 'engines' / (result['model'] + '-int8.plan')}")
    common.write_json(json_file, "quickstart", result)


HEADINGS = (
    "precision", "ONNX MB", "plan MB", "top-1 %", "agree %", "ms b1", "img/s b8", "speed b8",
)  # fmt: skip


def rows(result: dict[str, Any]) -> list[tuple[object, ...]]:
    """The one table: a row a precision."""
    table: list[tuple[object, ...]] = []
    for entry, plan in zip(result["export"]["onnx"], result["export"]["plans"], strict=True):
        precision = entry["precision"]
        timings = {r["batch"]: r for r in result["bench"]["results"] if r["precision"] == precision}
        table.append(
            (
                precision,
                f"{entry['bytes'] / 1e6:.2f}",
                f"{plan['bytes'] / 1e6:.2f}",
                f"{result['eval'][precision]['top1_percent']:.2f}",
                f"{100 * result['compare'][precision]['agreement']:.2f}",
                f"{timings[1]['latency']['median']:.3f}",
                f"{timings[8]['latency']['images_per_second']:,.0f}",
                f"{timings[8]['speed']:.2f}",
            )
        )
    return table


def legend(result: dict[str, Any]) -> str:
    """What the table's columns are, with n."""
    evaluated = result["eval"]["fp32"]
    notes = common.int8_notes(result["bench"]["results"])
    return " ".join(
        (
            f"top-1 on {evaluated['n']} test images; agree: same top-1 as the torch checkpoint; ms "
            "b1: median latency of a batch of 1; speed b8: against FP32 at batch 8, in turn. "
            f"CPU figures of the ONNX files: {bench_show.where(result['bench']['results'][0])}.",
            *(f"INT8: {note}." for note in notes),
        )
    )


def caveat(result: dict[str, Any]) -> str | None:
    """Why INT8 is no faster, where it is not; None where it is."""
    found = [r for r in result["bench"]["results"] if r["precision"] == "int8"]
    slow = [f"batch {entry['batch']}" for entry in found if entry["speed"] <= 1]
    if not slow:
        return None
    return (
        f"INT8 is not faster than FP32 at {' and '.join(slow)} here: {result['model']} has 16 to "
        f"64 channels, too few for the integer kernels of {found[0]['provider']} to gain what "
        "converting costs. They do on wider nets; the plan is for a GPU."
    )


def _show(result: dict[str, Any]) -> None:
    from rtresnet.reporting import tables

    console = common.out_console()
    tables.show(console, HEADINGS, rows(result))
    console.print(legend(result), markup=False)
    if slow := caveat(result):
        console.print(slow, markup=False)
    if not all(entry["steady"] for entry in result["bench"]["results"]):
        console.print("Not steady after 2 s of warm-up: another load on this machine?")
    plans = result["export"]["plans"]
    console.print(
        f"Plans by {plans[0]['builder']} {plans[0]['version']} for "
        f"{', '.join(plans[0]['targets'])}; built without a GPU, they run on one.",
        markup=False,
    )
