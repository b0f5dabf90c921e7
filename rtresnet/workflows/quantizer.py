"""Quantize an FP32 model to INT8 or FP8.

The scales come from images, from the statistics of batch norm in the file, or from
quantization-aware training, which stores them in the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core import artifacts, atomic_io, locks, serialization
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.reporter import Reporter, plural
from rtresnet.core.sidecar import Calibration, OutlierRecord, Sidecar
from rtresnet.workflows.accuracy_gate import GatedModel, GateResult, open_labelled, quantize_within
from rtresnet.workflows.evaluate import ALLOW_BROKEN
from rtresnet.workflows.training_overlap import trained_on

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from rtresnet.data.loader import DecodeErrors
    from rtresnet.onnxlib.metadata import TrainedScales
    from rtresnet.quantization.calibrate import Calibrated
    from rtresnet.quantization.scales import SavedScales, ScalesOrigin
    from rtresnet.workflows.quantize import QuantizeConfig

CALIB = Path("calib")
RANDOM_IMAGES = 32


def require_trained_for(
    source: object, trained: TrainedScales | None, config: QuantizeConfig
) -> None:
    """Reject a quantization that differs from the one that the scales were trained for.

    Args:
        source: File that has the scales, for the message.
        trained: None if there are none.
        config: Precision and calibration.

    Raises:
        InputError: There are trained scales, and another precision or calibration was requested.
    """
    if trained is None:
        return
    if config.precision != trained.format:
        raise InputError(
            f"{source}: its scales were learned for {trained.format.upper()}, not for "
            f"{config.precision.upper()}",
            fix=f"use --{trained.format}, or train without --qat",
        )
    if options := config.fp8_options:
        raise InputError(
            f"{source}: all convolutions except the first were trained in FP8",
            fix=f"leave {' and '.join(options)} out",
        )
    if config.calib is not None or config.calibrator != "auto":
        option = f"--calibrator {config.calibrator}"
        if config.calib is not None:
            option = f"--calib {config.calib}"
        raise InputError(
            f"{source}: its activation scales were learned in training, so calibration does not "
            "apply",
            fix=f"leave {option} out",
        )
    if config.eval_data is not None:
        raise InputError(
            f"{source}: --eval would leave blocks in float, and its scales were learned with all "
            f"of them in {trained.format.upper()}",
            fix="leave --eval out, and see: rtresnet compare",
        )


def scales_path(out: Path, reporter: Reporter) -> Path:
    """Return where the scales of a file go: calib/, or next to it if calib/ is not writable.

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


@dataclass(frozen=True, kw_only=True)
class ScalesFile:
    """A file of scales, and the hash of its content when it was written or read."""

    path: Path
    sha256: str


def write_scales(path: Path, write: Callable[[], object], reporter: Reporter) -> ScalesFile:
    """Write a file of scales.

    Nets of one name share a file in calib/, also those of concurrent runs: the hash is that of the
    scales that were written here, even if another run replaces them next.

    Args:
        path: The file.
        write: Writes it.
        reporter: Receives a note if the file system has no locks.

    Raises:
        InputError: It cannot be written.
        LockedError: Another process has been writing it for longer than that takes.
    """
    with locks.hold_file(path, warn=reporter.note, wait=artifacts.UPDATE_WAIT):
        write()
        return ScalesFile(path=path, sha256=atomic_io.sha256(path))


@dataclass(frozen=True, kw_only=True)
class CalibrationImages:
    """The images of a calibration.

    Attributes:
        batches: Returns their batches, float32 [N, 3, S, S], each time from the first one.
        name: The data's name.
        fingerprint: Their hash.
        requested: Their number, including broken ones.
        tally: Receives those that cannot be decoded, as they are read.
    """

    batches: Callable[[], Iterator[np.ndarray]]
    name: str
    fingerprint: str
    requested: int
    tally: DecodeErrors


def open_calibration(
    config: QuantizeConfig, preprocess: Preprocess, reporter: Reporter
) -> CalibrationImages:
    """Open the calibration images.

    Without a spec, the images in calib/; without those, noise and a warning.
    """
    from rtresnet.data import loader, sources

    spec, count = config.calib, config.calib_images
    if spec is None and CALIB.is_dir():
        lists = sorted(CALIB.glob("*.txt"))
        if sources.images_under(CALIB):
            spec = str(CALIB)
        elif lists:
            spec = str(lists[0])
    name = spec or "noise"
    if spec is None:
        reporter.warning(
            "no calibration images",
            "calib/ contains none, so the scales come from random noise. "
            "Latency is meaningful, accuracy is not. Use real images: --calib SPEC",
        )
        spec, count = f"synthetic:{RANDOM_IMAGES}", RANDOM_IMAGES
    source = sources.open_images(spec)
    indices = loader.sample(source, count)
    tally = loader.DecodeErrors(
        len(indices), reporter.note, tolerated=config.max_broken, fix=ALLOW_BROKEN
    )
    size = loader.batch_size(preprocess)

    def batches() -> Iterator[np.ndarray]:
        for pixels, _ in loader.batches(source, preprocess, size, indices=indices, tally=tally):
            yield pixels

    return CalibrationImages(
        batches=batches, name=name, fingerprint=source.fingerprint(), requested=len(indices),
        tally=tally,
    )  # fmt: skip


def fp8_float_nodes(model: onnx.ModelProto, config: QuantizeConfig) -> tuple[str, ...]:
    """Return the nodes that always stay in float; none in INT8."""
    from rtresnet.quantization import qdq

    if config.precision != "fp8":
        return ()
    return qdq.fp8_float_nodes(model, stem=config.fp8_stem, min_channels=config.fp8_min_channels)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A model that was quantized.

    Attributes:
        gate: Measurements of the accuracy gate; None if nothing was compared.
        outliers: The outlier channels, with their remedies.
    """

    model: onnx.ModelProto
    calibration: Calibration
    gate: GateResult | None
    outliers: list[OutlierRecord]


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """The quantization of one file to INT8 or FP8.

    Attributes:
        source: The FP32 file.
        sidecar: Its record.
        out: The new file.
        scales: File that the scales are written to.
        config: Precision, calibration and accuracy gate.
        reporter: Receives progress and notes.
    """

    source: Path
    sidecar: Sidecar
    out: Path
    scales: Path
    config: QuantizeConfig
    reporter: Reporter

    def quantize(self, model: onnx.ModelProto) -> Quantized:
        """Calibrate as the file and the config require, and quantize.

        Raises:
            InputError: The config contradicts the file.
            AccuracyCheckFailedError: See `quantize_within`.
        """
        from rtresnet.onnxlib import metadata
        from rtresnet.quantization.canonicalize import canonicalize

        trained = metadata.TRAINED_SCALES.read(metadata.properties_of(model))
        require_trained_for(self.source, trained, self.config)
        model = canonicalize(model)
        if trained is None and self.config.calib != "none":
            return self._with_images(model)
        if self.config.eval_data is not None:
            raise InputError("--eval needs --calib with images, to measure the noise of each block")
        if trained is not None:
            calibrated, origin = self._from_training(model, trained)
        else:
            calibrated, origin = self._from_statistics(model)
        return self._finished(calibrated, origin)

    def _with_images(self, model: onnx.ModelProto) -> Quantized:
        from rtresnet.quantization import calibrate, simulate

        source, gate = self.source, self.config.accuracy_gate
        labelled = open_labelled(gate, self.sidecar.model.classes, source) if gate else None
        images = open_calibration(self.config, self.sidecar.input, self.reporter)
        if gate is not None and labelled is not None:
            for remark in trained_on([(source, self.sidecar.weights)], labelled, "test"):
                self.reporter.note(remark)
            if not labelled.splits and images.name == gate.data:
                self.reporter.note(
                    f"{gate.data}: the ranges are chosen on the images of --eval, so the loss on "
                    "new images is probably larger"
                )
        if (batch := simulate.fixed_batch(model)) is not None:
            how = "image by image" if batch == 1 else f"{batch} images at a time"
            self.reporter.note(f"{source}: its batch is fixed at {batch}; calibrated {how}")
        origin = self._origin(
            images.name, images.fingerprint, images.requested, self.config.calibrator
        )
        calibrated, saved = self._calibrate(model, images.batches, origin)
        outliers = self._note_calibration(calibrated)
        gated = None
        if gate is not None and labelled is not None:
            held_out, logits = calibrate.references(model, images.batches())
            gated = quantize_within(
                gate, labelled, source, calibrated, held_out, logits, self.sidecar.input,
                self._with_float_dtype, self.reporter,
            )  # fmt: skip
        broken = len(images.tally.skipped)
        return self._finished(calibrated, origin, saved, gated, outliers, broken=broken)

    def _calibrate(
        self,
        model: onnx.ModelProto,
        batches: Callable[[], Iterator[np.ndarray]],
        origin: ScalesOrigin,
    ) -> tuple[Calibrated, ScalesFile | None]:
        """Calibrate on images, or repeat an earlier calibration and return its file too."""
        from rtresnet.quantization import calibrate

        file, saved = self._saved_scales(origin)
        count, kinds = origin.n, self._number_format(model)
        doing = f"calibrating on {plural(count, 'image')} of {origin.images} ({origin.calibrator})"
        tensors = self._tensors(model)
        with self.reporter.progress(doing, total=count) as update:

            def report(phase: str, done: int, total: int | None) -> None:
                update(done, phase, count if total is None else total)

            if saved is not None:
                return calibrate.repeat(model, tensors, batches, saved, report, **kinds), file
            calibrated = calibrate.calibrate(
                model, tensors, batches, origin.calibrator, report, **kinds
            )
        return calibrated, None

    def _from_training(
        self, model: onnx.ModelProto, trained: TrainedScales
    ) -> tuple[Calibrated, ScalesOrigin]:
        from rtresnet.onnxlib.metadata import QAT
        from rtresnet.quantization.calibrate import Calibrated
        from rtresnet.quantization.number_formats import low_bit_scale

        scales, low_bit = trained.scales, trained.format == "int8"
        if low_bit:
            scales = {name: low_bit_scale(scale) for name, scale in scales.items()}
        calibrated = Calibrated(
            model=model, scales=scales, method=QAT, low_bit=low_bit, branches=trained.branches,
            **self._number_format(model),
        )  # fmt: skip
        return calibrated, self._origin(trained.images, trained.images_sha256, trained.n, QAT)

    def _from_statistics(self, model: onnx.ModelProto) -> tuple[Calibrated, ScalesOrigin]:
        """Calibrate with the batch norm statistics in the file."""
        import numpy as np

        from rtresnet.quantization import calibrate

        planes = [np.full((1, 1, 1, 3), level, np.uint8) for level in (0, 255)]
        low, high = (self.sidecar.input.normalize(plane)[0, :, 0, 0] for plane in planes)
        calibrated = calibrate.calibrate_data_free(
            model, self._tensors(model), low, high, **self._number_format(model)
        )
        return calibrated, self._origin("none: ranges from the batch norms", "", 0, "batch norms")

    def _finished(
        self,
        calibrated: Calibrated,
        origin: ScalesOrigin,
        saved: ScalesFile | None = None,
        gated: GatedModel | None = None,
        outliers: Sequence[OutlierRecord] = (),
        *,
        broken: int = 0,
    ) -> Quantized:
        """Quantize unless the gate did, and write the scales unless they are in `saved`."""
        from rtresnet.quantization import scales

        model = gated.model if gated else self._with_float_dtype(calibrated.quantized())
        file = saved or write_scales(
            self.scales, lambda: scales.write(self.scales, calibrated, origin), self.reporter
        )
        calibration = Calibration(
            method=calibrated.method,
            images=origin.images,
            images_sha256=origin.images_sha256,
            n=origin.n - broken,
            scales=file.path.as_posix(),
            scales_sha256=file.sha256,
            kept=(*calibrated.float_nodes, *(gated.float_nodes if gated else ())),
            int8=gated.int8 if gated else (),
            rest=self.config.wide_dtype,
        )
        result = gated.result if gated else None
        return Quantized(model=model, calibration=calibration, gate=result, outliers=list(outliers))

    def _with_float_dtype(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Convert the tensors that are not quantized, if they are to be FP16."""
        from rtresnet.quantization import half

        return half.to_half(model) if self.config.wide_dtype == "fp16" else model

    def _tensors(self, model: onnx.ModelProto) -> list[str]:
        from rtresnet.quantization import qdq

        return list(qdq.placement(model, fp8_float_nodes(model, self.config)))

    def _number_format(self, model: onnx.ModelProto) -> dict[str, Any]:
        """Return the arguments of calibrations that describe the quantized file."""
        from rtresnet.quantization.number_formats import FORMATS

        return {
            "number_format": FORMATS[self.config.precision],
            "float_nodes": fp8_float_nodes(model, self.config),
        }

    def _origin(self, images: str, sha256: str, n: int, calibrator: str) -> ScalesOrigin:
        from rtresnet.quantization.scales import ScalesOrigin

        return ScalesOrigin(
            onnx_sha256=self.sidecar.sha256,
            preprocessing=serialization.nonfinite_to_none(dataclasses.asdict(self.sidecar.input)),
            format=self.config.number_format,
            images=images,
            images_sha256=sha256,
            n=n,
            calibrator=calibrator,
        )

    def _saved_scales(self, origin: ScalesOrigin) -> tuple[ScalesFile | None, SavedScales | None]:
        """Return the scales of an earlier run with the same inputs, and their file."""
        default = CALIB / f"{self.out.stem}.json"  # perhaps in a folder that can only be read
        for path in dict.fromkeys((default, self.scales)):
            if (saved := self._read_scales(path, origin)) is not None:
                return ScalesFile(path=path, sha256=atomic_io.sha256(path)), saved
        return None, None

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
