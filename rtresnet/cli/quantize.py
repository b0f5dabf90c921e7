"""`rtresnet quantize`: a folded FP32 ONNX file to FP16, BF16, INT8 or FP8."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options, precision_flags
from rtresnet.core.errors import InputError
from rtresnet.core.precisions import PRECISIONS, QuantizedName
from rtresnet.reporting import artifact
from rtresnet.workflows.accuracy_gate import AccuracyCheckFailedError, GateResult
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.quantize import QuantizeConfig, quantize


@click.command("quantize")
@click.argument("source", metavar="MODEL.onnx", type=common.PATH)
@precision_flags(
    {name: f"Write {PRECISIONS[name].title} instead of INT8." for name in get_args(QuantizedName)}
    | {"int8": "Write INT8."},
    default="int8",
    default_text="on",
)
@config_options(QuantizeConfig, leave_out=("precision",))
@config_options(InputConfig, argument="stated")
@click.option(
    "--out",
    type=common.PATH,
    help="Output file.  [default: MODEL-int8.onnx or similar next to the source]",
)
@common.report_option("the images of --eval whose class changes, with both predictions")
@common.json_option
def command(
    source: Path,
    precisions: tuple[QuantizedName, ...],
    config: QuantizeConfig,
    stated: InputConfig,
    out: Path | None,
    report: Path | None,
) -> None:
    """Write an INT8, FP8, FP16 or BF16 version of an FP32 ONNX file.

    FP8 needs an Ada, Hopper or Blackwell GPU, BF16 one from sm_80 on.

    With --eval, the accuracy of INT8 or FP8 is compared with that of FP32 on the same images. If
    the loss is not within --max-drop, the most harmful blocks stay in float (in FP8 files they use
    INT8 if that has less noise). The exit code is 1 if the bound cannot be met. The verdict says
    whether the images are enough to show that the bound holds.
    """
    if len(precisions) > 1:
        flags = " and ".join(f"--{name}" for name in precisions)
        raise InputError(f"{flags} cannot be combined", fix="run the command once for each")
    config = dataclasses.replace(config, precision=precisions[0])
    if report is not None and config.eval_data is None:
        raise InputError(
            "--report shows the images of --eval, which is missing", fix="add --eval DATA"
        )
    try:
        result = quantize(source, config, out=out, stated=stated, reporter=common.REPORTER)
    except AccuracyCheckFailedError as failed:
        table = artifact.block_table(failed.result)
        common.show([table, table.about])
        _write_page(report, failed.result, source)
        common.write_json("quantize", {"file": None, "measured": failed.result.measured()})
        raise
    if result.gate is not None:
        table = artifact.block_table(result.gate)
        common.show([table, table.about, *result.gate.summary])
        _write_page(report, result.gate, source)
    common.show(artifact.quantize_lines(result))
    common.write_json("quantize", result)


def _write_page(folder: Path | None, gate: GateResult, source: Path) -> None:
    from rtresnet.reporting import pages
    from rtresnet.workflows import gallery

    if folder is not None:
        images = gallery.from_data(gate.drop.data, "test", [flip.index for flip in gate.flips])
        title = f"Images whose class quantization changes: {source.name}"
        summary = artifact.gate_summary(gate)
        page = pages.write_flips(folder, gate.flips, images, title=title, summary=summary)
        common.say(f"page: {page}")
