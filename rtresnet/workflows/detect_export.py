"""Turn a detector's checkpoint into ONNX files and plans, each with a sidecar."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core import artifacts, detector_preprocess, hardware
from rtresnet.core.errors import CheckFailedError, missing_package
from rtresnet.core.reporter import Reporter
from rtresnet.core.sidecar import Detection, Measurements, Sidecar
from rtresnet.workflows.loading import require_torch

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.detection.net import Detector
    from rtresnet.detection.parity import DetectionParity
    from rtresnet.models.checkpoint import Checkpoint

PARITY_IMAGES = 3
SCORE, BOX, UNMATCHED = 1e-3, 0.1, 0.02  # largest differences: scores, pixels, share without match


def default_canvas(spec: Detection) -> tuple[int, int]:
    """Return height and width for a landscape image: 608 x 1008 for 600 and 1000 pixels."""
    stride = detector_preprocess.STRIDE
    height, width = (-(-round(side) // stride) * stride for side in (spec.shorter, spec.longer))
    return height, width


def write_fp32(
    weights: str | Path,
    path: Path,
    *,
    size: tuple[int, int] | None,
    rounds: int | None,
    reporter: Reporter,
) -> tuple[Checkpoint, Sidecar]:
    """Write the FP32 ONNX file of a detector and compare it with torch and with a reference file.

    Args:
        weights: The checkpoint.
        path: The ONNX file.
        size: Height and width of its input; None for `default_canvas`.
        rounds: Repetitions of non-maximum suppression; None for the checkpoint's.
        reporter: Receives progress and notes.

    Returns:
        The checkpoint, and the file's sidecar.

    Raises:
        InputError: A canvas that is no multiple of 16.
        ArtifactError: The checkpoint is broken.
        CheckFailedError: The file's detections differ from torch's.
        UnavailableError: torch or onnx is missing.
    """
    require_torch("export")
    if not hardware.installed("onnx"):
        raise missing_package("onnx", "export")
    from rtresnet.detection import checkpoint, export
    from rtresnet.detection.net import on_canvas
    from rtresnet.onnxlib import metadata

    loaded = checkpoint.load(weights)
    assert loaded.detection is not None
    spec = on_canvas(loaded.detection, size or default_canvas(loaded.detection))
    spec = dataclasses.replace(spec, rounds=rounds or spec.rounds)
    net = checkpoint.build(dataclasses.replace(loaded, detection=spec))
    with reporter.progress(f"exporting {path}"):
        model = export.to_onnx(net, name=loaded.model.architecture)
        record = Sidecar(
            kind="onnx", file=path.name, model=loaded.model, input=loaded.input,
            weights=loaded.weights, precision="fp32", detection=spec, assumed=loaded.assumed,
            parent=artifacts.link_to(weights, path),
        )  # fmt: skip
        metadata.DESCRIPTION.set(model, record)
        data = model.SerializeToString()
        measured = _parity(net, spec, loaded, data, reporter)
        record = dataclasses.replace(record, measured=measured)
    return loaded, artifacts.publish(path, lambda temporary: temporary.write_bytes(data), record)


def _parity(
    net: Detector, spec: Detection, loaded: Checkpoint, data: bytes, reporter: Reporter
) -> Measurements:
    """Compare the file with torch and with the standard operators, on drawn shapes."""
    if not hardware.installed("onnxruntime"):
        reporter.note("parity not checked: pip install onnxruntime")
        return Measurements()
    from rtresnet.detection import evaluate, export, parity
    from rtresnet.detection.data import open_detection
    from rtresnet.runtime.ort import OrtBackend

    reference = export.to_onnx(net, name="reference", standard=True).SerializeToString()
    source = open_detection(f"shapes:{PARITY_IMAGES}", "test")
    total, own = parity.DetectionParity(), parity.DetectionParity()
    torch_run = evaluate.torch_run(net)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        runs: list[Any] = []
        for name, content in (("file.onnx", data), ("reference.onnx", reference)):
            trial = Path(folder) / name
            trial.write_bytes(content)
            runs.append(stack.enter_context(contextlib.closing(OrtBackend(trial, provider="cpu"))))
        for index in range(len(source)):
            images, extent = detector_preprocess.to_canvas(source.read(index), spec, loaded.input)
            outputs: dict[str, np.ndarray] = runs[0].detect(images, extent)
            total += parity.compare(torch_run(images, extent), outputs, spec.least_score)
            own += parity.compare(runs[1].detect(images, extent), outputs, spec.least_score)
    for name, entry in (("torch", total), ("RoiAlign and NonMaxSuppression nodes", own)):
        _require_equal(entry, name, spec.rounds)
    return Measurements(detection_parity=total.record())


def _require_equal(result: DetectionParity, name: str, rounds: int) -> None:
    allowed = max(1, UNMATCHED * result.detections)
    if result.unmatched > allowed or result.score > SCORE or result.box > BOX:
        raise CheckFailedError(
            f"the ONNX file's detections differ from those of {name}: {result.unmatched} of "
            f"{result.detections} without a match, scores by {result.score:.1e}, boxes by "
            f"{result.box:.2g} pixels",
            fix="please report it with the checkpoint",
        )
    if result.unsettled:
        raise CheckFailedError(
            f"non-maximum suppression did not converge for {result.unsettled} boxes",
            fix=f"use --nms-rounds {2 * rounds}",
        )
