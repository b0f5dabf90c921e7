"""`rtresnet build`: an ONNX file to a plan."""

from __future__ import annotations

from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.reporter import plural
from rtresnet.core.sidecar import Plan
from rtresnet.workflows.build import BuildConfig, BuildResult
from rtresnet.workflows.embed_io import EmbedConfig


@click.command("build")
@click.argument("source", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The plan to write  [default: next to the ONNX file]",
)
@config_options(BuildConfig)
@config_options(EmbedConfig, argument="embed")
@click.option(
    "--per-target",
    is_flag=True,
    help="Write one plan for each target: MODEL-sm_86.plan, ...  [default: one plan for all]",
)
@common.json_option
def command(
    source: Path,
    out: Path | None,
    config: BuildConfig,
    embed: EmbedConfig,
    per_target: bool,
    json_file: str | None,
) -> None:
    """Compile an ONNX file into a TensorRT plan. Needs no GPU with TensorRT-RTX.

    The file determines the precision: `export` and `quantize` write FP16 and INT8 files. With
    --input or --topk, MODEL-u8-top5.onnx or similar is written first and the plan built from it.
    """
    from rtresnet.cli.console import REPORTER
    from rtresnet.workflows.build import build, build_per_target

    if per_target:
        results = build_per_target(source, config, out=out, embed=embed, reporter=REPORTER)
    else:
        results = (build(source, config, out=out, embed=embed, reporter=REPORTER),)
    for result in results:
        common.out_console().print(describe(result), soft_wrap=True)
    common.write_json(json_file, "build", {"plans": results} if per_target else results[0])


def describe(result: BuildResult) -> str:
    """Return one line that describes a plan: targets, size, and what was attested."""
    plan = result.plan
    proof = describe_attested(plan) if plan.attested else "not attested: no record of its layers"
    targets = ", ".join(plan.targets) or "the GPU it was built on"
    return (
        f"{result.path}: {result.bytes / 1e6:.1f} MB in {plan.seconds:.1f} s by "
        f"{plan.builder} {plan.version}, for {targets}; {proof}"
    )


def describe_attested(plan: Plan) -> str:
    """Return what the record of the layers shows: data types, and what did not fuse."""
    attested = plan.attested
    assert attested is not None
    took = ", ".join(f"{count} {_dtype(dtype, plan)}" for dtype, count in attested.dtypes.items())
    parts = [f"of {attested.convolutions} convolutions {took}"]
    if len(attested.dtypes) > 1 and attested.stages:
        rare = min(attested.dtypes, key=attested.dtypes.__getitem__)
        where = [f"{n} in {stage}" for stage, t in attested.stages.items() if (n := t.get(rare))]
        parts[0] += f" ({rare}: {', '.join(where)})"
    if attested.adds:
        unfused = len(attested.unfused_adds or ())
        parts.append(
            f"{unfused} of {attested.adds} adds not fused"
            if unfused
            else f"{attested.adds} adds fused"
        )
    for count, word in ((attested.requantizes, "requantize"), (attested.reformats, "reformat")):
        if count:
            parts.append(f"{plural(count, 'layer')} {word}")
    if attested.rounds:
        parts.append(f"{len(attested.rounds)} Q/DQ pairs only round")
    return ", ".join(parts)


def _dtype(dtype: str, plan: Plan) -> str:
    """Return the arithmetic of a kernel type; the builders' own records say Float for TF32 too."""
    if dtype == "unknown":
        return "are not attested"
    has_tf32 = any(target != "sm_75" for target in plan.targets)
    allowed = " (TF32 allowed)" if dtype == "Float" and plan.tf32 and has_tf32 else ""
    return f"take {dtype}{allowed}"
