"""`rtresnet weights`: weights for other tools and from them."""

from __future__ import annotations

from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.core.reporter import plural
from rtresnet.workflows.weights import WeightsResult, export_weights, import_weights

MODEL_HELP = "Architecture of weights that do not state it.  [default: as stated, or recognized]"


@click.group("weights")
def command() -> None:
    """Move weights between rtresnet and other tools."""


@command.command("export")
@click.argument("weights")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A .safetensors file.")
@click.option("--model", help=MODEL_HELP)
@common.json_option
def export(weights: str, out: Path, model: str | None, json_file: str | None) -> None:
    """Write a checkpoint's weights as a safetensors file, which holds no pickled code."""
    from rtresnet.cli.console import REPORTER

    _show(export_weights(weights, out, model=model, reporter=REPORTER), json_file)


@command.command("import")
@click.argument("weights")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A .pt file.")
@click.option("--model", help=MODEL_HELP)
@common.json_option
def import_(weights: str, out: Path, model: str | None, json_file: str | None) -> None:
    """Write weights from a safetensors file or another tool as a checkpoint."""
    from rtresnet.cli.console import REPORTER

    _show(import_weights(weights, out, model=model, reporter=REPORTER), json_file)


def _show(result: WeightsResult, json_file: str | None) -> None:
    license = f", licence {result.license}" if result.license else ""
    common.say(
        f"{result.path}: {result.model}, {plural(result.classes, 'class')}, "
        f"{result.bytes / 1e6:.1f} MB{license}"
    )
    common.footer(f"Assumed: {line}." for line in result.assumed)
    common.write_json(json_file, "weights", result)
