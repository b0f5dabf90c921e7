"""`rtresnet quantize`: a folded FP32 ONNX file to FP16 or INT8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common
from rtresnet.errors import ArtifactError, InputError

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.artifacts import Calibration, Sidecar
    from rtresnet.preprocess import Preprocess

CALIB = Path("calib")
RANDOM_IMAGES = 32
DATA_OR_LIST = "any data, a folder of images, or a list in a .txt file"


def calibration_options(function: Any) -> Any:
    """`--calib`, `--calibrator`, `--calib-images`."""
    for option in (
        click.option(
            "--calib-images",
            type=click.IntRange(min=1),
            default=512,
            show_default=True,
            help="How many images to calibrate on.",
        ),
        click.option(
            "--calibrator",
            type=click.Choice(("max", "entropy")),
            default="entropy",
            show_default=True,
            help="How a range is chosen.",
        ),
        click.option(
            "--calib",
            metavar="SPEC",
            help=f"Images to calibrate on: {DATA_OR_LIST} [the images in calib/].",
        ),
    ):
        function = option(function)
    return function


@click.command("quantize")
@click.argument("source", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--int8", "precision", flag_value="int8", default="int8", help="The default.")
@click.option("--fp16", "precision", flag_value="fp16")
@calibration_options
@click.option("--out", type=click.Path(path_type=Path), help="[MODEL-int8.onnx beside the source].")
@common.json_option
def command(
    source: Path,
    precision: str,
    calib: str | None,
    calibrator: str,
    calib_images: int,
    out: Path | None,
    json_file: str | None,
) -> None:
    """Write an INT8 or FP16 version of an FP32 ONNX file."""
    written = quantize_file(
        source, precision, out, calib=calib, calibrator=calibrator, images=calib_images
    )
    path = (out or default_out(source, precision)).as_posix()
    line = f"{path}: {precision}, {written.bytes / 1e6:.1f} MB"
    if written.calibration:
        c = written.calibration
        line += f", scales by {c.method} from {c.n} images of {c.images} in {c.scales}"
    common.out_console().print(line, soft_wrap=True)
    common.write_json(json_file, "quantize", dataclasses.asdict(written))


def default_out(source: Path, precision: str) -> Path:
    """resnet50.onnx to resnet50-int8.onnx."""
    return source.with_name(f"{source.stem}-{precision}.onnx")


def quantize_file(
    source: Path,
    precision: str,
    out: Path | None,
    *,
    calib: str | None,
    calibrator: str,
    images: int,
) -> Sidecar:
    """Quantizes one file; returns the new file's sidecar."""
    from rtresnet import artifacts, machine
    from rtresnet.errors import missing_package

    sidecar = artifacts.verify(artifacts.require_file(source, fix="make one with: rtresnet export"))
    if not machine.installed("onnx"):
        raise missing_package("onnx", "quantizing")
    import onnx

    try:
        model = onnx.load(source)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's and the checker's errors share no base
        reason = str(error).strip().split("\n")[0][:120]
        raise ArtifactError(
            f"{source}: not an ONNX file, or truncated ({reason})", fix="rtresnet export"
        ) from error
    if sidecar is None:
        raise InputError(
            f"{source}: no sidecar, so its input size, mean and std are unknown",
            fix="export the net with rtresnet",
        )
    if sidecar.precision != "fp32":
        raise InputError(
            f"{source}: is {sidecar.precision} already", fix="start from the FP32 file"
        )
    out = out or default_out(source, precision)
    calibration = None
    if precision == "fp16":
        from rtresnet.quantize import half

        result = half.to_half(model)
    else:
        result, calibration = _int8(model, sidecar, out, calib, calibrator, images)
        _say_what_is_replaced(out, calibration)
    return artifacts.publish(
        out,
        lambda temporary: temporary.write_bytes(result.SerializeToString()),
        dataclasses.replace(
            sidecar,
            kind="onnx",
            precision=precision,
            parent=artifacts.link_to(source, out),
            calibration=calibration,
            measured={},
            made_by={},
        ),
    )


def _say_what_is_replaced(out: Path, calibration: Calibration) -> None:
    from rtresnet import artifacts

    try:
        old = artifacts.read_sidecar(out)
    except ArtifactError:  # what is replaced may be broken
        return
    if old and old.calibration and old.calibration.images_sha256 != calibration.images_sha256:
        common.note(
            f"replaces {out}, which was calibrated on {old.calibration.images}; a plan built from "
            "it no longer matches"
        )


def _int8(
    model: Any, sidecar: Sidecar, out: Path, calib: str | None, calibrator: str, images: int
) -> tuple[Any, Any]:
    from rtresnet import artifacts
    from rtresnet.quantize import calibrate, qdq

    batches, name, fingerprint, count = calibration_batches(calib, sidecar.input, images)
    tensors = list(qdq.placement(model))
    with common.progress(f"calibrating on {count} images of {name} ({calibrator})"):
        scales = calibrate.calibrate(model, tensors, batches, calibrator)
    path = calibrate.write_scales(
        CALIB / f"{out.stem}.json",
        scales,
        method=calibrator,
        images=name,
        images_sha256=fingerprint,
        n=count,
        onnx_sha256=sidecar.sha256,
    )
    calibration = artifacts.Calibration(
        method=calibrator,
        images=name,
        images_sha256=fingerprint,
        n=count,
        scales=path.as_posix(),
        scales_sha256=artifacts.sha256(path),
    )
    return qdq.insert(model, scales), calibration


def calibration_batches(
    spec: str | None, preprocess: Preprocess, images: int
) -> tuple[Callable[[], Iterator[np.ndarray]], str, str, int]:
    """The calibration images as repeatable batches, with their name, hash and number.

    Without a spec, the images in calib/; without those, noise and a warning.
    """
    from rtresnet.data import loader, sources

    found = CALIB.is_dir() and bool(sources.images_under(CALIB))
    lists = sorted(CALIB.glob("*.txt")) if CALIB.is_dir() else []
    if spec is None and not found and lists:
        spec = str(lists[0])
    if spec is None and not found:
        common.warn_loudly(
            "no calibration images",
            "calib/ holds none, so the INT8 scales come from random noise. "
            "Latency is meaningful, accuracy is not. Give real images: --calib SPEC",
        )
        spec, images = f"synthetic:{RANDOM_IMAGES}", RANDOM_IMAGES
        name = "noise"
    else:
        spec = spec or str(CALIB)
        name = spec
    source = sources.open_images(spec)
    chosen = loader.sample(source, images)
    tally = loader.Tally(len(chosen), common.note)
    size = loader.batch_size(preprocess)

    def batches() -> Iterator[np.ndarray]:
        for pixels, _ in loader.batches(source, preprocess, size, indices=chosen, tally=tally):
            yield pixels

    return batches, name, source.fingerprint(), len(chosen)
