"""`rtresnet quantize`: a folded FP32 ONNX file to FP16 or INT8."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common
from rtresnet.core.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from rtresnet.cli.quantize_gate import Gate
    from rtresnet.core.sidecar import Calibration, Sidecar

Contract = tuple["int | None", "str | None", "str | None"]
"""What the options say of size, mean and std."""
DATA_OR_LIST = "any data, a folder of images, or a list in a .txt file"


def calibration_options(function: Any) -> Any:
    """`--calib`, `--calibrator`, `--calib-images`, `--rest`."""
    for option in (
        click.option(
            "--rest",
            type=click.Choice(("fp32", "fp16")),
            default="fp32",
            show_default=True,
            help="What INT8 kernels hand one another: fp16 for TensorRT, fp32 for CPUs too.",
        ),
        click.option(
            "--calib-images",
            type=click.IntRange(min=1),
            default=512,
            show_default=True,
            help="How many images to calibrate on.",
        ),
        click.option(
            "--calibrator",
            type=click.Choice(("auto", "max", "percentile", "entropy", "mse")),
            default="auto",
            show_default=True,
            help="How a range is chosen; auto: by the noise each causes at the output.",
        ),
        click.option(
            "--calib",
            metavar="SPEC",
            help=f"Images to calibrate on: {DATA_OR_LIST}; or none, for ranges from what batch "
            "norm knew [the images in calib/].",
        ),
    ):
        function = option(function)
    return function


@click.command("quantize")
@click.argument("source", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--int8", is_flag=True, help="Write INT8 [the default].")
@click.option("--fp16", is_flag=True, help="Write FP16.")
@calibration_options
@click.option("--out", type=click.Path(path_type=Path), help="[MODEL-int8.onnx beside the source].")
@click.option(
    "--eval",
    "data",
    metavar="SPEC",
    help="Compare the accuracy of INT8 and FP32 on these labelled images [not compared].",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Points of top-1 that INT8 may lose against FP32, with --eval.",
)
@click.option(
    "--gate",
    "rule",
    type=click.Choice(("point", "upper")),
    default="point",
    show_default=True,
    help="What must be within --max-drop: the measured loss (point), or the upper limit of its "
    "95 % interval (upper).",
)
@common.classes_option
@common.input_options
@common.json_option
def command(
    source: Path,
    int8: bool,
    fp16: bool,
    calib: str | None,
    calibrator: str,
    calib_images: int,
    out: Path | None,
    data: str | None,
    max_drop: float,
    rule: str,
    rest: str,
    classes: tuple[str, ...] | None,
    size: int | None,
    mean: str | None,
    std: str | None,
    json_file: str | None,
) -> None:
    """Write an INT8 or FP16 version of an FP32 ONNX file.

    With --eval, the accuracy of INT8 is compared with that of FP32 on the same images. Where the
    loss is not within --max-drop, the most harmful blocks stay in float; exit code 1 where that
    does not help. The verdict says whether the images are enough to show that the bound holds.
    """
    from rtresnet.cli.quantize_gate import AccuracyCheckFailedError, Gate
    from rtresnet.core import locks

    if int8 and fp16:
        raise InputError("--int8 and --fp16 are two files", fix="run it once for each")
    precision = "fp16" if fp16 else "int8"
    gate = Gate(data=data, max_drop=max_drop, rule=rule, classes=classes) if data else None
    if gate and precision == "fp16":
        raise InputError("--eval is for INT8", fix="see: rtresnet eval, rtresnet compare")
    if not max_drop >= 0:
        raise InputError(f"--max-drop {max_drop}: must be at least 0")
    given = common.given()
    for name in ("max_drop", "rule", "classes"):
        if name in given and not data:
            option = {"rule": "--gate"}.get(name, f"--{name.replace('_', '-')}")
            raise InputError(f"{option} needs labelled images", fix="add --eval SPEC")
    for name in ("calib", "calibrator", "calib_images", "rest"):
        if precision == "fp16" and name in given:
            raise InputError(f"--{name.replace('_', '-')} is for INT8", fix="leave --fp16 out")
    path = out or default_out(source, precision)
    try:
        with locks.hold_file(path, warn=common.note):
            written = quantize_file(
                source, precision, path, calib=calib, calibrator=calibrator, images=calib_images,
                gate=gate, rest=rest, contract=(size, mean, std),
            )  # fmt: skip
    except AccuracyCheckFailedError as missed:
        common.write_json(json_file, "quantize", {"file": None, "measured": missed.measured})
        raise
    line = f"{path.as_posix()}: {precision}, {written.bytes / 1e6:.1f} MB"
    if written.calibration:
        c = written.calibration
        images = f"{c.n} images of {c.images}" if c.n else "what batch norm knew, no images"
        line += f", scales by {c.method} from {images} in {c.scales}"
    common.out_console().print(line, soft_wrap=True)
    common.footer(f"Assumed: {entry}." for entry in written.assumed)
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
    gate: Gate | None = None,
    rest: str = "fp32",
    contract: Contract = (None, None, None),
) -> Sidecar:
    """Quantizes one file; returns the new file's sidecar."""
    from rtresnet.cli.quantize_int8 import int8, scales_path
    from rtresnet.core import artifacts, atomic_io, hardware
    from rtresnet.core.errors import missing_package
    from rtresnet.onnxlib import io
    from rtresnet.onnxlib.interface import precision_of

    out = out or default_out(source, precision)
    artifacts.require_name(out, "onnx")
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"{out}: would replace its own source", fix="choose another --out")
    for place in (out, artifacts.sidecar_path(out)):
        atomic_io.require_place(place)
    scales = scales_path(out) if precision == "int8" else None
    sidecar = artifacts.verify(artifacts.require_onnx(source, "quantize"))
    if not hardware.installed("onnx"):
        raise missing_package("onnx", "quantizing")
    model = io.load(source, checked=True)
    _require_plain(source, model, sidecar)
    _settle_shape(source, model, contract[0] or (sidecar.input.size if sidecar else None))
    if sidecar is None:
        if (found := precision_of(model)) in ("fp16", "int8"):
            raise InputError(f"{source}: is {found} already", fix="start from the FP32 file")
        sidecar = _foreign(source, model, contract)
    elif common.preprocess_from(sidecar.input, *contract) != sidecar.input:
        raise InputError(
            f"{source}: its sidecar says what it takes, and --size, --mean or --std say something "
            "else",
            fix=f"leave them out; see: rtresnet inspect {source}",
        )
    if sidecar.precision != "fp32":
        raise InputError(
            f"{source}: is {sidecar.precision} already", fix="start from the FP32 file"
        )
    calibration, measured = None, dict[str, Any]()
    if scales is None:
        from rtresnet.quantization import fp16 as half

        result = half.to_half(model)
    else:
        result, calibration, measured = int8(
            source, model, sidecar, out, scales, calib, calibrator, images, gate, rest
        )
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
            measured=measured,
            made_by={},
        ),
    )


def _settle_shape(source: Path, model: Any, size: int | None) -> None:
    """Gives an input whose side is open the side that was said; refuses another side.

    Args:
        source: The file, for the message.
        model: Changed.
        size: Side in pixels, where it was said.
    """
    dims = images_of(model).type.tensor_type.shape.dim
    if len(dims) != 4:
        return
    for dim in dims[2:]:
        if size is not None and not dim.dim_value:
            dim.dim_value = size
        if size is not None and dim.dim_value != size:
            raise InputError(
                f"{source}: takes {dims[2].dim_value}x{dims[3].dim_value} pixels, not {size}",
                fix=f"--size {dims[2].dim_value}",
            )


def images_of(model: Any) -> Any:
    """The input of an onnx.ModelProto that takes the images."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return next((e for e in model.graph.input if e.name not in constants), model.graph.input[0])


def _require_plain(source: Path, model: Any, sidecar: Sidecar | None) -> None:
    """Raises InputError where the ends were changed before the precision."""
    import onnx

    from rtresnet.core import artifacts

    ends = [entry.type.tensor_type.elem_type for entry in (*model.graph.input, *model.graph.output)]
    if {onnx.TensorProto.UINT8, onnx.TensorProto.INT64} & set(ends):
        parent = artifacts.parent_path(source, sidecar) if sidecar else None
        raise InputError(
            f"{source}: takes pixels or gives the most probable classes; that comes last",
            fix=f"rtresnet quantize {parent}, then rtresnet build with --input and --topk"
            if parent
            else "quantize the file it was made from",
        )


def _foreign(source: Path, model: Any, contract: Contract) -> Sidecar:
    """The record of an ONNX file that somebody else made."""
    from rtresnet.workflows import adopt

    side = images_of(model).type.tensor_type.shape.dim[-1].dim_value
    preprocess = common.stated_input(source, *contract, fixed=side or None)
    shape = model.graph.output[0].type.tensor_type.shape.dim
    if not shape or not shape[-1].dim_value:
        raise ArtifactError(f"{source}: its output has no fixed number of classes")
    return adopt.describe(
        source,
        classes=tuple(str(index) for index in range(shape[-1].dim_value)),
        preprocess=preprocess,
        precision="fp32",
        assumed=preprocess.assumptions(),
    )


def _say_what_is_replaced(out: Path, calibration: Calibration) -> None:
    from rtresnet.core import artifacts

    try:
        old = artifacts.read_sidecar(out)
    except ArtifactError:  # what is replaced may be broken
        return
    if old and old.calibration and old.calibration.images_sha256 != calibration.images_sha256:
        common.note(
            f"replaces {out}, which was calibrated on {old.calibration.images}; a plan built from "
            "it no longer matches"
        )
