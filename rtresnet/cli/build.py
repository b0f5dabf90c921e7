"""`rtresnet build`: an ONNX file to a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from rtresnet.cli import common


def plan_name(source: Path, precision: str) -> str:
    """resnet50-fp16.onnx to resnet50.plan (FP16 is the default), resnet50.onnx to -fp32.plan."""
    stem = source.stem.removesuffix("-fp16")
    return f"{stem}-fp32.plan" if precision == "fp32" else f"{stem}.plan"


def build_options(function: Any) -> Any:
    """`--batch`, `--target`, `--builder`."""
    for option in (
        click.option(
            "--builder",
            type=click.Choice(("auto", "rtx", "tensorrt")),
            default="auto",
            help="auto: tensorrt where it and a GPU are there, else rtx.",
        ),
        click.option("--target", metavar="sm_86,sm_89,...", help="GPUs to build for [sm_80 up]."),
        click.option(
            "--batch",
            default="1:8:32",
            show_default=True,
            metavar="MIN:OPT:MAX",
            help="Smallest, best and largest batch.",
        ),
    ):
        function = option(function)
    return function


@click.command("build")
@click.argument("source", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The plan [beside the ONNX file].")
@build_options
@common.json_option
def command(
    source: Path,
    out: Path | None,
    batch: str,
    target: str | None,
    builder: str,
    json_file: str | None,
) -> None:
    """Compile an ONNX file into a TensorRT plan. Needs no GPU with TensorRT-RTX.

    Precision is what the file says: FP16 and INT8 come from `export` or `quantize`.
    """
    result = build_file(source, out, batch=batch, target=target, builder=builder)
    common.out_console().print(describe(result), soft_wrap=True)
    common.write_json(json_file, "build", result)


def build_file(
    source: Path, out: Path | None, *, batch: str, target: str | None, builder: str
) -> dict[str, Any]:
    """Builds one file; returns what `--json` writes."""
    from rtresnet import artifacts
    from rtresnet.build import engine, profiles, targets

    artifacts.require_file(source, fix="make one with: rtresnet export")
    profile, chosen = profiles.parse(batch), targets.parse(target)
    if out is None:
        sidecar = artifacts.read_sidecar(source)
        out = source.parent / plan_name(source, sidecar.precision if sidecar else "unknown")
    with common.progress(f"building {out}"):
        written = engine.build(source, out, profiles=[profile], target=chosen, builder=builder)
    if written.assumed:
        common.warn_loudly(
            "an ONNX file without sidecar",
            f"Nothing says what {source} expects of an image or what its classes are. The plan can "
            "be measured; to evaluate or predict, export the net with rtresnet.",
        )
    plan: dict[str, Any] = dataclasses.asdict(written)["plan"]
    return {"plan": str(out), "bytes": written.bytes} | plan


def describe(result: dict[str, Any]) -> str:
    """A line on a plan: for what, how large, what was attested."""
    attested = result["attested"]
    proof = "not attested: no layer dump"
    if attested:
        took = ", ".join(f"{count} take {dtype}" for dtype, count in attested["dtypes"].items())
        proof = f"of {attested['convolutions']} convolutions {took}"
    targets = ", ".join(result["targets"]) or "the GPU it was built on"
    return (
        f"{result['plan']}: {result['bytes'] / 1e6:.1f} MB in {result['seconds']:.1f} s by "
        f"{result['builder']} {result['version']}, for {targets}; {proof}"
    )
