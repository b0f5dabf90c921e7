"""Measure the average precision of detectors on images with boxes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from rtresnet.core import artifacts, reporter
from rtresnet.core.detector_preprocess import Detections
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.reporter import Reporter
from rtresnet.core.serialization import flattened, json_name
from rtresnet.detection.average_precision import DetectionAccuracy
from rtresnet.runtime.session import RuntimeInfo
from rtresnet.workflows.detect import DetectionImages, require_detector
from rtresnet.workflows.detect_predict import (
    SHOWN,
    DetectedObject,
    detected_objects,
    with_boxes,
)
from rtresnet.workflows.evaluate import OTHER_PREPROCESSING, write_measured
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig, load_artifact

if TYPE_CHECKING:
    from rtresnet.detection.data import DetectionSource, Targets

LISTED = 12  # images of each gallery of a page


@dataclass(frozen=True, kw_only=True)
class PrecisionRecallCurve:
    """Precision of one class at recalls 0, 0.01, ... 1, at IoU 0.5.

    Attributes:
        name: The class.
        objects: Number of its objects.
        precision: From 0 to 1; 0 for recalls that are not reached.
    """

    name: str
    objects: int
    precision: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ReportedImage:
    """Right and wrong detections with a score of 0.5 or more in one image.

    Attributes:
        index: Index in the data.
        place: Its file, or data set and index.
        correct: Correct detections.
        wrong: Other detections.
        missed: Objects without a detection.
    """

    index: int
    place: str
    correct: tuple[DetectedObject, ...] = json_name("found")
    wrong: tuple[DetectedObject, ...]
    missed: tuple[DetectedObject, ...]


@dataclass(frozen=True, kw_only=True)
class DetectionReport:
    """Curves and images for a page.

    Attributes:
        curves: A curve for each class with objects.
        samples: The first images.
        worst: The images with most errors, without images that have none.
    """

    curves: tuple[PrecisionRecallCurve, ...]
    samples: tuple[ReportedImage, ...]
    worst: tuple[ReportedImage, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluateDetectorResult(DetectionAccuracy):
    """Average precision of a detector, with device and data.

    Attributes:
        artifact: What was measured.
        artifact_sha256: Hash of the file; None without a sidecar.
        precision: Its data type.
        input: Preprocessing that was used.
        data: The images as they were named.
        split: The part of them that was used.
        data_sha256: Fingerprint of images and boxes.
        unsettled: Boxes for which non-maximum suppression may not have been finished.
        invalid: Ignored boxes of the data, which have no area.
        report: Curves and images for a page; None without `details`.
        runtime: Where it ran.
    """

    artifact: str
    artifact_sha256: str | None
    precision: str
    input: Preprocess
    data: str
    split: str
    data_sha256: str
    unsettled: int
    invalid: int
    report: DetectionReport | None
    runtime: RuntimeInfo = flattened()


def evaluate_detector(
    path: str | os.PathLike[str],
    data: str,
    *,
    split: Literal["train", "test"] = "test",
    runtime: RuntimeConfig | None = None,
    stated: InputConfig | None = None,
    record: bool | None = None,
    details: bool = False,
    reporter: Reporter = reporter.DEFAULT,
) -> EvaluateDetectorResult:
    """Measure average precision by VOC's and COCO's rules.

    Args:
        path: A detector: checkpoint, ONNX file or plan.
        data: Images with boxes.
        split: Part of the data; COCO files are one part.
        runtime: Where the artifact runs.
        stated: Mean and std that replace the sidecar's.
        record: Whether the sidecar receives the result, which belongs to the artifact only with
            the sidecar's preprocessing. None: if possible, else a note says why not.
        details: Whether the result has a `report`.
        reporter: Receives progress and defects of the data.

    Returns:
        Average precision, with device and data.

    Raises:
        InputError: Not a detector, or data of other classes; `record` is True, and the result
            cannot be recorded.
        DataError: Broken annotations or images.
        ArtifactError: The file does not match its sidecar.
        UnavailableError: The device, the provider or a package is not available.
    """
    images = DetectionImages(data, split=split, need_boxes=True)
    images.report_invalid(reporter)
    source = images.boxes
    assert source is not None
    with load_artifact(path, runtime, stated=stated) as session:
        require_detector(session)
        detections = images.detect(session, reporter)
        accuracy = images.accuracy(detections)
        assert accuracy is not None
        result = EvaluateDetectorResult(
            artifact=os.fspath(path),
            artifact_sha256=session.sidecar.sha256 if session.sidecar else None,
            precision=session.precision, input=session.preprocess, data=data, split=split,
            data_sha256=source.fingerprint(), **vars(accuracy),
            unsettled=sum(entry.unsettled for entry in detections), invalid=len(source.invalid),
            report=_report(source, detections) if details else None, runtime=session.info,
        )  # fmt: skip
    if record is not False:
        record_average_precision(result, required=record is True, reporter=reporter)
    return result


def record_average_precision(
    result: EvaluateDetectorResult,
    *,
    required: bool = False,
    reporter: Reporter = reporter.DEFAULT,
) -> None:
    """Write a detector's average precision into its sidecar, or note why it is not written.

    Args:
        result: From `evaluate_detector`.
        required: Whether a result that cannot be recorded is an error.
        reporter: Receives the note.

    Raises:
        InputError: `required`, and there is no sidecar, it cannot be written, or another
            preprocessing than the sidecar's was used.
    """
    path, sidecar = result.artifact, artifacts.read_sidecar(result.artifact)
    own = sidecar is None or result.input == sidecar.input
    measured = result.record(result.data, result.split, result.data_sha256)
    write_measured(
        path,
        None if own else OTHER_PREPROCESSING,
        lambda: artifacts.update_measured(
            path, {"average_precision": measured}, sha256=result.artifact_sha256
        ),
        required=required,
        reporter=reporter,
    )


def _report(source: DetectionSource, detections: list[Detections]) -> DetectionReport:
    from rtresnet.detection import average_precision

    curves = []
    for label, name in enumerate(source.classes):
        recall, precision, objects = average_precision.voc_curve(source.targets, detections, label)
        if objects:
            values = tuple(float(value) for value in average_precision.envelope(recall, precision))
            curves.append(PrecisionRecallCurve(name=name, objects=objects, precision=values))
    images = [
        _reported(source, index, targets, entry)
        for index, (targets, entry) in enumerate(zip(source.targets, detections, strict=True))
    ]
    bad = [image for image in images if image.wrong or image.missed]
    bad.sort(key=lambda image: -len(image.wrong) - len(image.missed))
    return DetectionReport(
        curves=tuple(curves), samples=tuple(images[:LISTED]), worst=tuple(bad[:LISTED])
    )


def _reported(
    source: DetectionSource, index: int, targets: Targets, detections: Detections
) -> ReportedImage:
    from rtresnet.detection import average_precision

    missed, wrong = average_precision.errors(targets, detections)
    count = int((detections.scores >= SHOWN).sum())  # sorted by score
    right = [row for row in range(count) if row not in wrong]
    truth = Detections(
        boxes=targets.boxes, scores=np.ones(len(targets.labels), np.float32), labels=targets.labels
    )
    return ReportedImage(
        index=index,
        place=source.origins[index],
        correct=detected_objects(detections, source.classes, right),
        wrong=detected_objects(detections, source.classes, wrong),
        missed=detected_objects(truth, source.classes, missed),
    )


def pictures(result: EvaluateDetectorResult) -> dict[int, np.ndarray]:
    """Return the images of a report with boxes: correct green, wrong red, missed blue.

    Returns:
        uint8 [H, W, 3] by index.
    """
    from rtresnet.detection.data import open_detection

    assert result.report is not None
    source = open_detection(result.data, result.split)
    return {
        entry.index: with_boxes(
            source.read(entry.index), blue=entry.missed, green=entry.correct, red=entry.wrong
        )
        for entry in (*result.report.samples, *result.report.worst)
    }
