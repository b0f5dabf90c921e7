"""`rtresnet build`: an ONNX file to a plan."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import click

from rtresnet.cli import common
from rtresnet.cli.ends import asked, ends_options, path_with, write_with


def plan_name(source: Path, precision: str) -> str:
    """resnet50-fp16.onnx to resnet50.plan (FP16 is the default), resnet50.onnx to -fp32.plan."""
    stem = source.stem.removesuffix("-fp16")
    return f"{stem}-fp32.plan" if precision == "fp32" else f"{stem}.plan"


def build_options(function: Any) -> Any:
    """`--batch`, `--target`, `--builder`, `--no-tf32`."""
    for option in (
        click.option(
            "--no-tf32",
            is_flag=True,
            help="Compute FP32 layers in full FP32 instead of TF32  [default: TF32 from sm_80 on]",
        ),
        click.option(
            "--builder",
            type=click.Choice(("auto", "rtx", "tensorrt")),
            default="auto",
            help="auto: tensorrt where it and a GPU are there, else rtx.",
        ),
        click.option(
            "--target",
            multiple=True,
            metavar="sm_86|GPU|current|all",
            help="What to build for, as in sm_89, L4 or 'RTX 4090'; repeat, or with commas [sm_80 "
            "up].",
        ),
        click.option(
            "--batch",
            multiple=True,
            metavar="MIN:OPT:MAX",
            help="Smallest, best and largest batch; repeat for more profiles [default: 1:8:32, or "
            "the file's fixed batch].",
        ),
    ):
        function = option(function)
    return function


@click.command("build")
@click.argument("source", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The plan [beside the ONNX file].")
@build_options
@ends_options
@click.option("--per-target", is_flag=True, help="One plan a target: MODEL-sm_86.plan, ...")
@click.option(
    "--timing-cache",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="For tensorrt: keep what it measured for the next build.",
)
@common.json_option
def command(
    source: Path,
    out: Path | None,
    batch: tuple[str, ...],
    target: tuple[str, ...],
    builder: str,
    no_tf32: bool,
    takes: str,
    topk: int | None,
    per_target: bool,
    timing_cache: Path | None,
    json_file: str | None,
) -> None:
    """Compile an ONNX file into a TensorRT plan. Needs no GPU with TensorRT-RTX.

    Precision is what the file says: FP16 and INT8 come from `export` or `quantize`. With --input
    or --topk, MODEL-u8-top5.onnx and the like is written first, and the plan built from that.
    """
    from rtresnet import artifacts, locks
    from rtresnet.build import targets

    artifacts.require_onnx(source, "build")
    with contextlib.ExitStack() as held:

        def hold(path: Path) -> Path:
            return held.enter_context(locks.hold_file(path, warn=common.note))

        if asked(takes, topk):
            check(source, target=targets.parse(target, builder), builder=builder)
            hold(path_with(source, takes, topk))
            source, _ = write_with(source, takes, topk)
            common.note(f"{source}: written, to build from")
        options: dict[str, Any] = {
            "batch": batch,
            "builder": builder,
            "tf32": not no_tf32,
            "timing_cache": timing_cache,
        }
        place = out or _beside(source)
        if per_target:
            chosen = targets.parse(target, builder) or targets.DEFAULT
            # What one of them refuses is refused before another is built.
            check(source, target=chosen, builder=builder)
            plans = [hold(place.with_stem(f"{place.stem}-{one}")) for one in chosen]
            results = [
                build_file(source, plan, target=(one,), **options)
                for plan, one in zip(plans, chosen, strict=True)
            ]
        else:
            results = [build_file(source, hold(place), target=target, **options)]
    for result in results:
        common.out_console().print(describe(result), soft_wrap=True)
    common.write_json(json_file, "build", {"plans": results} if per_target else results[0])


def check(source: Path, *, target: tuple[str, ...], builder: str) -> None:
    """Refuses what can be refused without a build."""
    from rtresnet.build import engine

    engine.check(source, target=target, builder=builder)


def build_file(
    source: Path,
    out: Path | None,
    *,
    batch: tuple[str, ...],
    target: tuple[str, ...],
    builder: str,
    tf32: bool = True,
    timing_cache: Path | None = None,
) -> dict[str, Any]:
    """Builds one file; returns what `--json` writes."""
    from rtresnet import storage
    from rtresnet.build import engine, profiles, targets

    storage.require_file(source, fix="make one with: rtresnet export")
    chosen = targets.parse(target, builder)
    out = out or _beside(source)
    with common.progress(f"building {out}") as update:
        written = engine.build(
            source,
            out,
            profiles=profiles.parse_all(batch),
            target=chosen,
            builder=builder,
            tf32=tf32,
            timing_cache=timing_cache,
            progress=lambda phase: update(description=f"building {out}: {phase}"),
        )
    if not batch and written.plan and written.plan.profiles[0] != profiles.parse(profiles.DEFAULT):
        common.note(f"{source}: takes batches of {written.plan.profiles[0].max}; so does the plan")
    if not written.input_known:
        common.warn_loudly(
            "an ONNX file without sidecar",
            f"Nothing says what {source} expects of an image or what its classes are. The plan can "
            f"be measured; to evaluate or predict, state it once with: rtresnet adopt {source}",
        )
    plan: dict[str, Any] = dataclasses.asdict(written)["plan"]
    return {"plan": str(out), "bytes": written.bytes} | plan


def _beside(source: Path) -> Path:
    from rtresnet import artifacts

    sidecar = artifacts.read_sidecar(source)
    return source.parent / plan_name(source, sidecar.precision if sidecar else "unknown")


def describe(result: dict[str, Any]) -> str:
    """A line on a plan: for what, how large, what was attested."""
    proof = (
        describe_attested(result) if result["attested"] else "not attested: no record of its layers"
    )
    targets = ", ".join(result["targets"]) or "the GPU it was built on"
    return (
        f"{result['plan']}: {result['bytes'] / 1e6:.1f} MB in {result['seconds']:.1f} s by "
        f"{result['builder']} {result['version']}, for {targets}; {proof}"
    )


def describe_attested(plan: dict[str, Any]) -> str:
    """What the record of the layers shows: types, and what did not fuse."""
    attested = plan["attested"]
    took = ", ".join(
        f"{count} {_dtype(dtype, plan)}" for dtype, count in attested["dtypes"].items()
    )
    parts = [f"of {attested['convolutions']} convolutions {took}"]
    if len(attested["dtypes"]) > 1 and attested["stages"]:
        rare = min(attested["dtypes"], key=attested["dtypes"].__getitem__)
        where = [f"{n} in {stage}" for stage, t in attested["stages"].items() if (n := t.get(rare))]
        parts[0] += f" ({rare}: {', '.join(where)})"
    if attested["adds"]:
        unfused = len(attested["unfused_adds"] or ())
        adds = attested["adds"]
        parts.append(f"{unfused} of {adds} adds not fused" if unfused else f"{adds} adds fused")
    for key, word in (("requantizes", "requantize"), ("reformats", "reformat")):
        if attested[key]:
            parts.append(f"{attested[key]} layers {word}")
    if attested["rounds"]:
        parts.append(f"{len(attested['rounds'])} Q/DQ pairs only round")
    return ", ".join(parts)


def _dtype(dtype: str, plan: dict[str, Any]) -> str:
    """What kernels of a type do; the builders' own records say Float for TF32 too."""
    if dtype == "unknown":
        return "are not attested"
    has_tf32 = any(target != "sm_75" for target in plan["targets"])
    allowed = " (TF32 allowed)" if dtype == "Float" and plan.get("tf32") and has_tf32 else ""
    return f"take {dtype}{allowed}"
