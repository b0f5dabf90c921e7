"""`rtresnet build`: an ONNX file to a plan."""

from __future__ import annotations

from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.reporting import artifact
from rtresnet.workflows.build import BuildConfig, build, build_per_target
from rtresnet.workflows.embedded import EmbedConfig


@click.command("build")
@click.argument("source", metavar="MODEL.onnx", type=common.PATH)
@click.option(
    "--out",
    type=common.PATH,
    help="Plan to write.  [default: next to the ONNX file]",
)
@config_options(BuildConfig)
@config_options(EmbedConfig, argument="embed")
@click.option(
    "--per-target",
    is_flag=True,
    help="Write one plan for each target, such as MODEL-sm_86.plan.  [default: one plan for all]",
)
@common.json_option
def command(
    source: Path,
    out: Path | None,
    config: BuildConfig,
    embed: EmbedConfig,
    per_target: bool,
) -> None:
    """Compile an ONNX file into a TensorRT plan. Needs no GPU with TensorRT-RTX.

    The file determines the precision: `export` and `quantize` write FP16 and INT8 files. With
    --input or --topk, MODEL-u8-top5.onnx or similar is written first and the plan built from it.
    """
    if per_target:
        results = build_per_target(source, config, out=out, embed=embed, reporter=common.REPORTER)
    else:
        results = (build(source, config, out=out, embed=embed, reporter=common.REPORTER),)
    common.show(map(artifact.build_line, results))
    common.write_json("build", {"plans": results} if per_target else results[0])
