"""`rtresnet weights`: convert weights from and to other tools."""

from __future__ import annotations

from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.core.reporter import plural
from rtresnet.reporting.tables import assumed
from rtresnet.workflows.weights import WeightsResult, export_weights, import_weights

MODEL_HELP = "Architecture, for weights that do not state it.  [default: as stated, or recognized]"


@click.group("weights")
def command() -> None:
    """Convert weights from and to other tools."""


@command.command("export")
@click.argument("weights")
@click.option("--out", type=common.PATH, required=True, help="Output file, .safetensors.")
@click.option("--model", help=MODEL_HELP)
@common.json_option
def export(weights: str, out: Path, model: str | None) -> None:
    """Write a checkpoint's weights as a safetensors file, which contains no pickled code."""
    _show(export_weights(weights, out, model=model, reporter=common.REPORTER))


@command.command("import")
@click.argument("weights")
@click.option("--out", type=common.PATH, required=True, help="Output file, .pt.")
@click.option("--model", help=MODEL_HELP)
@common.json_option
def import_(weights: str, out: Path, model: str | None) -> None:
    """Write weights from a safetensors file or another tool as a checkpoint."""
    _show(import_weights(weights, out, model=model, reporter=common.REPORTER))


def _show(result: WeightsResult) -> None:
    license = f", licence {result.license}" if result.license else ""
    common.say(
        f"{result.path}: {result.model}, {plural(result.classes, 'class')}, "
        f"{result.bytes / 1e6:.1f} MB{license}"
    )
    common.show(assumed(result.assumed))
    common.write_json("weights", result)
