"""Convert a checkpoint to ONNX files and plans, each with a sidecar.

In this order: resolve the weights, fold batch norm and write the FP32 file, compare it with torch,
write the other precisions, embed input and output, build the plans.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rtresnet.core import artifacts, hardware, locks, reporter
from rtresnet.core.config import Config, option
from rtresnet.core.errors import ArtifactError, InputError, missing_package
from rtresnet.core.precisions import CALIBRATED, PrecisionName, QuantizedName
from rtresnet.core.reporter import Reporter
from rtresnet.core.serialization import json_name
from rtresnet.core.sidecar import Measurements, Sidecar, restated
from rtresnet.onnxlib import io
from rtresnet.workflows import advisor, embedded
from rtresnet.workflows.advisor import AdviceResult
from rtresnet.workflows.build import BuildConfig, BuildResult, build_unlocked, plan_name
from rtresnet.workflows.detect import is_detector
from rtresnet.workflows.embedded import EmbedConfig
from rtresnet.workflows.estimate import EstimateConfig
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import require_torch
from rtresnet.workflows.quantize import QuantizeConfig, quantize_unlocked
from rtresnet.workflows.quantizer import require_trained_for
from rtresnet.workflows.run_folders import RUNS

if TYPE_CHECKING:
    from rtresnet.models.checkpoint import Checkpoint
    from rtresnet.models.nets import Net


def parse_canvas(text: str) -> tuple[int, int]:
    """Read "608x1008".

    Raises:
        InputError: Not two numbers.
    """
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise InputError(f"{text}: not a height and a width", fix="as in 608x1008") from None
    return height, width


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Options of an export.

    Attributes:
        model: Architecture; by default that of the weights.
        precisions: Precisions of the files after the FP32 one, and of the plans.
        plan: Whether a plan is built for each precision, if a builder is installed.
        canvas: Height and width of a detector's input, in pixels.
        nms_rounds: Repetitions of non-maximum suppression in a detector's file.
    """

    model: str | None = option(
        None,
        "Architecture, one of those that `rtresnet models` lists.",
        default_text="that of the weights",
    )
    precisions: tuple[PrecisionName, ...] = option((), "Precisions to write.")
    plan: bool = option(False, "Build a plan for each precision.")
    canvas: tuple[int, int] | None = option(
        None,
        "Height and width of a detector's input, multiples of 16.",
        metavar="HxW",
        parse=parse_canvas,
        default_text="from its training, 608x1008 for 600 and 1000 pixels",
    )
    nms_rounds: int | None = option(
        None,
        "Repetitions of non-maximum suppression in a detector's file; more are needed if it "
        "does not converge.",
        minimum=1,
        maximum=1000,
        default_text="from its training, 16",
    )


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """An ONNX file that was written.

    Attributes:
        measured: Parity with torch, the accuracy gate and the like, as in the sidecar.
    """

    path: Path = json_name("file")
    precision: str
    bytes: int
    sha256: str
    measured: Measurements


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Result of an export.

    Attributes:
        model: Architecture.
        weights: Origin of the weights: untrained, trained, imagenet or file.
        assumed: Assumptions on unstated properties.
        onnx: The files, the FP32 one first.
        plans: One for each precision.
        advice: The plans compared by the bytes they move and their minimum latency; None with
            fewer than two, or if the builder does not describe its layers.
    """

    model: str
    weights: str
    assumed: tuple[str, ...]
    onnx: tuple[ExportedFile, ...]
    plans: tuple[BuildResult, ...]
    advice: AdviceResult | None = None

    @property
    def path(self) -> Path:
        """The FP32 ONNX file."""
        return self.onnx[0].path


def export(
    weights: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] = "engines",
    config: ExportConfig | None = None,
    *,
    quantize: QuantizeConfig | None = None,
    build: BuildConfig | None = None,
    embed: EmbedConfig | None = None,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> ExportResult:
    """Export a checkpoint to ONNX with batch norm folded, and to plans if the config asks for it.

    Args:
        weights: A checkpoint, "imagenet" for torchvision's published weights, "hf:OWNER/NAME" for a
            repository on the Hugging Face hub, or "untrained". By default the best run of
            `config.model` under runs/, else untrained weights.
        out: Folder, or the name of the FP32 ONNX file in it.
        config: Architecture and precisions; only the FP32 ONNX file by default.
        quantize: Calibration of INT8 and FP8; its precision is ignored.
        build: Profiles, targets and builder of the plans.
        embed: Changed input or output of the files that plans are built from.
        stated: Preprocessing that replaces the checkpoint's.
        reporter: Receives progress, notes and warnings.

    Returns:
        The files that were written, the FP32 ONNX file first.

    Raises:
        InputError: Unknown architecture, weights or option.
        ArtifactError: The checkpoint is broken, or TensorRT rejects a file.
        CheckFailedError: The ONNX file differs from torch, or a plan from its precision.
        UnavailableError: torch, onnx or the builder is missing.
        LockedError: Another process writes into the folder.
    """
    config, quantize = config or ExportConfig(), quantize or QuantizeConfig()
    _require_used(quantize, config.precisions)
    place = Path(out)
    folder = place.parent if place.suffix.lower() == ".onnx" else place
    job = _Export(
        config=config,
        quantize=quantize,
        build=build or BuildConfig(),
        embed=embed or EmbedConfig(),
        stated=stated or InputConfig(),
        reporter=reporter,
    )
    with locks.hold_folder(folder, warn=reporter.note):
        return job.write(weights, folder, place if place != folder else None)


def _require_used(config: QuantizeConfig, precisions: Sequence[str]) -> None:
    """Raise InputError if an option applies to none of the precisions."""
    config.require_fp8_options_used(precisions)
    if not set(CALIBRATED) & set(precisions):
        try:
            config.without_fp8_options("fp16")
        except InputError as error:
            raise InputError(error.message, fix="add --int8 or --fp8") from None


@dataclass(frozen=True, kw_only=True)
class _Export:
    config: ExportConfig
    quantize: QuantizeConfig
    build: BuildConfig
    embed: EmbedConfig
    stated: InputConfig
    reporter: Reporter

    def write(
        self, weights: str | os.PathLike[str] | None, folder: Path, base: Path | None
    ) -> ExportResult:
        if weights is not None and is_detector(weights):
            base = base or folder / f"{_detector_name(weights)}.onnx"
            checkpoint, first = self._write_detector(Path(weights), base)
        else:
            checkpoint, origin = self._resolved(weights)
            base = base or folder / f"{checkpoint.model.architecture}.onnx"
            _note_replaced(base, checkpoint, self.reporter)
            first = _write_fp32(checkpoint, origin, base, self.reporter)
        net = checkpoint.model
        written, sources = [(base, first)], []
        model: Any = None  # of the FP32 file, read once
        for precision in self.config.precisions:
            source = base
            if precision != "fp32":
                source = base.with_name(f"{base.stem}-{precision}.onnx")
                config = _quantization(self.quantize, precision)
                if model is None and hardware.installed("onnx"):
                    model = io.load(base, checked=True)
                result = quantize_unlocked(
                    base, config, out=source, reporter=self.reporter, sidecar=first, model=model
                )
                written.append((source, result.sidecar))
            if self.embed.changes_anything:
                source, changed = embedded.write(source, self.embed, reporter=self.reporter)
                written.append((source, changed))
            sources.append((source, precision))
        plans: list[BuildResult] = []
        if self.config.plan and self._builder_installed():
            plans = [
                build_unlocked(
                    source, self.build, out=folder / plan_name(source, precision),
                    reporter=self.reporter,
                )
                for source, precision in sources
            ]  # fmt: skip
        return ExportResult(
            model=net.architecture,
            weights=checkpoint.weights.origin,
            assumed=checkpoint.assumed,
            onnx=tuple(
                ExportedFile(
                    path=path, precision=sidecar.precision, bytes=sidecar.bytes,
                    sha256=sidecar.sha256, measured=sidecar.measured,
                )
                for path, sidecar in written
            ),
            plans=tuple(plans),
            advice=self._advice(plans),
        )  # fmt: skip

    def _write_detector(self, weights: Path, base: Path) -> tuple[Checkpoint, Sidecar]:
        from rtresnet.workflows import detect_export, detect_quantize

        if self.embed.changes_anything or not self.stated.empty:
            raise InputError(
                f"{weights}: embedded input or output and stated preprocessing do not apply to "
                "detectors",
                fix="leave these options out",
            )
        if "bf16" in self.config.precisions:
            raise InputError(f"{weights}: a detector has no BF16 version", fix="use --fp16")
        if self._require_valid():
            detect_quantize.require_options(self.quantize)
            detect_quantize.open_calibration(weights, self.quantize)
        return detect_export.write_fp32(
            weights, base, size=self.config.canvas, rounds=self.config.nms_rounds,
            reporter=self.reporter,
        )  # fmt: skip

    def _advice(self, plans: Sequence[BuildResult]) -> AdviceResult | None:
        if len(plans) < 2 or any(entry.plan.layers is None for entry in plans):
            return None
        targets = dict.fromkeys(target for entry in plans for target in entry.plan.targets)
        gpus = advisor.gpus_for(self.build.targets, targets)
        if not gpus:
            return None
        return advisor.advise([entry.path for entry in plans], EstimateConfig(gpus=gpus))

    def _require_valid(self) -> list[QuantizeConfig]:
        """Reject invalid options early; return the configs of INT8 and FP8.

        Raises:
            InputError: Unknown target, profile or option.
        """
        require_torch("export")
        from rtresnet.builder import targets

        targets.parse_profiles(self.build.batch)
        targets.parse(self.build.targets, self.build.builder)
        configs = [
            _quantization(self.quantize, name) for name in self.config.precisions if name != "fp32"
        ]
        return [config for config in configs if config.calibrated]

    def _resolved(self, weights: str | os.PathLike[str] | None) -> tuple[Checkpoint, Path | None]:
        """Return the checkpoint with the stated input. Reject invalid requests early."""
        quantized = self._require_valid()
        if quantized and self.quantize.calib not in (None, "none"):
            from rtresnet.data.sources import open_images

            open_images(self.quantize.calib)
        checkpoint, origin = resolve(weights, self.config.model, self.stated.size, self.reporter)
        for config in quantized:
            require_trained_for(origin, checkpoint.learned, config)
        stated = self.stated.applied_to(checkpoint.input)
        checkpoint = dataclasses.replace(
            checkpoint,
            input=stated,
            assumed=restated(checkpoint.assumed, checkpoint.input, stated),
        )
        net = checkpoint.model
        embedded.require_classes(self.embed.topk, len(net.classes), net.architecture)
        return checkpoint, origin

    def _builder_installed(self) -> bool:
        from rtresnet.builder import targets

        if self.build.builder != "auto" or targets.available():
            return True
        self.reporter.note(
            "no plan was built: no TensorRT builder is installed; pip install tensorrt-rtx-cu13 "
            "(builds without a GPU)"
        )
        return False


def _detector_name(weights: str | os.PathLike[str]) -> str:
    sidecar = artifacts.read_sidecar(weights)
    return f"{sidecar.model.architecture if sidecar else Path(weights).stem}-detector"


def _quantization(config: QuantizeConfig, precision: str) -> QuantizeConfig:
    """Return the config of one precision.

    Raises:
        InputError: An option of the config is not for this precision.
    """
    name = cast("QuantizedName", precision)
    if name not in CALIBRATED:
        return QuantizeConfig(precision=name)
    if name == "fp8":
        return dataclasses.replace(config, precision=name)
    return config.without_fp8_options(name)


def resolve(
    weights: str | os.PathLike[str] | None, model: str | None, size: int | None, reporter: Reporter
) -> tuple[Checkpoint, Path | None]:
    """Return the checkpoint to export, and its file if it has one."""
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.models import checkpoint, download, zoo

    if weights is None and model is None:
        raise InputError("nothing to export", fix="add --model NAME or --weights FILE")
    spec = zoo.spec(model) if model else None
    if weights is None and spec is not None:
        best = best_run(spec.name, reporter)
        if best is not None:
            reporter.note(f"weights: {best}")
            return checkpoint.load(best, model=spec.name), best
    if weights in (None, "untrained"):
        if spec is None:
            raise InputError("--weights untrained needs a net", fix="use --model NAME")
        reporter.warning(
            "untrained weights",
            f"There is no checkpoint of {spec.name} under runs/, and --weights names none. These "
            "are random weights: latency is meaningful, accuracy is not.",
        )
        spec.require_size(size or spec.size)
        return checkpoint.untrained(spec, Preprocess.for_size(size or spec.size)), None
    assert weights is not None
    published = download.published(str(weights), model, reporter)
    if published is not None:
        return published, None
    return checkpoint.load(weights, model=model), Path(weights)


def best_run(architecture: str, reporter: Reporter) -> Path | None:
    """Return the checkpoint under runs/ of this net with the highest held-out accuracy, by sidecar.

    Runs of quantization-aware training count only if there are no others: their accuracy is that of
    the rounded net, and their weights are for one precision.

    Raises:
        InputError: There are runs of several data sets, whose accuracies cannot be compared.
    """
    candidates: dict[str, tuple[bool, float, Path]] = {}
    rounded: list[Path] = []
    for path in sorted(RUNS.glob("*/best.pt")):
        try:
            sidecar = artifacts.read_sidecar(path)
        except ArtifactError as error:
            reporter.note(f"ignored: {error}")
            continue
        if sidecar is not None and sidecar.model.architecture == architecture:
            data = sidecar.weights.source or "unknown data"
            is_float = sidecar.calibration is None
            if not is_float:
                rounded.append(path)
            entry = (is_float, sidecar.measured.get("val_top1") or 0.0, path)
            candidates[data] = max(candidates.get(data, entry), entry)
    if len(candidates) > 1:
        each = ", ".join(f"{data} ({path})" for data, (*_, path) in candidates.items())
        raise InputError(
            f"{RUNS}: {architecture} was trained on several data sets: {each}",
            fix=f"choose one, as in --weights {next(iter(candidates.values()))[-1]}",
        )
    if not candidates:
        return None
    ((is_float, _, best),) = candidates.values()
    for path in rounded if is_float else ():
        reporter.note(f"not used: {path} of quantization-aware training; choose it with --weights")
    return best


def _note_replaced(path: Path, checkpoint: Checkpoint, reporter: Reporter) -> None:
    """Report if the file of another run is replaced."""
    old = None
    with contextlib.suppress(ArtifactError):  # the replaced file may be broken
        old = artifacts.read_sidecar(path) if path.exists() else None
    if old is not None and old.weights.sha256 != checkpoint.weights.sha256:
        origin = artifacts.parent_path(path, old) or f"{old.weights.origin} weights"
        reporter.note(f"replaces {path}, which was exported from {origin}")


def _write_fp32(
    checkpoint: Checkpoint, origin: Path | None, path: Path, reporter: Reporter
) -> Sidecar:
    if not hardware.installed("onnx"):
        raise missing_package("onnx", "export")
    from rtresnet.exporter import fold, verify
    from rtresnet.exporter.writer import to_onnx

    record = Sidecar(
        kind="onnx",
        file=path.name,
        model=checkpoint.model,
        input=checkpoint.input,
        weights=checkpoint.weights,
        precision="fp32",
        assumed=checkpoint.assumed,
        parent=artifacts.link_to(origin, path) if origin else None,
    )
    net, size = checkpoint.net(), checkpoint.input.size
    with reporter.progress(f"exporting {path}"):
        model = to_onnx(
            fold.fold(net, size),
            size=size,
            name=checkpoint.model.architecture,
            scales=checkpoint.learned,
            description=record,
        )
        verify.check_folded(model)
        data = model.SerializeToString()
        measured = _parity(net, size, path, data, reporter)
    record = dataclasses.replace(record, measured=measured)
    return artifacts.publish(path, lambda temporary: temporary.write_bytes(data), record)


def _parity(net: Net, size: int, path: Path, data: bytes, reporter: Reporter) -> Measurements:
    """Compare the file with the torch net; return the record for the sidecar's `measured`."""
    if not hardware.installed("onnxruntime"):
        reporter.note("parity not checked: pip install onnxruntime")
        return {}
    from rtresnet.exporter import verify
    from rtresnet.runtime.backend import logits
    from rtresnet.runtime.cpu_rewrite import CpuModel
    from rtresnet.runtime.ort import OrtBackend

    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / path.name
        trial.write_bytes(data)
        backend = OrtBackend(trial, provider="cpu", rewritten=CpuModel(model=str(trial)))
        with contextlib.closing(backend):
            parity = verify.check_parity(
                net, lambda images: logits(backend.infer(images), path), size=size
            )
    return {"parity": {**parity, "with": backend.provider}}
