"""`rtresnet quantize`: a folded FP32 ONNX file to FP16, INT8 or FP8."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.errors import InputError
from rtresnet.core.reporter import plural
from rtresnet.workflows.accuracy_gate import AccuracyCheckFailedError, GateResult
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.quantize import QuantizeConfig


@click.command("quantize")
@click.argument("source", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--int8", is_flag=True, help="Write INT8.  [default: on]")
@click.option("--fp8", is_flag=True, help="Write FP8 (E4M3) instead of INT8.  [default: off]")
@click.option("--fp16", is_flag=True, help="Write FP16 instead of INT8.  [default: off]")
@config_options(QuantizeConfig, leave_out=("precision",))
@config_options(InputConfig, argument="stated")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The new file.  [default: MODEL-int8.onnx or similar next to the source]",
)
@common.report_option("the images of --eval whose class changes, with both answers")
@common.json_option
def command(
    source: Path,
    int8: bool,
    fp8: bool,
    fp16: bool,
    config: QuantizeConfig,
    stated: InputConfig,
    out: Path | None,
    report: Path | None,
    json_file: str | None,
) -> None:
    """Write an INT8, FP8 or FP16 version of an FP32 ONNX file.

    FP8 needs an Ada, Hopper or Blackwell GPU. With --eval, the accuracy of INT8 or FP8 is compared
    with that of FP32 on the same images. Where the loss is not within --max-drop, the most harmful
    blocks stay in float (in FP8, they run in INT8 where that has less noise); the exit code is 1
    where that does not help. The verdict says whether the images are enough to show that the bound
    holds.
    """
    from rtresnet.cli.console import REPORTER
    from rtresnet.workflows.quantize import quantize

    flags: dict[Literal["int8", "fp8", "fp16"], bool] = {"int8": int8, "fp8": fp8, "fp16": fp16}
    asked = [name for name, wanted in flags.items() if wanted]
    if len(asked) > 1:
        named = " and ".join(f"--{name}" for name in asked)
        raise InputError(f"{named} are {len(asked)} files", fix="run it once for each")
    config = dataclasses.replace(config, precision=asked[0] if asked else "int8")
    if report is not None and config.eval_data is None:
        raise InputError("--report shows the images of --eval", fix="--eval DATA")
    try:
        result = quantize(source, config, out=out, stated=stated, reporter=REPORTER)
    except AccuracyCheckFailedError as failed:
        _show_blocks(failed.result)
        if report is not None:
            common.say(f"page: {_write_page(report, failed.result, source)}")
        measured = failed.result.measured()
        common.write_json(json_file, "quantize", {"file": None, "measured": measured})
        raise
    if result.gate is not None:
        _show_blocks(result.gate)
        for sentence in result.gate.summary:
            common.say(sentence)
        if report is not None:
            common.say(f"page: {_write_page(report, result.gate, source)}")
    sidecar = result.sidecar
    line = f"{result.path.as_posix()}: {sidecar.precision}, {sidecar.bytes / 1e6:.1f} MB"
    if calibration := sidecar.calibration:
        images = "the statistics of batch norm, no images"
        if calibration.n:
            images = f"{plural(calibration.n, 'image')} of {calibration.images}"
        line += f", scales by {calibration.method} from {images} in {calibration.scales}"
    common.say(line)
    common.footer(f"Assumed: {entry}." for entry in sidecar.assumed)
    if result.gate is not None:
        common.footer(f"Assumed: {entry}." for entry in result.gate.drop.assumed)
        common.footer(f"Note: {entry}." for entry in result.gate.remarks)
    common.write_json(json_file, "quantize", result)


def _write_page(folder: Path, gate: GateResult, source: Path) -> Path:
    from rtresnet.reporting import pages
    from rtresnet.workflows import gallery

    drop = gate.drop.drop
    summary = [
        *gate.summary,
        "The quantized net gives another class than FP32 for "
        f"{plural(gate.changed, 'image')} of {drop.n:,}: "
        f"{drop.lost} that only FP32 classifies correctly, {drop.won} that only the other does.",
    ]
    images = gallery.from_data(gate.drop.data, "test", [flip.index for flip in gate.flips])
    title = f"Images whose class quantization changes: {source.name}"
    return pages.write_flips(folder, gate.flips, images, title=title, summary=summary)


def _show_blocks(gate: GateResult) -> None:
    from rtresnet.reporting import tables

    rows: list[tuple[str, ...]] = [
        (block.name, f"{block.alone_db:.1f}", f"{block.gain_db:.2f}", f"{100 * block.weights:.1f}",
         "" if block.int8_gain_db is None else f"{block.int8_gain_db:.2f}", block.runs_in)
        for block in gate.blocks
    ]  # fmt: skip
    headings = ["block", "SNR alone, dB", "in float, dB gained", "% of weights",
                "in INT8, dB gained", "runs in"]  # fmt: skip
    if not any(block.int8_gain_db for block in gate.blocks):  # an INT8 file
        rows = [(*row[:4], row[5]) for row in rows]
        del headings[4]
    tables.show(common.out_console(), headings, rows)
