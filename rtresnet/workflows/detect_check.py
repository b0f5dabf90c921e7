"""Check that detections are valid, and equal to those of the detector's source files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rtresnet.bench.consistency import UNKNOWN, Check
from rtresnet.core import artifacts, hardware, reporter
from rtresnet.core.detector_preprocess import Detections
from rtresnet.core.errors import DataError
from rtresnet.core.precisions import PRECISIONS
from rtresnet.core.reporter import Reporter
from rtresnet.detection.agreement import agree
from rtresnet.workflows.check import CheckConfig, CheckedArtifact, fp32_ancestor
from rtresnet.workflows.detect import DetectionImages, require_detector
from rtresnet.workflows.detect_predict import SHOWN
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig, load_artifact

if TYPE_CHECKING:
    from rtresnet.core.reporter import Update
    from rtresnet.core.sidecar import Sidecar
    from rtresnet.runtime.session import Session

IMAGES = "shapes:100"  # default images
SAME_SCORE, SAME_BOX = 1e-3, 0.1  # between runs of float32 arithmetic: scores, pixels
# Compared with the FP32 file: share of detections with a score of 0.5 or more that only one of the
# two has, where scores may move by MARGIN. Measured with the first net of
# benchmarks/detection_shapes.py on its 100 test images: none of 225 (FP16), 233 (INT8), 241 (FP8).
UNMATCHED = {"fp32": 0.02, "fp16": 0.02, "int8": 0.1, "fp8": 0.15}
MARGIN = {"fp32": 1e-3, "fp16": 0.02, "int8": 0.15, "fp8": 0.2}


@dataclass(frozen=True, kw_only=True)
class CheckDetectorResult(CheckedArtifact):
    """Result of `check` for a detector.

    Attributes:
        artifact: The file.
        precision: Data type of the net.
        images: The images as they were named.
        assumed: What was assumed of the file.
        n: Number of images.
        detections: Detections in them.
        compared: Files that it was compared with.
        missing: Why it was not compared with others.
        checks: The checks. `largest` is a difference or a number of violations, as `compared`
            says; `moved` the number of detections that violate the check.
        runtime: Where it ran.
    """

    detections: int
    compared: tuple[str, ...]
    missing: tuple[str, ...]


def check_detector(
    path: str | os.PathLike[str],
    data: str | None = None,
    config: CheckConfig | None = None,
    *,
    runtime: RuntimeConfig | None = None,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> CheckDetectorResult:
    """Check a detector's detections, and compare them with those of the files it came from.

    Detections must be valid and repeatable, and non-maximum suppression finished. An FP32 ONNX
    file is compared with its checkpoint in torch, and with a reference file with RoiAlign and
    NonMaxSuppression nodes; files and plans made from it are compared with it. Of a plan, every
    convolution must have the precision of the file. Differences are returned, not raised.

    Args:
        path: A detector: checkpoint, ONNX file or plan.
        data: Images with or without boxes; drawn shapes by default.
        config: Number of images.
        runtime: Where the artifact runs.
        stated: Mean and std that replace the sidecar's.
        reporter: Receives progress.

    Returns:
        Each check with its difference, tolerance and verdict.

    Raises:
        InputError: Not a detector.
        DataError: Broken annotations or images.
        ArtifactError: The file does not match its sidecar.
        UnavailableError: The device, the provider or a package is not available.
    """
    config, runtime = config or CheckConfig(), runtime or RuntimeConfig()
    stated = stated or InputConfig()
    chosen = DetectionImages(data or IMAGES, config.images, split="test")
    images = list(chosen.pixels())
    if len(images) < 2:
        raise DataError(f"{data}: fewer than two images")
    place = runtime.for_artifact(os.fspath(path), [os.fspath(path)])
    with (
        load_artifact(path, place, stated=stated) as session,
        reporter.progress(f"checking {path}", total=2 * len(images)) as update,
    ):
        require_detector(session)
        detections = _detect(session, images, update)
        again = _detect(session, images[::-1], update, done=len(images))[::-1]
        assumed, info, precision = session.assumed, session.info, session.precision
        sidecar = session.sidecar
        checks = [
            _valid(detections, images, session),
            _suppressed(detections, session),
            _settled(detections),
            _repeated(detections, again),
        ]
        checks += _attested(sidecar)
    compared: list[str] = []
    missing: list[str] = []
    with contextlib.ExitStack() as stack:
        for name, other in _references(path, sidecar, stated, stack, missing):
            with reporter.progress(f"running {name}"):
                expected = _detect(other, images)
            checks.append(_parity(name, expected, detections, precision))
            compared.append(name)
    return CheckDetectorResult(
        artifact=os.fspath(path), precision=precision, images=data or IMAGES, assumed=assumed,
        n=len(images), detections=sum(map(len, detections)), compared=tuple(compared),
        missing=tuple(missing), checks=tuple(checks), runtime=info,
    )  # fmt: skip


def _detect(
    session: Session, images: Sequence[np.ndarray], update: Update | None = None, done: int = 0
) -> list[Detections]:
    detections = []
    for image in images:
        detections.append(session.detect(image))
        if update is not None:
            update(completed=done + len(detections))
    return detections


def _check(name: str, compared: str, n: int, largest: float, tolerance: float, *, moved: int = 0,
           why: str = "") -> Check:  # fmt: skip
    """Return a check that fails where `largest` is above the tolerance or not a number."""
    failed = not largest <= tolerance
    return Check(
        name=name, compared=compared, n=n, largest=largest, tolerance=tolerance, moved=moved,
        why=why if failed else None,
    )  # fmt: skip


def _valid(
    detections: Sequence[Detections], images: Sequence[np.ndarray], session: Session
) -> Check:
    """Check for boxes with an area within the image, falling scores from 0 to 1, known classes."""
    spec, wrong, total = session.detection, 0, 0
    assert spec is not None
    for entry, image in zip(detections, images, strict=True):
        height, width = image.shape[:2]
        x1, y1, x2, y2 = entry.boxes.astype(np.float64).T
        right = (x1 >= 0) & (y1 >= 0) & (x2 <= width + 1e-2) & (y2 <= height + 1e-2)
        right &= (x2 > x1) & (y2 > y1) & (entry.scores >= 0) & (entry.scores <= 1)
        right &= (entry.labels >= 0) & (entry.labels < len(session.classes))
        right &= np.append(True, np.diff(entry.scores) <= 0)[: len(entry)]
        wrong += int((~right).sum())
        total += len(entry)
    return _check(
        "valid", "boxes outside or empty, scores unsorted", total, wrong, 0, moved=wrong,
        why=f"{wrong} of {total} detections are not valid",
    )  # fmt: skip


def _suppressed(detections: Sequence[Detections], session: Session) -> Check:
    """Check that no two detections of one class overlap by more than the net's threshold."""
    from rtresnet.detection.average_precision import overlaps

    assert session.detection is not None
    largest = 0.0
    for entry in detections:
        shared = overlaps(entry.boxes, entry.boxes, np.zeros(len(entry), bool))
        shared[entry.labels[:, None] != entry.labels[None]] = 0
        largest = max(largest, float(np.triu(shared, 1).max(initial=0)))
    return _check(
        "suppressed", "largest IoU of two detections of one class", sum(map(len, detections)),
        largest, session.detection.class_iou + 1e-3,
        why=f"two detections of one class have an IoU of {largest:.3f}",
    )  # fmt: skip


def _settled(detections: Sequence[Detections]) -> Check:
    unsettled = sum(entry.unsettled for entry in detections)
    return _check(
        "settled", "boxes that non-maximum suppression left open", len(detections), unsettled, 0,
        moved=unsettled, why=f"non-maximum suppression was not finished for {unsettled} boxes",
    )  # fmt: skip


def _repeated(detections: Sequence[Detections], again: Sequence[Detections]) -> Check:
    """Compare an image with itself, with other images in between."""
    changed = 0
    for one, other in zip(detections, again, strict=True):
        pair = agree(one, other, 0.0)
        off = pair.score > SAME_SCORE or pair.box > SAME_BOX
        changed += pair.different + (len(pair.both) if off else 0)
    return _check(
        "repeated", "each image again, after others", len(detections), changed, 0, moved=changed,
        why=f"{changed} detections differ when the images are run again",
    )  # fmt: skip


def _parity(
    name: str, expected: Sequence[Detections], detections: Sequence[Detections], precision: str
) -> Check:
    """Share of the detections with a score of 0.5 or more that one of the two lacks."""
    margin = MARGIN.get(precision, MARGIN[UNKNOWN])
    pairs = [agree(e, d, SHOWN, margin) for e, d in zip(expected, detections, strict=True)]
    lost = sum(pair.different for pair in pairs)
    total = lost + sum(len(pair.both) for pair in pairs)
    why = f"{lost} of {total} detections differ from those of {name}"
    exact = precision == "fp32"
    for quantity, largest, allowed in (
        ("scores", max(pair.score for pair in pairs), SAME_SCORE),
        ("boxes", max(pair.box for pair in pairs), SAME_BOX),
    ):
        if exact and largest > allowed and not lost:
            lost, why = total, f"{quantity} differ from those of {name} by up to {largest:.2g}"
    return _check(
        "parity", f"share that differs from {name}", total,
        lost / max(total, 1), UNMATCHED.get(precision, UNMATCHED[UNKNOWN]), moved=lost, why=why,
    )  # fmt: skip


def _attested(sidecar: Sidecar | None) -> Iterator[Check]:
    """Check that every convolution of a plan has the file's precision, except the float ones."""
    plan = sidecar.plan if sidecar is not None else None
    if sidecar is None or plan is None or plan.attested is None:
        return
    total = plan.attested.convolutions
    expected = PRECISIONS[sidecar.precision].tensorrt if sidecar.precision in PRECISIONS else ""
    other = total - plan.attested.dtypes.get(expected, 0)
    in_float = len(sidecar.calibration.kept) if sidecar.calibration else 0
    yield _check(
        "attested", f"convolutions that the plan does not run in {sidecar.precision}", total, other,
        in_float, why=f"{other} of {total} convolutions do not run in {sidecar.precision}",
    )  # fmt: skip


def _references(
    path: str | os.PathLike[str],
    sidecar: Sidecar | None,
    stated: InputConfig,
    stack: contextlib.ExitStack,
    missing: list[str],
) -> Iterator[tuple[str, Session]]:
    """Return the references of a file; append to `missing` why one of them cannot run."""
    kind = artifacts.kind_of(path)
    if kind == "checkpoint":
        return
    if kind == "onnx" and sidecar is not None and sidecar.precision == "fp32":
        yield from _origins(Path(path), sidecar, stated, stack, missing)
        return
    parent, why = fp32_ancestor(path)
    if parent is None:
        missing.append(f"not compared with an FP32 file: {why}")
        return
    cpu = RuntimeConfig(provider="cpu")
    yield parent.name, stack.enter_context(load_artifact(parent, cpu, stated=stated))


def _origins(
    path: Path, sidecar: Sidecar, stated: InputConfig, stack: contextlib.ExitStack,
    missing: list[str],
) -> Iterator[tuple[str, Session]]:  # fmt: skip
    """Return an FP32 file's checkpoint in torch, and a reference file of standard operators."""
    origin = next((p for p, _, state in artifacts.chain(path) if _is_origin(p, state)), None)
    lacking = [name for name in ("torch", "onnx") if not hardware.installed(name)]
    if origin is None or lacking:
        why = f"{lacking[0]} is not installed" if lacking else "its checkpoint is missing"
        missing.append(f"not compared with torch and with the standard operators: {why}")
        return
    from rtresnet.detection import checkpoint, export
    from rtresnet.detection.backend import TorchDetector
    from rtresnet.runtime.ort import OrtBackend
    from rtresnet.runtime.session import Session

    loaded = checkpoint.load(origin)
    net = checkpoint.build(dataclasses.replace(loaded, detection=sidecar.detection))
    reference = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "reference.onnx"
    model = export.to_onnx(net, name="reference", standard=True)
    reference.write_bytes(model.SerializeToString())
    for name, backend in (
        (f"{origin.name} in torch", TorchDetector(net)),
        ("RoiAlign and NonMaxSuppression", OrtBackend(reference, provider="cpu")),
    ):
        session = Session(
            path, None, backend, input=stated.applied_to(sidecar.input),
            classes=sidecar.model.classes, detection=sidecar.detection,
        )  # fmt: skip
        yield name, stack.enter_context(session)


def _is_origin(path: Path, state: str) -> bool:
    return state in ("ok", "no sidecar") and artifacts.SUFFIXES.get(path.suffix) == "checkpoint"
