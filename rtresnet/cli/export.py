"""`rtresnet export`: a checkpoint to folded ONNX, to the asked precision, to a plan."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common
from rtresnet.cli.build import describe
from rtresnet.cli.options import config_options
from rtresnet.cli.quantize import calibration_options, quantize_file
from rtresnet.core.errors import ArtifactError
from rtresnet.workflows import embed_io
from rtresnet.workflows.build import BuildConfig, build_unlocked, plan_name
from rtresnet.workflows.embed_io import EmbedConfig

if TYPE_CHECKING:
    from rtresnet.models.checkpoint import Checkpoint

RUNS = Path("runs")


@click.command("export", short_help="Turn a checkpoint into ONNX files and plans.")
@click.option("--model", help="See `rtresnet models` [the weights' own].")
@click.option(
    "--weights",
    metavar="FILE|imagenet|untrained",
    help="A checkpoint, torchvision's published weights, or none [the best under runs/].",
)
@click.option("--fp32", is_flag=True, help="A plan in FP32.")
@click.option("--fp16", is_flag=True, help="A plan in FP16: the default.")
@click.option("--int8", is_flag=True, help="A plan in INT8.")
@calibration_options
@config_options(BuildConfig, argument="build", leave_out=("timing_cache",))
@config_options(EmbedConfig, argument="embed")
@common.input_options
@click.option("--out", type=click.Path(path_type=Path), default="engines", show_default=True)
@click.option("--no-plan", is_flag=True, help="Stop at the ONNX file.")
@common.json_option
def command(json_file: str | None, **options: Any) -> None:
    """Turn a checkpoint into ONNX files and plans, each with a sidecar.

    Writes MODEL.onnx (FP32, batch norm folded), MODEL-fp16.onnx or MODEL-int8.onnx, and the
    plans MODEL-fp32.plan, MODEL.plan (FP16), MODEL-int8.plan. With --input or --topk also
    MODEL-int8-u8-top5.onnx and the like, and the plans from those.
    """
    result = run(**options)
    console = common.out_console()
    for entry in result["onnx"]:
        console.print(
            f"{entry['file']}: {entry['precision']}, {entry['bytes'] / 1e6:.1f} MB"
            + _parity_note(entry),
            soft_wrap=True,
        )
    for plan in result["plans"]:
        console.print(describe(plan), soft_wrap=True)
    common.footer(f"Assumed: {line}." for line in result["assumed"])
    common.write_json(json_file, "export", result)


def _parity_note(entry: dict[str, Any]) -> str:
    parity = entry["measured"].get("parity")
    if not parity:
        return ""
    return f", parity with torch {parity['relative']:.1e} relative on {parity['n']} images"


def run(*, out: Path, **options: Any) -> dict[str, Any]:
    """Exports while no other process can write into `out`; returns what `--json` writes.

    Raises:
        LockedError: Another process writes there.
    """
    from rtresnet.core import locks

    with locks.hold_folder(out, warn=common.note):
        return _write_all(out=out, **options)


def _write_all(
    *,
    model: str | None,
    weights: str | None,
    fp32: bool,
    fp16: bool,
    int8: bool,
    calib: str | None,
    calibrator: str,
    calib_images: int,
    rest: str,
    build: BuildConfig,
    embed: EmbedConfig,
    size: int | None,
    mean: str | None,
    std: str | None,
    out: Path,
    no_plan: bool,
) -> dict[str, Any]:
    common.require_torch("export")
    from rtresnet.builder import profiles, targets
    from rtresnet.cli.console import REPORTER
    from rtresnet.core.sidecar import restated
    from rtresnet.onnxlib import learned

    # What can be refused is refused before anything is computed.
    profiles.parse_all(build.batch)
    targets.parse(build.targets, build.builder)
    if int8 and calib not in (None, "none"):
        from rtresnet.data.sources import open_images

        open_images(calib)
    checkpoint, origin = resolve(model, weights, size)
    if int8:
        learned.refuse_calibration(origin, checkpoint.learned, calib, calibrator)
    stated = common.preprocess_from(checkpoint.input, size, mean, std)
    assumed = restated(checkpoint.assumed, checkpoint.input, stated)
    checkpoint = dataclasses.replace(checkpoint, input=stated, assumed=assumed)
    embed_io.require_classes(
        embed.topk, len(checkpoint.model.classes), checkpoint.model.architecture
    )
    precisions = [p for p, wanted in (("fp32", fp32), ("fp16", fp16), ("int8", int8)) if wanted]
    base = out / f"{checkpoint.model.architecture}.onnx"
    written = [_write_fp32(checkpoint, origin, base)]
    sources = []
    for precision in precisions or ["fp16"]:
        source = base if precision == "fp32" else base.with_name(f"{base.stem}-{precision}.onnx")
        if precision != "fp32":
            written.append(
                quantize_file(
                    base,
                    precision,
                    source,
                    calib=calib,
                    calibrator=calibrator,
                    images=calib_images,
                    rest=rest,
                )
            )
        if embed.changes_anything:
            source, changed = embed_io.write(source, embed, reporter=REPORTER)
            written.append(changed)
        sources.append((source, precision))
    plans = []
    if not no_plan and _builder_there(build.builder):
        plans = [
            build_unlocked(source, build, out=out / plan_name(source, precision), reporter=REPORTER)
            for source, precision in sources
        ]
    files = [
        {
            "file": str(out / sidecar.file),
            "precision": sidecar.precision,
            "bytes": sidecar.bytes,
            "sha256": sidecar.sha256,
            "measured": sidecar.measured,
        }
        for sidecar in written
    ]
    return {
        "model": checkpoint.model.architecture,
        "weights": checkpoint.weights.origin,
        "assumed": list(checkpoint.assumed),
        "onnx": files,
        "plans": plans,
    }


def resolve(
    model: str | None, weights: str | None, size: int | None
) -> tuple[Checkpoint, Path | None]:
    """The checkpoint to export, and its file where it has one."""
    from rtresnet.core.errors import InputError
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.models import checkpoint, download, zoo

    if weights is None and model is None:
        raise InputError("nothing to export", fix="give --model NAME or --weights FILE")
    spec = zoo.spec(model) if model else None
    if weights is None and spec is not None:
        best = best_run(spec.name)
        if best is not None:
            common.note(f"weights: {best}")
            return checkpoint.load(best, model=spec.name), best
    if weights in (None, "untrained"):
        if spec is None:
            raise InputError("--weights untrained", fix="say of which net: --model NAME")
        common.warn_loudly(
            "untrained weights",
            f"No checkpoint of {spec.name} was given or found under runs/, so these are "
            "random weights. Latency is meaningful, accuracy is not.",
        )
        return checkpoint.untrained(spec, Preprocess.for_size(size or spec.size)), None
    if weights == "imagenet":
        if spec is None:
            raise InputError("--weights imagenet", fix="say of which net: --model NAME")
        return download.imagenet(spec.name), None
    assert weights is not None
    return checkpoint.load(weights, model=model), Path(weights)


def best_run(architecture: str) -> Path | None:
    """The checkpoint under runs/ of this net with the highest held-out accuracy, by sidecar."""
    from rtresnet.core import artifacts

    found = []
    for path in sorted(RUNS.glob("**/best.pt")):
        try:
            sidecar = artifacts.read_sidecar(path)
        except ArtifactError as error:
            common.note(f"passed over: {error}")
            continue
        if sidecar is not None and sidecar.model.architecture == architecture:
            found.append((sidecar.measured.get("val_top1") or 0.0, path))
    return max(found)[1] if found else None


def _write_fp32(checkpoint: Checkpoint, origin: Path | None, path: Path) -> Any:
    from rtresnet.core import artifacts, hardware
    from rtresnet.core.errors import missing_package

    if not hardware.installed("onnx"):
        raise missing_package("onnx", "export")
    from rtresnet.core.sidecar import Sidecar
    from rtresnet.exporter import fold, verify
    from rtresnet.exporter.writer import to_onnx

    net = checkpoint.net()
    with common.progress(f"exporting {path}"):
        model = to_onnx(
            fold.fold(checkpoint.net()),
            size=checkpoint.input.size,
            name=checkpoint.model.architecture,
            scales=checkpoint.learned,
        )
        verify.check_folded(model)
        data = model.SerializeToString()
        measured: dict[str, Any] = {}
        if hardware.installed("onnxruntime"):
            from rtresnet.runtime.backend import logits
            from rtresnet.runtime.ort import OrtBackend

            with tempfile.TemporaryDirectory() as folder:
                trial = Path(folder) / path.name
                trial.write_bytes(data)
                backend = OrtBackend(trial, provider="cpu")
                measured["parity"] = verify.check_parity(
                    net, lambda images: logits(backend.infer(images), path),
                    size=checkpoint.input.size,
                ) | {"with": backend.provider}  # fmt: skip
        else:
            common.note("parity not checked: pip install onnxruntime")
    weights = checkpoint.weights
    return artifacts.publish(
        path,
        lambda temporary: temporary.write_bytes(data),
        Sidecar(
            kind="onnx",
            file=path.name,
            model=checkpoint.model,
            input=checkpoint.input,
            weights=weights,
            precision="fp32",
            assumed=checkpoint.assumed,
            parent=artifacts.link_to(origin, path) if origin else None,
            measured=measured,
        ),
    )


def _builder_there(builder: str) -> bool:
    from rtresnet.builder import targets

    if builder != "auto" or targets.available():
        return True
    common.note(
        "no plan was built: no TensorRT builder is installed; pip install tensorrt-rtx-cu13 "
        "(builds without a GPU)"
    )
    return False
