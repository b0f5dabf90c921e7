"""Write an FP16, BF16, INT8 or FP8 version of an FP32 ONNX file.

INT8 and FP8 are calibrated on images, on the statistics of batch norm, or use the scales that
quantization-aware training stored in the file. `accuracy_gate.py` bounds the loss of accuracy.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from rtresnet.core import artifacts, atomic_io, hardware, locks, reporter
from rtresnet.core.config import Config, option, parse_percentage
from rtresnet.core.errors import ArtifactError, InputError, missing_package
from rtresnet.core.labels import read_classes
from rtresnet.core.precisions import CALIBRATED, HalfName, QuantizedName
from rtresnet.core.reporter import Reporter
from rtresnet.core.serialization import flattened
from rtresnet.core.sidecar import Calibration, Measurements, Sidecar
from rtresnet.workflows import adopt
from rtresnet.workflows.accuracy_gate import Gate, GateResult
from rtresnet.workflows.evaluate import MAX_BROKEN
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.quantizer import Quantizer, scales_path

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(Config):
    """Options of a quantization.

    Attributes:
        precision: "int8", "fp8", "fp16" or "bf16".
        calib: Images to calibrate on: any data, a folder of images, a list in a .txt file, or
            "none" for ranges from the statistics of batch norm. None: the images in calib/.
        calibrator: Method that chooses the range of a tensor.
        calib_images: Number of images to calibrate on.
        float_dtype: Data type of tensors between INT8 or FP8 kernels, and of nodes left in float.
        fp8_stem: Whether FP8 includes the first convolution.
        fp8_min_channels: Smallest number of input channels of any other convolution in FP8.
        eval_data: Labelled images on which INT8 or FP8 is compared with FP32.
        max_drop: Points of top-1 that may be lost on them.
        gate: Figure that must be within `max_drop`: the measured loss ("point") or the upper limit
            of its 95 % interval ("upper").
        classes: Class names of the net or the images, if these have none.
        max_broken: Allowed share of broken images in [0, 1], which are ignored.
    """

    precision: QuantizedName = option("int8", "Precision of the new file.")
    calib: str | None = option(
        None,
        "Images to calibrate on: any data, a folder of images, a list in a .txt file, or none for "
        "ranges from the statistics of batch norm.",
        metavar="SPEC",
        default_text="the images in calib/",
    )
    calibrator: Literal["auto", "max", "percentile", "entropy", "mse"] = option(
        "auto",
        "Method that chooses the range of a tensor; auto chooses the one with the least noise at "
        "the logits. entropy is for INT8 only.",
    )
    calib_images: int = option(512, "Number of images to calibrate on.", minimum=1)
    float_dtype: Literal["fp32", "fp16"] | None = option(
        None,
        "Data type of tensors between INT8 or FP8 kernels: fp16 for TensorRT, fp32 for CPUs too.",
        hidden_names=("--rest",),
        default_text="fp32, for FP8 fp16",
    )
    fp8_stem: bool = option(
        False,
        "Also quantize the first convolution to FP8, for which TensorRT has no kernel.",
        names=("--fp8-stem",),
        default_text="it stays in float",
    )
    fp8_min_channels: int = option(
        1,
        "Leave other convolutions with fewer input channels than N in float in FP8.",
        metavar="N",
        minimum=1,
        default_text="1, all are quantized",
    )
    eval_data: str | None = option(
        None,
        "Compare the accuracy of INT8 or FP8 with FP32 on these labelled images.",
        names=("--eval",),
        metavar="SPEC",
        default_text="not compared",
    )
    max_drop: float = option(
        0.5, "Largest loss of top-1 against FP32 in percentage points, with --eval.", minimum=0
    )
    gate: Literal["point", "upper"] = option(
        "point",
        "Figure that must be within --max-drop: the measured loss (point), or the upper limit of "
        "its 95 % interval (upper).",
    )
    classes: tuple[str, ...] | None = option(
        None,
        "Class names, one per line or a JSON list, of the model or the --eval data if it has none.",
        metavar="FILE",
        parse=read_classes,
        default_text="from the model and the data",
    )
    max_broken: float = option(
        MAX_BROKEN,
        "Allowed share of broken images, which are ignored; with more, the command fails.",
        metavar="N%",
        parse=parse_percentage,
        default_text="1%",
        minimum=0,
        maximum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = {
            field.name
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        if not self.calibrated:
            if self.eval_data is not None:
                raise InputError(
                    "--eval applies to INT8 and FP8 only",
                    fix="see: rtresnet eval, rtresnet compare",
                )
            for name in ("calib", "calibrator", "calib_images", "float_dtype", "max_broken"):
                if name in changed:
                    raise InputError(
                        f"--{name.replace('_', '-')} applies to INT8 and FP8 only",
                        fix=f"leave --{self.precision} out",
                    )
        if self.precision == "fp8" and self.calibrator == "entropy":
            raise InputError(
                "--calibrator entropy applies to INT8 only", fix="use auto, max, percentile or mse"
            )
        if self.eval_data is None:
            for name in ("max_drop", "gate", "classes"):
                if name in changed:
                    raise InputError(
                        f"--{name.replace('_', '-')} needs labelled images", fix="add --eval SPEC"
                    )

    @property
    def calibrated(self) -> bool:
        """Whether the precision needs scales."""
        return self.precision in CALIBRATED

    @property
    def fp8_options(self) -> list[str]:
        """The options for FP8 only that were used."""
        used = {"--fp8-stem": self.fp8_stem, "--fp8-min-channels": self.fp8_min_channels > 1}
        return [name for name, is_used in used.items() if is_used]

    def require_fp8_options_used(self, precisions: Collection[str]) -> None:
        """Raise InputError if there are options for FP8 only, which is not among `precisions`."""
        if self.fp8_options and "fp8" not in precisions:
            raise InputError(
                f"{' and '.join(self.fp8_options)}: for FP8 only", fix="add --fp8, or leave it out"
            )

    def without_fp8_options(self, precision: QuantizedName) -> QuantizeConfig:
        """Return the config for another precision than FP8."""
        return dataclasses.replace(self, precision=precision, fp8_stem=False, fp8_min_channels=1)

    @property
    def number_format(self) -> str:
        """The number format in a file of scales (`ScalesOrigin.format`)."""
        channels = f"-{self.fp8_min_channels}" if self.fp8_min_channels > 1 else ""
        return self.precision + ("-stem" if self.fp8_stem else "") + channels

    @property
    def wide_dtype(self) -> Literal["fp32", "fp16"]:
        """The data type of tensors that are neither INT8 nor FP8."""
        return self.float_dtype or ("fp16" if self.precision == "fp8" else "fp32")

    @property
    def accuracy_gate(self) -> Gate | None:
        """The bound on the loss of accuracy; None if nothing is compared."""
        if self.eval_data is None:
            return None
        return Gate(
            data=self.eval_data, max_drop=self.max_drop, rule=self.gate, classes=self.classes,
            max_broken=self.max_broken,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """A quantized file that was written.

    Attributes:
        path: The file.
        sidecar: Its record.
        gate: Measurements of the accuracy gate; None if nothing was compared. Its parts are also
            in the sidecar's `measured`.
    """

    path: Path
    sidecar: Sidecar = flattened()
    gate: GateResult | None = dataclasses.field(default=None, metadata={"hidden": True})


def quantize(
    source: str | os.PathLike[str],
    config: QuantizeConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> QuantizeResult:
    """Quantize an FP32 ONNX file of a residual net.

    Args:
        source: The file, from rtresnet or another tool.
        config: Precision, calibration and accuracy gate.
        out: The new file; MODEL-int8.onnx or similar next to the source by default.
        stated: Preprocessing of a file without a sidecar.
        reporter: Receives progress and notes.

    Returns:
        The file that was written, with its calibration and the accuracy gate's result.

    Raises:
        InputError: The file is quantized already, an option contradicts it, or an output place
            cannot be written.
        ArtifactError: Not a net that can be quantized.
        DataError: The images cannot be used.
        AccuracyCheckFailedError: More accuracy is lost than `config` allows; nothing is written.
        LockedError: Another process writes the same file.
    """
    config = config or QuantizeConfig()
    config.require_fp8_options_used((config.precision,))
    source = Path(source)
    place = Path(out) if out is not None else default_out(source, config.precision)
    with locks.hold_file(place, warn=reporter.note):
        return quantize_unlocked(source, config, out=place, stated=stated, reporter=reporter)


def default_out(source: Path, precision: str) -> Path:
    """Return the default output: resnet50-int8.onnx for resnet50.onnx."""
    return source.with_name(f"{source.stem}-{precision}.onnx")


def quantize_unlocked(
    source: Path,
    config: QuantizeConfig,
    *,
    out: Path,
    stated: InputConfig | None = None,
    reporter: Reporter,
    sidecar: Sidecar | None = None,
    model: onnx.ModelProto | None = None,
) -> QuantizeResult:
    """Quantize while the caller holds the lock on `out`.

    `sidecar` and `model`, which is not changed, are those of `source` if they were just read.
    """
    from rtresnet.onnxlib import metadata

    stated = stated or InputConfig()
    _require_outputs(source, out)
    scales = scales_path(out, reporter) if config.calibrated else None
    model, sidecar = _read(source, model, sidecar)
    if sidecar is not None and sidecar.detection is not None:
        from rtresnet.workflows.detect_quantize import quantize_detector

        if stated != InputConfig():
            raise InputError(
                f"{source}: a detector's preprocessing is that of its training",
                fix="leave --mean, --std and the like out",
            )
        record = quantize_detector(
            source, model, sidecar, config, out=out, scales_path=scales, reporter=reporter
        )
        return QuantizeResult(path=out, sidecar=record)
    sidecar = _require_fp32(source, model, sidecar, stated)
    if scales is None:
        from rtresnet.quantization import half

        result = half.to_half(model, cast("HalfName", config.precision))
        calibration, gate, measured = None, None, Measurements()
    else:
        job = Quantizer(source=source, sidecar=sidecar, out=out, scales=scales, config=config,
                        reporter=reporter)  # fmt: skip
        quantized = job.quantize(model)
        result, calibration, gate = quantized.model, quantized.calibration, quantized.gate
        measured = gate.measured() if gate else Measurements()
        if quantized.outliers:
            measured["outliers"] = quantized.outliers
        _note_replaced(out, calibration, reporter)
    record = dataclasses.replace(
        sidecar,
        kind="onnx",
        file=out.name,
        precision=config.precision,
        parent=artifacts.link_to(source, out, sidecar.sha256 or None),
        calibration=calibration,
        measured=measured,
        made_by={},
    )
    metadata.DESCRIPTION.set(result, record)
    written = artifacts.publish(
        out, lambda temporary: temporary.write_bytes(result.SerializeToString()), record
    )
    return QuantizeResult(path=out, sidecar=written, gate=gate)


def _require_outputs(source: Path, out: Path) -> None:
    """Raise InputError if `out` is no place for a quantized version of `source`."""
    artifacts.require_name(out, "onnx")
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"{out}: would overwrite its source", fix="choose another --out")
    for place in (out, artifacts.sidecar_path(out)):
        atomic_io.require_place(place)


def _read(
    source: Path, model: onnx.ModelProto | None, sidecar: Sidecar | None
) -> tuple[onnx.ModelProto, Sidecar | None]:
    """Return the model, which may be changed, and its record; None for another tool's file."""
    from rtresnet.onnxlib import io, metadata

    artifacts.require_onnx(source, "quantize")
    sidecar = sidecar or artifacts.verify(source)
    if not hardware.installed("onnx"):
        raise missing_package("onnx", "quantizing")
    model = io.load(source, checked=True) if model is None else copy.deepcopy(model)
    return model, sidecar or metadata.described(source, model)


def _require_fp32(
    source: Path, model: onnx.ModelProto, sidecar: Sidecar | None, stated: InputConfig
) -> Sidecar:
    """Set an open input size; return the record of the model, which is made for another tool's.

    Raises:
        InputError: The model is not in FP32, or something stated contradicts it.
    """
    from rtresnet.onnxlib.interface import precision_of

    _require_plain(source, model, sidecar)
    _settle_size(source, model, stated.size or (sidecar.input.size if sidecar else None))
    precision = sidecar.precision if sidecar else precision_of(model)
    if precision != "fp32" and (sidecar is not None or precision != "unknown"):
        raise InputError(f"{source}: is {precision} already", fix="start from the FP32 file")
    if sidecar is None:
        return _describe(source, model, stated)
    if stated.applied_to(sidecar.input) != sidecar.input:
        raise InputError(
            f"{source}: --size, --mean or --std contradict its sidecar",
            fix=f"leave them out; see: rtresnet inspect {source}",
        )
    return sidecar


def _settle_size(source: Path, model: Any, size: int | None) -> None:
    """Set an open side of the input to the stated side; reject a different side."""
    dims = _image_input(model).type.tensor_type.shape.dim
    if len(dims) != 4:
        return
    for dim in dims[2:]:
        if size is not None and not dim.dim_value:
            dim.dim_value = size
    for dim in dims[2:]:
        if size is not None and dim.dim_value != size:
            raise InputError(
                f"{source}: its input has {dims[2].dim_value}x{dims[3].dim_value} pixels, not "
                f"{size}",
                fix=f"use --size {dims[2].dim_value}",
            )


def _image_input(model: Any) -> Any:
    """Return the input of an onnx.ModelProto that takes the images."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return next((e for e in model.graph.input if e.name not in constants), model.graph.input[0])


def _require_plain(source: Path, model: Any, sidecar: Sidecar | None) -> None:
    """Raise InputError if pixels or top-K were embedded before quantization."""
    import onnx

    types = [
        entry.type.tensor_type.elem_type for entry in (*model.graph.input, *model.graph.output)
    ]
    if {onnx.TensorProto.UINT8, onnx.TensorProto.INT64} & set(types):
        parent = artifacts.parent_path(source, sidecar) if sidecar else None
        raise InputError(
            f"{source}: has an embedded input or output, which must be added after quantization",
            fix=f"rtresnet quantize {parent}, then rtresnet build with --input and --topk"
            if parent
            else "quantize the file without them",
        )


def _describe(source: Path, model: Any, stated: InputConfig) -> Sidecar:
    """Return the record of an ONNX file that another tool made."""
    side = _image_input(model).type.tensor_type.shape.dim[-1].dim_value
    preprocess = stated.complete(source, fixed=side or None)
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


def _note_replaced(out: Path, calibration: Calibration, reporter: Reporter) -> None:
    try:
        old = artifacts.read_sidecar(out)
    except ArtifactError:  # the replaced file may be broken
        return
    if old and old.calibration and old.calibration.images_sha256 != calibration.images_sha256:
        reporter.note(
            f"replaces {out}, which was calibrated on {old.calibration.images}; a plan built from "
            "it no longer matches"
        )
