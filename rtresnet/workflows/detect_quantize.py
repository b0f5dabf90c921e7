"""FP16, INT8 and FP8 files of a detector: boxes and coordinates stay float32.

INT8 and FP8 are calibrated on whole images. The accuracy gate compares average precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core import artifacts, atomic_io, detector_preprocess
from rtresnet.core.errors import CheckFailedError, InputError
from rtresnet.core.reporter import Reporter, plural
from rtresnet.core.sidecar import Calibration, Measurements, Sidecar
from rtresnet.workflows.detect import DetectionImages
from rtresnet.workflows.quantizer import fp8_float_nodes, write_scales

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.workflows.quantize import QuantizeConfig

BOXES = ("proposals.", "align.grid.", "select.")  # scopes whose nodes stay float32
SCOPES = ("proposals.", "align.", "select.")
METHODS = ("mse", "percentile", "max")  # methods that "auto" tries, in this order


def float_nodes(model: Any, scopes: tuple[str, ...] = BOXES) -> frozenset[str]:
    """Return the nodes of an onnx.ModelProto that compute boxes or coordinates."""
    return frozenset(node.name for node in model.graph.node if node.name.startswith(scopes))


def quantize_detector(
    source: Path,
    model: Any,
    sidecar: Sidecar,
    config: QuantizeConfig,
    *,
    out: Path,
    scales_path: Path | None,
    reporter: Reporter,
) -> Sidecar:
    """Write the FP16, INT8 or FP8 version of a detector's FP32 file.

    Args:
        source: The FP32 file.
        model: Its content.
        sidecar: Its record.
        config: Precision, calibration and gate.
        out: The new file.
        scales_path: Where the scales of an INT8 file go.
        reporter: Receives progress and notes.

    Returns:
        The new file's sidecar.

    Raises:
        InputError: No calibration images, or an option that does not apply to detectors.
        CheckFailedError: INT8 loses more average precision than `config` allows.
    """
    from rtresnet.onnxlib import metadata
    from rtresnet.quantization import half

    if sidecar.precision != "fp32":
        raise InputError(
            f"{source}: is {sidecar.precision} already", fix="start from the FP32 file"
        )
    if config.precision == "bf16":
        raise InputError(f"{source}: a detector has no BF16 version", fix="use --fp16")
    require_options(config)
    calibration, measured = None, Measurements()
    if config.precision == "fp16":
        result = half.to_half(model, float_nodes=float_nodes(model))
    else:
        assert scales_path is not None
        result, calibration, measured = _int8(source, model, sidecar, config, scales_path, reporter)
    record = dataclasses.replace(
        sidecar, kind="onnx", file=out.name, precision=config.precision,
        parent=artifacts.link_to(source, out, sidecar.sha256 or None), calibration=calibration,
        measured=measured, made_by={},
    )  # fmt: skip
    metadata.DESCRIPTION.set(result, record)
    data = result.SerializeToString()
    return artifacts.publish(out, lambda temporary: temporary.write_bytes(data), record)


def require_options(config: QuantizeConfig) -> None:
    """Reject options that apply to classifiers only.

    Raises:
        InputError: --gate upper, --classes or --max-broken.
    """
    for field in dataclasses.fields(config):
        applies = field.name not in ("gate", "classes", "max_broken")
        if not applies and getattr(config, field.name) != field.default:
            name = field.name.replace("_", "-")
            raise InputError(f"--{name} does not apply to detectors", fix="leave it out")


def open_calibration(source: str | Path, config: QuantizeConfig) -> DetectionImages:
    """Open the images to calibrate a detector on.

    Raises:
        InputError: None are named.
        DataError: They cannot be read.
    """
    if config.calib in (None, "none"):
        raise InputError(
            f"{source}: a detector is calibrated on images",
            fix="use --calib FOLDER, or voc:DIR, coco:JSON:IMAGES or shapes:N",
        )
    return DetectionImages(str(config.calib), config.calib_images)


def _int8(
    source: Path,
    model: Any,
    sidecar: Sidecar,
    config: QuantizeConfig,
    scales_path: Path,
    reporter: Reporter,
) -> tuple[Any, Calibration, Measurements]:
    import json

    from rtresnet.quantization import calibrate, half, qdq
    from rtresnet.quantization.number_formats import FORMATS

    number_format = FORMATS[config.precision]
    images = open_calibration(source, config)
    excluded = fp8_float_nodes(model, config)
    keep = float_nodes(model, SCOPES) | set(excluded)
    tensors = list(qdq.placement(model, keep))
    doing = f"calibrating on {plural(len(images), 'image')} of {config.calib}"
    with reporter.progress(doing, total=len(images)) as update:
        histograms = _observe(model, tensors, _inputs(images, sidecar), update)
    methods: tuple[str, ...] = METHODS if config.calibrator == "auto" else (config.calibrator,)
    if config.eval_data is None and len(methods) > 1:
        methods = methods[:1]
        reporter.note(f"ranges by {methods[0]}; with --eval, auto compares methods by AP")
    tried: list[tuple[float, str, Any, dict[str, float], Measurements]] = []
    reference = None
    if config.eval_data is not None:
        reference, _ = _average_precision(model, sidecar, config.eval_data, reporter)
    for method in methods:
        scales = {
            name: float(s)
            for name, s in calibrate.scales_by(method, histograms, number_format).items()
        }
        quantized = qdq.insert(model, scales, keep, number_format=number_format)
        if config.wide_dtype == "fp16":
            quantized = half.to_half(quantized, float_nodes=float_nodes(quantized))
        score, measured = 0.0, Measurements()
        if config.eval_data is not None:
            score, measured = _average_precision(quantized, sidecar, config.eval_data, reporter)
            reporter.note(f"ranges by {method}: AP {score:.2f}, FP32 {reference:.2f}")
        tried.append((score, method, quantized, scales, measured))
        if reference is not None and reference - score <= config.max_drop:
            break
    score, method, quantized, scales, measured = max(tried, key=lambda entry: entry[0])
    if reference is not None and reference - score > config.max_drop:
        raise CheckFailedError(
            f"{source}: {config.precision.upper()} loses {reference - score:.2f} points of average "
            f"precision on {config.eval_data}, more than {config.max_drop:g}",
            fix="calibrate on more images, or write FP16: --fp16",
        )
    record = {
        "onnx_sha256": sidecar.sha256, "images": config.calib, "n": len(images),
        "images_sha256": images.fingerprint, "method": method, "scales": scales,
    }  # fmt: skip
    text = json.dumps(record, indent=1) + "\n"
    file = write_scales(scales_path, lambda: atomic_io.write_text(scales_path, text), reporter)
    calibration = Calibration(
        method=method, images=str(config.calib), images_sha256=images.fingerprint, n=len(images),
        scales=file.path.as_posix(), scales_sha256=file.sha256,
        kept=excluded, rest=config.wide_dtype,
    )  # fmt: skip
    return quantized, calibration, measured


def _inputs(images: DetectionImages, sidecar: Sidecar) -> Iterator[dict[str, np.ndarray]]:
    assert sidecar.detection is not None
    for image in images.pixels():
        batch, extent = detector_preprocess.to_canvas(image, sidecar.detection, sidecar.input)
        yield {"images": batch, "extent": extent}


def _observe(
    model: Any, tensors: list[str], inputs: Iterator[dict[str, np.ndarray]], update: Any
) -> dict[str, Any]:
    """Return histograms of the tensors' values over whole images."""
    from rtresnet.quantization.calibrators import Histogram
    from rtresnet.quantization.simulate import make_session

    names = [name for name in tensors if name != "images"]
    session = make_session(model, names)
    histograms = {name: Histogram(name) for name in tensors}
    for done, feed in enumerate(inputs, 1):
        for name, values in zip(names, session.run(names, feed), strict=True):
            histograms[name].add(values)
        if "images" in histograms:
            histograms["images"].add(feed["images"])
        update(completed=done)
    return histograms


def _average_precision(
    model: Any, sidecar: Sidecar, data: str, reporter: Reporter
) -> tuple[float, Measurements]:
    """Return COCO's AP at IoU 0.5 to 0.95, in %, of a model on the test split, and the record."""
    from rtresnet.core.detector_preprocess import OUTPUTS
    from rtresnet.detection import evaluate
    from rtresnet.detection.data import open_detection
    from rtresnet.quantization.simulate import make_session

    assert sidecar.detection is not None
    source = open_detection(data, "test")
    session = make_session(model)

    def run(images: np.ndarray, extent: np.ndarray) -> dict[str, np.ndarray]:
        values = session.run(list(OUTPUTS), {"images": images, "extent": extent})
        return dict(zip(OUTPUTS, values, strict=True))

    with reporter.progress(f"average precision on {data}", total=len(source)) as update:
        result = evaluate.accuracy(
            run, source, sidecar.detection, sidecar.input, lambda done: update(completed=done)
        )
    if result.ap is None:
        raise InputError(f"{data}: no objects to measure average precision on")
    record = result.record(data, "test", source.fingerprint())
    return result.ap, Measurements(average_precision=record)
