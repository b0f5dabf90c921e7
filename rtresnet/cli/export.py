"""`rtresnet export`: from a checkpoint to folded ONNX, quantized ONNX and a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.reporting import artifact
from rtresnet.workflows.build import BuildConfig
from rtresnet.workflows.embed_io import EmbedConfig
from rtresnet.workflows.export import ExportConfig, export
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.quantize import QuantizeConfig

GATE = ("precision", "eval_data", "max_drop", "gate", "classes")  # options of `quantize` only


@click.command("export")
@config_options(ExportConfig, leave_out=("precisions", "plan"))
@click.option(
    "--weights",
    metavar="FILE|imagenet|hf:OWNER/NAME|untrained",
    help="A checkpoint, torchvision's published weights, a Hugging Face repository, or random "
    "weights.  [default: the best run "
    "of --model under runs/, if all used the same data set]",
)
@click.option("--fp32", is_flag=True, help="Build a plan in FP32.  [default: off]")
@click.option(
    "--fp16",
    is_flag=True,
    help="Write FP16 and its plan.  [default: on if no other precision is named]",
)
@click.option("--bf16", is_flag=True, help="Write BF16 and its plan.  [default: off]")
@click.option("--int8", is_flag=True, help="Write INT8 and its plan.  [default: off]")
@click.option("--fp8", is_flag=True, help="Write FP8 (E4M3) and its plan.  [default: off]")
@config_options(QuantizeConfig, argument="quantize", leave_out=GATE)
@config_options(BuildConfig, argument="build", leave_out=("timing_cache",))
@config_options(EmbedConfig, argument="embed")
@config_options(InputConfig, argument="stated")
@click.option(
    "--out",
    type=common.PATH,
    default="engines",
    help="Output folder, or path of the FP32 file.  [default: engines]",
)
@click.option("--no-plan", is_flag=True, help="Stop at the ONNX files.  [default: build plans]")
@common.json_option
def command(
    config: ExportConfig,
    weights: str | None,
    fp32: bool,
    fp16: bool,
    bf16: bool,
    int8: bool,
    fp8: bool,
    quantize: QuantizeConfig,
    build: BuildConfig,
    embed: EmbedConfig,
    stated: InputConfig,
    out: Path,
    no_plan: bool,
) -> None:
    """Convert a checkpoint to ONNX files and plans, each with a sidecar.

    Writes MODEL.onnx (FP32, batch norm folded), MODEL-fp16.onnx, MODEL-int8.onnx or similar, and
    the plans MODEL-fp32.plan, MODEL.plan (FP16), MODEL-int8.plan or similar. BF16 needs a GPU from
    sm_80 on, FP8 an Ada, Hopper or Blackwell GPU. With --input or --topk also
    MODEL-int8-u8-top5.onnx or similar, and the plans from those.
    """
    asked: dict[Literal["fp32", "fp16", "bf16", "int8", "fp8"], bool]
    asked = {"fp32": fp32, "fp16": fp16, "bf16": bf16, "int8": int8, "fp8": fp8}
    precisions = tuple(name for name, wanted in asked.items() if wanted) or ("fp16",)
    config = dataclasses.replace(config, precisions=precisions, plan=not no_plan)
    result = export(
        weights, out, config, quantize=quantize, build=build, embed=embed, stated=stated,
        reporter=common.REPORTER,
    )  # fmt: skip
    common.show(artifact.export_lines(result))
    common.write_json("export", result)
