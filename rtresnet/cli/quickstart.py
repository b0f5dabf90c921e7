"""`rtresnet quickstart`: the complete pipeline on a small data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.serialization import to_builtins
from rtresnet.reporting import quickstart as report
from rtresnet.workflows.quickstart import QuickstartConfig, quickstart


@click.command("quickstart")
@click.option(
    "--out",
    type=common.PATH,
    default="runs/quickstart",
    help="Output folder; replaces an earlier quickstart.  [default: runs/quickstart]",
)
@config_options(QuickstartConfig)
@common.json_option
def command(out: Path, config: QuickstartConfig) -> None:
    """Train, export, quantize, build and measure a small net; write a page.

    Trains ResNet-20 on scikit-learn's digits. Takes about a minute on two cores.
    """
    from rtresnet.cli.train import show

    done = quickstart(out, config, reporter=common.REPORTER)
    done = dataclasses.replace(done, train=dataclasses.replace(done.train, page=show(done.train)))
    common.show(report.lines(done))
    report.write_page(out / "index.html", done)
    record = to_builtins(done)
    record["train"]["log"] = record["log"]
    common.write_json("quickstart", record, file=out / "quickstart.json")
    common.say(f"page: {out / 'index.html'}   ({done.seconds:.0f} s in total)")
    common.say(f"next: rtresnet inspect {out / 'engines' / (done.model + '-int8.plan')}")
