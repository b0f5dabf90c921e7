"""`rtresnet quantize`: a folded FP32 ONNX file to FP16, BF16, INT8 or FP8."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.errors import InputError
from rtresnet.reporting import artifact
from rtresnet.workflows.accuracy_gate import AccuracyCheckFailedError, GateResult
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.quantize import QuantizeConfig, quantize


@click.command("quantize")
@click.argument("source", metavar="MODEL.onnx", type=common.PATH)
@click.option("--int8", is_flag=True, help="Write INT8.  [default: on]")
@click.option("--fp8", is_flag=True, help="Write FP8 (E4M3) instead of INT8.  [default: off]")
@click.option("--fp16", is_flag=True, help="Write FP16 instead of INT8.  [default: off]")
@click.option("--bf16", is_flag=True, help="Write BF16 instead of INT8.  [default: off]")
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
    int8: bool,
    fp8: bool,
    fp16: bool,
    bf16: bool,
    config: QuantizeConfig,
    stated: InputConfig,
    out: Path | None,
    report: Path | None,
) -> None:
    """Write an INT8, FP8, FP16 or BF16 version of an FP32 ONNX file.

    FP8 needs an Ada, Hopper or Blackwell GPU, BF16 one from sm_80 on.

    With --eval, the accuracy of INT8 or FP8 is compared with that of FP32 on the same images. Where
    the loss is not within --max-drop, the most harmful blocks stay in float (in FP8, they run in
    INT8 where that has less noise); the exit code is 1 where that does not help. The verdict
    says whether the images are enough to show that the bound holds.
    """
    flags: dict[Literal["int8", "fp8", "fp16", "bf16"], bool]
    flags = {"int8": int8, "fp8": fp8, "fp16": fp16, "bf16": bf16}
    asked = [name for name, wanted in flags.items() if wanted]
    if len(asked) > 1:
        named = " and ".join(f"--{name}" for name in asked)
        raise InputError(f"{named} cannot be combined", fix="run the command once for each")
    config = dataclasses.replace(config, precision=asked[0] if asked else "int8")
    if report is not None and config.eval_data is None:
        raise InputError("--report needs --eval, whose images it shows", fix="--eval DATA")
    try:
        result = quantize(source, config, out=out, stated=stated, reporter=common.REPORTER)
    except AccuracyCheckFailedError as failed:
        common.show([artifact.block_table(failed.result)])
        _write_page(report, failed.result, source)
        common.write_json("quantize", {"file": None, "measured": failed.result.measured()})
        raise
    if result.gate is not None:
        common.show([artifact.block_table(result.gate), *result.gate.summary])
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
