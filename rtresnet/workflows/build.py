"""Compile an ONNX file into TensorRT plans.

The file determines the precision: `workflows.quantize` writes FP16 and INT8 files. TensorRT-RTX
builds without a GPU; TensorRT builds for the GPU that it runs on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rtresnet.core import artifacts, atomic_io, hardware, locks, reporter
from rtresnet.core.config import Config, option
from rtresnet.core.reporter import Reporter
from rtresnet.core.serialization import flattened, json_name
from rtresnet.core.sidecar import Plan
from rtresnet.workflows import embedded
from rtresnet.workflows.embedded import EmbedConfig


@dataclass(frozen=True, kw_only=True)
class BuildConfig(Config):
    """Options of `build`.

    Attributes:
        batch: Optimization profiles, each MIN:OPT:MAX or one number.
        targets: GPUs, as in "sm_89", "L4" or "RTX 4090"; or "current" or "all".
        builder: "rtx" is TensorRT-RTX, "tensorrt" is TensorRT.
        tf32: Whether FP32 layers may multiply in TF32, with a mantissa of 10 bits.
        timing_cache: For `tensorrt` only.
    """

    batch: tuple[str, ...] = option(
        (),
        "Smallest, best and largest batch; repeat it for more profiles.",
        metavar="MIN:OPT:MAX",
        default_text="1:8:32, or the file's fixed batch",
    )
    targets: tuple[str, ...] = option(
        (),
        "GPU to build for, as in sm_89, L4 or 'RTX 4090'; repeat it or separate with commas.",
        names=("--target",),
        metavar="sm_86|GPU|current|all",
        default_text="sm_80 and newer, for FP8 sm_89 and newer",
    )
    builder: Literal["auto", "rtx", "tensorrt"] = option(
        "auto", "Builder; auto chooses tensorrt if it and a GPU are present, else rtx."
    )
    tf32: bool = option(
        True,
        "Compute FP32 layers in full FP32 instead of TF32.",
        names=(" /--no-tf32",),
        default_text="TF32 from sm_80 on",
    )
    timing_cache: Path | None = option(
        None,
        "File that stores kernel measurements for the next build (tensorrt only).",
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A plan that was written.

    Attributes:
        path: The plan.
        bytes: Its size.
        plan: Builder, targets, profiles, and the attestation of the layers, as in the sidecar.
        built_from: The ONNX file.
    """

    path: Path = json_name("plan")
    bytes: int
    built_from: Path
    plan: Plan = flattened()


def build(
    source: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    embed: EmbedConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> BuildResult:
    """Compile an ONNX file into one plan.

    Args:
        source: FP32, FP16, INT8 or FP8 ONNX file.
        config: Profiles, targets and builder.
        out: Where the plan goes; next to the source by default, see `plan_name`.
        embed: Changed input or output; the changed ONNX file is written first.
        reporter: Receives progress and warnings.

    Returns:
        The plan, and the record in its sidecar.

    Raises:
        ArtifactError: The file does not parse, or does not build.
        InputError: A target, a profile or an option that the builder does not support.
        UnavailableError: The builder is not installed or does not start here.
        CheckFailedError: A convolution does not run in the file's precision.
        LockedError: Another process writes the same plan.
    """
    with _prepared(source, config, out, embed, reporter) as (path, place, config, stack):
        stack.enter_context(locks.hold_file(place, warn=reporter.note))
        return build_unlocked(path, config, out=place, reporter=reporter)


def build_per_target(
    source: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    embed: EmbedConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> tuple[BuildResult, ...]:
    """Compile an ONNX file into one plan for each target: OUT-sm_86.plan, ...

    Args:
        source: As for `build`.
        config: As for `build`.
        out: The name to which each target is appended.
        embed: As for `build`.
        reporter: As for `build`.

    Returns:
        A plan for each target.

    Raises:
        RtresnetError: As `build`. If one target is rejected, nothing is built.
    """
    from rtresnet.builder import engine, targets

    with _prepared(source, config, out, embed, reporter) as (path, place, config, stack):
        chosen = targets.parse(config.targets, config.builder)
        chosen = engine.check(path, target=chosen, builder=config.builder)
        plans = [place.with_stem(f"{place.stem}-{target}") for target in chosen]
        for plan in plans:
            stack.enter_context(locks.hold_file(plan, warn=reporter.note))
        return tuple(
            build_unlocked(
                path, dataclasses.replace(config, targets=(target,)), out=plan, reporter=reporter
            )
            for plan, target in zip(plans, chosen, strict=True)
        )


@contextlib.contextmanager
def _prepared(
    source: str | os.PathLike[str],
    config: BuildConfig | None,
    out: str | os.PathLike[str] | None,
    embed: EmbedConfig | None,
    reporter: Reporter,
) -> Iterator[tuple[Path, Path, BuildConfig, contextlib.ExitStack]]:
    """Yield the file to compile, the plan's place, the config, and the stack of locks."""
    from rtresnet.builder import engine, targets

    config, embed = config or BuildConfig(), embed or EmbedConfig()
    path = artifacts.require_onnx(source, "build")
    with contextlib.ExitStack() as stack:
        if embed.changes_anything:
            chosen = targets.parse(config.targets, config.builder)
            engine.check(path, target=chosen, builder=config.builder)
            changed = embedded.path_with(path, embed)
            stack.enter_context(locks.hold_file(changed, warn=reporter.note))
            path, _ = embedded.write(path, embed, reporter=reporter)
            reporter.note(f"{path}: written as the input of the build")
        yield path, Path(out) if out is not None else default_plan(path), config, stack


def build_unlocked(
    source: Path, config: BuildConfig, *, out: Path, reporter: Reporter
) -> BuildResult:
    """Compile a file while the caller holds the lock on `out`. See `build`."""
    from rtresnet.builder import engine, targets

    atomic_io.require_file(source, fix="create it with: rtresnet export")
    chosen = targets.parse(config.targets, config.builder)
    targets.builder(config.builder)  # before the first line of progress
    described = None
    if artifacts.read_sidecar(source) is None and hardware.installed("onnx"):
        from rtresnet.onnxlib import io, metadata

        described = metadata.described(source, io.load(source))
    with reporter.progress(f"building {out}") as update:
        written = engine.build(
            source,
            out,
            profiles=targets.parse_profiles(config.batch),
            target=chosen,
            builder=config.builder,
            tf32=config.tf32,
            timing_cache=config.timing_cache,
            progress=lambda phase: update(description=f"building {out}: {phase}"),
            described=described,
        )
    plan = written.plan
    assert plan is not None
    if not config.batch and plan.profiles[0] != targets.parse_profile(targets.DEFAULT_BATCH):
        reporter.note(f"{source}: its batch is fixed at {plan.profiles[0].max}; so is the plan's")
    if not written.input_known:
        reporter.warning(
            "an ONNX file without sidecar",
            f"The preprocessing and the classes of {source} are unknown. The plan can "
            f"be measured; to evaluate or predict, state it once with: rtresnet adopt {source}",
        )
    return BuildResult(path=out, bytes=written.bytes, built_from=source, plan=plan)


def default_plan(source: Path) -> Path:
    """Return where the plan of an ONNX file goes: next to it, named by `plan_name`."""
    sidecar = artifacts.read_sidecar(source)
    return source.parent / plan_name(source, sidecar.precision if sidecar else "unknown")


def plan_name(source: Path, precision: str) -> str:
    """Return a plan's name: resnet50.plan for resnet50-fp16.onnx, else with the precision."""
    stem = source.stem.removesuffix("-fp16")
    return f"{stem}-fp32.plan" if precision == "fp32" else f"{stem}.plan"
