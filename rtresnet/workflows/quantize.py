"""Write an FP16, BF16, INT8 or FP8 version of an FP32 ONNX file.

INT8 and FP8 are calibrated on images, on the statistics of batch norm, or use the scales that
quantization-aware training stored in the file. `accuracy_gate.py` bounds the loss of accuracy.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from rtresnet.core import artifacts, atomic_io, hardware, locks, reporter, serialization
from rtresnet.core.config import Config, option, parse_percentage
from rtresnet.core.errors import ArtifactError, InputError, missing_package
from rtresnet.core.labels import read_classes
from rtresnet.core.precisions import CALIBRATED, HalfName, QuantizedName
from rtresnet.core.reporter import Reporter, plural
from rtresnet.core.serialization import flattened
from rtresnet.core.sidecar import Calibration, Measurements, OutlierRecord, Sidecar
from rtresnet.workflows import adopt
from rtresnet.workflows.accuracy_gate import Gate, GateResult, open_labelled, quantize_within
from rtresnet.workflows.evaluate import ALLOW_BROKEN, MAX_BROKEN, trained_on
from rtresnet.workflows.input_spec import InputConfig

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from rtresnet.core.preprocess import Preprocess
    from rtresnet.onnxlib.metadata import TrainedScales
    from rtresnet.quantization.calibrate import Calibrated
    from rtresnet.quantization.formats import NumberFormat
    from rtresnet.quantization.scales import SavedScales, ScalesOrigin

CALIB = Path("calib")
RANDOM_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(Config):
    """How a file is quantized.

    Attributes:
        precision: "int8", "fp8", "fp16" or "bf16".
        calib: Images to calibrate on: any data, a folder of images, a list in a .txt file, or
            "none" for ranges from the statistics of batch norm. None: the images in calib/.
        calibrator: How the range of a tensor is chosen.
        calib_images: Number of images to calibrate on.
        float_dtype: Data type of tensors between INT8 or FP8 kernels, and of what stays in float.
        fp8_stem: Whether FP8 includes the first convolution.
        eval_data: Labelled images on which INT8 or FP8 is compared with FP32.
        max_drop: Points of top-1 that may be lost on them.
        gate: What must be within `max_drop`: the measured loss ("point") or the upper limit of its
            95 % interval ("upper").
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
    if config.fp8_stem and config.precision != "fp8":
        raise InputError("--fp8-stem applies to FP8 only", fix="add --fp8, or leave --fp8-stem out")
    source = Path(source)
    place = Path(out) if out is not None else default_out(source, config.precision)
    with locks.hold_file(place, warn=reporter.note):
        return quantize_unlocked(source, config, out=place, stated=stated, reporter=reporter)


def default_out(source: Path, precision: str) -> Path:
    """resnet50.onnx to resnet50-int8.onnx."""
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
    from rtresnet.onnxlib import io, metadata
    from rtresnet.onnxlib.interface import precision_of

    stated = stated or InputConfig()
    artifacts.require_name(out, "onnx")
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"{out}: would overwrite its source", fix="choose another --out")
    for place in (out, artifacts.sidecar_path(out)):
        atomic_io.require_place(place)
    scales = _scales_path(out, reporter) if config.calibrated else None
    artifacts.require_onnx(source, "quantize")
    sidecar = sidecar or artifacts.verify(source)
    if not hardware.installed("onnx"):
        raise missing_package("onnx", "quantizing")
    model = io.load(source, checked=True) if model is None else copy.deepcopy(model)
    sidecar = sidecar or metadata.described(source, model)
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
        return QuantizeResult(path=out, sidecar=record, gate=None)
    _require_plain(source, model, sidecar)
    _settle_size(source, model, stated.size or (sidecar.input.size if sidecar else None))
    if sidecar is None:
        if (precision := precision_of(model)) not in ("fp32", "unknown"):
            raise InputError(f"{source}: is {precision} already", fix="start from the FP32 file")
        sidecar = _describe(source, model, stated)
    elif stated.applied_to(sidecar.input) != sidecar.input:
        raise InputError(
            f"{source}: --size, --mean or --std contradict its sidecar",
            fix=f"leave them out; see: rtresnet inspect {source}",
        )
    if sidecar.precision != "fp32":
        raise InputError(
            f"{source}: is {sidecar.precision} already", fix="start from the FP32 file"
        )
    calibration, gate, outliers = None, None, list[OutlierRecord]()
    if scales is None:
        from rtresnet.quantization import half

        result = half.to_half(model, cast("HalfName", config.precision))
    else:
        job = _Quantization(source=source, sidecar=sidecar, out=out, scales=scales, config=config,
                            reporter=reporter)  # fmt: skip
        result, calibration, gate, outliers = job.quantize(model)
        _note_replaced(out, calibration, reporter)
    measured = gate.measured() if gate else Measurements()
    if outliers:
        measured["outliers"] = outliers
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


def _scales_path(out: Path, reporter: Reporter) -> Path:
    """Return where the scales of a file go: calib/, or next to it where calib/ is not writable.

    Raises:
        InputError: Neither can be written to.
    """
    path = CALIB / f"{out.stem}.json"
    try:
        atomic_io.require_place(path)
    except InputError as error:
        path = out.with_name(f"{out.stem}.scales.json")
        atomic_io.require_place(path)
        reporter.note(f"{error.message}: new scales go to {path}")
    return path


def require_trained_for(
    source: object,
    trained: TrainedScales | None,
    precision: str,
    *,
    calib: str | None,
    calibrator: str,
    fp8_stem: bool,
) -> None:
    """Reject a quantization that differs from the one that the scales were trained for.

    Args:
        source: Whose scales they are, for the message.
        trained: None if there are none.
        precision: "int8" or "fp8".
        calib: Images that were requested, if any.
        calibrator: "auto" if none was requested.
        fp8_stem: Whether FP8 was requested in the first convolution.

    Raises:
        InputError: There are trained scales, and another precision or calibration was requested.
    """
    if trained is None:
        return
    if precision != trained.format:
        raise InputError(
            f"{source}: its scales were learned for {trained.format.upper()}, not for "
            f"{precision.upper()}",
            fix=f"use --{trained.format}, or train without --qat",
        )
    if fp8_stem:
        raise InputError(
            f"{source}: was trained with its first convolution in float",
            fix="leave --fp8-stem out",
        )
    if calib is not None or calibrator != "auto":
        option = f"--calib {calib}" if calib is not None else f"--calibrator {calibrator}"
        raise InputError(
            f"{source}: its activation scales were learned in training, there is nothing to "
            "calibrate",
            fix=f"leave {option} out",
        )


Quantized = tuple[Any, Calibration, "GateResult | None", list[OutlierRecord]]
"""The model, its calibration, the gate's measurements, and the outlier channels."""


@dataclass(frozen=True, kw_only=True)
class _Quantization:
    """The quantization of one file to INT8 or FP8.

    Attributes:
        sidecar: The FP32 file's record.
        scales: Where the scales go.
    """

    source: Path
    sidecar: Sidecar
    out: Path
    scales: Path
    config: QuantizeConfig
    reporter: Reporter

    @property
    def number_format(self) -> NumberFormat:
        from rtresnet.quantization.formats import FORMATS

        return FORMATS[self.config.precision]

    def float_nodes(self, model: Any) -> tuple[str, ...]:
        """Nodes that stay in float whatever they cost: the stem in FP8."""
        from rtresnet.quantization import placement

        fp8 = self.config.precision == "fp8" and not self.config.fp8_stem
        return placement.stem(model.graph.node) if fp8 else ()

    def quantize(self, model: Any) -> Quantized:
        """Calibrate and quantize in whichever way the file and the config ask for."""
        from rtresnet.onnxlib import metadata
        from rtresnet.quantization.prepare import prepare

        config, gate = self.config, self.config.accuracy_gate
        trained = metadata.TRAINED_SCALES.read(
            {entry.key: entry.value for entry in model.metadata_props}
        )
        require_trained_for(
            self.source, trained, config.precision, calib=config.calib,
            calibrator=config.calibrator, fp8_stem=config.fp8_stem,
        )  # fmt: skip
        model = prepare(model)
        if trained is not None:
            if gate is not None:
                raise InputError(
                    f"{self.source}: --eval would leave blocks in float, and its scales were "
                    f"learned with all of them in {trained.format.upper()}",
                    fix="leave --eval out, and see: rtresnet compare",
                )
            return self._with_trained_scales(model, trained)
        if config.calib == "none":
            if gate is not None:
                raise InputError(
                    "--eval needs --calib with images, to measure the noise of each block"
                )
            return self._without_images(model)
        return self._on_images(model, gate)

    def _on_images(self, model: Any, gate: Gate | None) -> Quantized:
        from rtresnet.quantization import calibrate, qdq, scales, simulate
        from rtresnet.quantization.scales import ScalesOrigin

        config, reporter, source = self.config, self.reporter, self.source
        labelled = open_labelled(gate, self.sidecar.model.classes, source) if gate else None
        batches, name, fingerprint, count = calibration_batches(
            config, self.sidecar.input, reporter
        )
        if gate is not None and labelled is not None:
            for remark in trained_on([(source, self.sidecar.weights)], labelled, "test"):
                reporter.note(remark)
            if not labelled.splits and name == gate.data:
                reporter.note(
                    f"{gate.data}: the ranges are chosen on the images of --eval, so the loss on "
                    "new images is probably larger"
                )
        float_nodes = self.float_nodes(model)
        tensors = list(qdq.placement(model, float_nodes))
        if (batch := simulate.fixed_batch(model)) is not None:
            how = "image by image" if batch == 1 else f"{batch} images at a time"
            reporter.note(f"{source}: its batch is fixed at {batch}; calibrated {how}")
        origin = ScalesOrigin(
            **self._contract(), images=name, images_sha256=fingerprint, n=count,
            calibrator=config.calibrator,
        )  # fmt: skip
        path, saved = self._saved_scales(origin)
        doing = f"calibrating on {plural(count, 'image')} of {name} ({config.calibrator})"
        with reporter.progress(doing, total=count) as update:

            def report(phase: str, done: int, total: int | None) -> None:
                update(done, phase, count if total is None else total)

            if saved is not None:
                calibrated = calibrate.repeat(
                    model, tensors, batches, saved, report, number_format=self.number_format,
                    float_nodes=float_nodes,
                )  # fmt: skip
            else:
                calibrated = calibrate.calibrate(
                    model, tensors, batches, config.calibrator, report,
                    number_format=self.number_format, float_nodes=float_nodes,
                )  # fmt: skip
                scales.write(path, calibrated, origin)
        outliers = self._note_calibration(calibrated)
        finish = functools.partial(_with_float_dtype, dtype=config.wide_dtype)
        excluded: tuple[str, ...] = ()
        int8: tuple[str, ...] = ()
        result = None
        if gate is None or labelled is None:
            quantized = finish(calibrated.quantized())
        else:
            held_out, logits = calibrate.references(model, batches())
            quantized, excluded, int8, result = quantize_within(
                gate, labelled, source, calibrated, held_out, logits, self.sidecar.input, finish,
                reporter,
            )  # fmt: skip
        calibration = self._calibration(calibrated, origin, path, excluded, int8)
        return quantized, calibration, result, outliers

    def _with_trained_scales(self, model: Any, trained: TrainedScales) -> Quantized:
        """Write INT8 or FP8 with the trained scales in the file."""
        from rtresnet.onnxlib.metadata import QAT
        from rtresnet.quantization.calibrate import Calibrated
        from rtresnet.quantization.formats import low_bit_scale
        from rtresnet.quantization.scales import ScalesOrigin

        scales, low_bit = trained.scales, trained.format == "int8"
        if low_bit:
            scales = {name: low_bit_scale(scale) for name, scale in scales.items()}
        calibrated = Calibrated(
            model=model, scales=scales, method=QAT, low_bit=low_bit, branches=trained.branches,
            number_format=self.number_format, float_nodes=self.float_nodes(model),
        )  # fmt: skip
        origin = ScalesOrigin(
            **self._contract(), images=trained.images, images_sha256=trained.images_sha256,
            n=trained.n, calibrator=QAT,
        )  # fmt: skip
        return self._uncalibrated(calibrated, origin)

    def _without_images(self, model: Any) -> Quantized:
        """Quantize with the batch norm statistics in the file."""
        import numpy as np

        from rtresnet.quantization import calibrate, qdq
        from rtresnet.quantization.scales import ScalesOrigin

        planes = [np.full((1, 1, 1, 3), level, np.uint8) for level in (0, 255)]
        low, high = (self.sidecar.input.normalize(plane)[0, :, 0, 0] for plane in planes)
        float_nodes = self.float_nodes(model)
        tensors = list(qdq.placement(model, float_nodes))
        calibrated = calibrate.calibrate_data_free(
            model, tensors, low, high, number_format=self.number_format, float_nodes=float_nodes
        )
        origin = ScalesOrigin(
            **self._contract(), images="none: ranges from the batch norms", images_sha256="", n=0,
            calibrator="batch norms",
        )  # fmt: skip
        return self._uncalibrated(calibrated, origin)

    def _uncalibrated(self, calibrated: Calibrated, origin: ScalesOrigin) -> Quantized:
        """Quantize with scales that no image was run for."""
        from rtresnet.quantization import scales

        model = _with_float_dtype(calibrated.quantized(), self.config.wide_dtype)
        scales.write(self.scales, calibrated, origin)
        return model, self._calibration(calibrated, origin, self.scales, ()), None, []

    def _contract(self) -> dict[str, Any]:
        """Return the fields of `ScalesOrigin` that describe the FP32 file."""
        contract = serialization.known(dataclasses.asdict(self.sidecar.input))
        return {
            "onnx_sha256": self.sidecar.sha256,
            "preprocessing": contract,
            "format": self.config.precision + ("-stem" if self.config.fp8_stem else ""),
        }

    def _calibration(
        self,
        calibrated: Calibrated,
        origin: ScalesOrigin,
        path: Path,
        excluded: tuple[str, ...],
        int8: tuple[str, ...] = (),
    ) -> Calibration:
        return Calibration(
            method=calibrated.method,
            images=origin.images,
            images_sha256=origin.images_sha256,
            n=origin.n,
            scales=path.as_posix(),
            scales_sha256=atomic_io.sha256(path),
            kept=(*calibrated.float_nodes, *excluded),
            int8=int8,
            rest=self.config.wide_dtype,
        )

    def _saved_scales(self, origin: ScalesOrigin) -> tuple[Path, SavedScales | None]:
        """Return where the scales are or go, and those of an earlier run with the same inputs."""
        default = CALIB / f"{self.out.stem}.json"  # perhaps in a folder that can only be read
        for path in dict.fromkeys((default, self.scales)):
            if (saved := self._read_scales(path, origin)) is not None:
                return path, saved
        return self.scales, None

    def _read_scales(self, path: Path, origin: ScalesOrigin) -> SavedScales | None:
        from rtresnet.quantization import scales

        if not path.exists():
            return None
        try:
            saved = scales.read(path)
        except ArtifactError as error:
            self.reporter.note(f"calibrating again: {error.message}")
            return None
        if other := scales.differences(saved, origin):
            self.reporter.note(
                f"calibrating again: {path} was made with different {', '.join(other)}"
            )
            return None
        self.reporter.note(f"reusing the scales of {path}")
        return saved

    def _note_calibration(self, calibrated: Calibrated) -> list[OutlierRecord]:
        """Report the calibration; return the outlier channels with their remedies."""
        note = self.reporter.note
        if calibrated.ratios:
            tried = [ratio for name, ratio in calibrated.ratios.items() if name != "kept"]
            biases = ", biases corrected" if calibrated.bias_corrections else ""
            count = len(calibrated.overrides)
            overrides = f", {plural(count, 'tensor')} with individual ranges" if count else ""
            note(
                f"ranges by {calibrated.method}{biases}{overrides}: "
                f"{calibrated.ratios['kept']:.1f} dB signal to noise at the logits "
                f"(tried: {min(tried):.1f} to {max(tried):.1f})"
            )
        equalized = {outlier.tensor for outlier in calibrated.equalized}
        entries: list[OutlierRecord] = []
        for outlier in calibrated.outliers:
            if outlier.tensor in equalized:
                remedy = "scaled down, with the next convolution's weights scaled up"
            elif self.config.calibrator != "auto":
                remedy = "unchanged: only --calibrator auto changes weights"
            else:
                remedy = "unchanged: it does not connect exactly two convolutions"
            channels = len(outlier.channels)
            note(
                f"{outlier.tensor}: {channels} of its channels determine the range, up to "
                f"{outlier.times:.0f} times the median; {remedy}"
            )
            entries.append({"tensor": outlier.tensor, "channels": channels,
                            "times": outlier.times, "remedy": remedy})  # fmt: skip
        return entries


def _with_float_dtype(model: Any, dtype: str) -> Any:
    from rtresnet.quantization import half

    return half.to_half(model) if dtype == "fp16" else model


def calibration_batches(
    config: QuantizeConfig, preprocess: Preprocess, reporter: Reporter
) -> tuple[Callable[[], Iterator[np.ndarray]], str, str, int]:
    """Return the calibration images as repeatable batches, with their name, hash and number.

    Without a spec, the images in calib/; without those, noise and a warning.
    """
    from rtresnet.data import loader, sources

    spec, images = config.calib, config.calib_images
    any_images = CALIB.is_dir() and bool(sources.images_under(CALIB))
    lists = sorted(CALIB.glob("*.txt")) if CALIB.is_dir() else []
    if spec is None and not any_images and lists:
        spec = str(lists[0])
    if spec is None and not any_images:
        reporter.warning(
            "no calibration images",
            "calib/ contains none, so the scales come from random noise. "
            "Latency is meaningful, accuracy is not. Use real images: --calib SPEC",
        )
        spec, images = f"synthetic:{RANDOM_IMAGES}", RANDOM_IMAGES
        name = "noise"
    else:
        spec = spec or str(CALIB)
        name = spec
    source = sources.open_images(spec)
    chosen = loader.sample(source, images)
    tally = loader.DecodeErrors(
        len(chosen), reporter.note, tolerated=config.max_broken, fix=ALLOW_BROKEN
    )
    size = loader.batch_size(preprocess)

    def batches() -> Iterator[np.ndarray]:
        for pixels, _ in loader.batches(source, preprocess, size, indices=chosen, tally=tally):
            yield pixels

    return batches, name, source.fingerprint(), len(chosen)


def _settle_size(source: Path, model: Any, size: int | None) -> None:
    """Set an open side of the input to the stated side; reject a different side."""
    dims = _image_input(model).type.tensor_type.shape.dim
    if len(dims) != 4:
        return
    for dim in dims[2:]:
        if size is not None and not dim.dim_value:
            dim.dim_value = size
        if size is not None and dim.dim_value != size:
            raise InputError(
                f"{source}: its input has {dims[2].dim_value}x{dims[3].dim_value} pixels, not "
                f"{size}",
                fix=f"--size {dims[2].dim_value}",
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
