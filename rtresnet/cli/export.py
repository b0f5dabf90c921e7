"""`rtresnet export`: from a checkpoint to folded ONNX, quantized ONNX and a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options, precision_flags
from rtresnet.core.precisions import PRECISIONS, PrecisionName
from rtresnet.reporting import artifact
from rtresnet.workflows.build import BuildConfig
from rtresnet.workflows.embedded import EmbedConfig
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
@precision_flags(
    {name: f"Write {spec.title} and its plan." for name, spec in PRECISIONS.items()}
    | {"fp32": "Build a plan in FP32."},
    default="fp16",
    default_text="on if no other precision is named",
)
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
    precisions: tuple[PrecisionName, ...],
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
    sm_80 on, FP8 an Ada, Hopper or Blackwell GPU. With --input or --topk, also writes
    MODEL-int8-u8-top5.onnx or similar, and builds the plans from these.
    """
    config = dataclasses.replace(config, precisions=precisions, plan=not no_plan)
    result = export(
        weights, out, config, quantize=quantize, build=build, embed=embed, stated=stated,
        reporter=common.REPORTER,
    )  # fmt: skip
    common.show(artifact.export_lines(result))
    common.write_json("export", result)
