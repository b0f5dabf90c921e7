"""`rtresnet models`: the nets as a table."""

from __future__ import annotations

import click

from rtresnet.cli import common
from rtresnet.reporting.tables import DataTable
from rtresnet.workflows.models import list_models


@click.command("models")
@common.json_option
def command() -> None:
    """List the nets: depth, block, parameters, multiply-adds."""
    result = list_models()
    rows = [
        (m.model, m.depth, m.block, m.shortcut, f"{m.size}x{m.size}", f"{m.parameters:,}",
         f"{m.multiply_adds / 1e9:.3f} G")
        for m in result.models
    ]  # fmt: skip
    headings = ("model", "depth", "block", "shortcut", "input", "parameters", "mult-adds")
    common.show([DataTable(headings=headings, rows=rows)])
    common.note("CIFAR nets exist for every depth 6n+2, for example resnet8 or plain26.")
    common.write_json("models", result)
