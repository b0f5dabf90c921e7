"""Compare two detectors on the same images: average precision, and detections that differ."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rtresnet.core import reporter
from rtresnet.core.errors import InputError
from rtresnet.core.reporter import Reporter
from rtresnet.detection.average_precision import DetectionAccuracy
from rtresnet.workflows.compare import ComparedArtifact
from rtresnet.workflows.detect import DetectionImages, require_detector
from rtresnet.workflows.detect_predict import (
    SHOWN,
    DetectedObject,
    detected_objects,
    with_boxes,
)
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig, load_artifact

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.core.detector_preprocess import Detections
    from rtresnet.detection.agreement import Agreement

LISTED = 24  # images that a result lists


@dataclass(frozen=True, kw_only=True)
class ComparedDetector(ComparedArtifact):
    """One of two detectors.

    Attributes:
        artifact: The file.
        precision: Data type of the net.
        assumed: What was assumed of the file.
        detections: Detections with a score of 0.5 or more.
        unsettled: Boxes for which non-maximum suppression may not have been finished.
        accuracy: Average precision; None of images without boxes.
        runtime: Where it ran.
    """

    detections: int
    unsettled: int
    accuracy: DetectionAccuracy | None


@dataclass(frozen=True, kw_only=True)
class DifferingImage:
    """An image in which the detections differ.

    Attributes:
        index: Index in the data.
        place: Its file, or data set and index.
        both: Detections of both, as the reference has them.
        only_reference: Detections that the candidate lacks.
        only_candidate: Detections that the reference lacks.
    """

    index: int
    place: str
    both: tuple[DetectedObject, ...]
    only_reference: tuple[DetectedObject, ...]
    only_candidate: tuple[DetectedObject, ...]


@dataclass(frozen=True, kw_only=True)
class CompareDetectorsResult:
    """Result of `compare` for detectors: their agreement.

    Two detections are the same if they have one class and an IoU of 0.5 or more. Those with a
    score of 0.5 or more are counted.

    Attributes:
        n: Images compared.
        data: The images as they were named.
        split: The part of them that was used.
        data_sha256: Fingerprint of the images.
        both: Detections that both have.
        only_reference: Detections that the candidate lacks.
        only_candidate: Detections that the reference lacks.
        agreement: `both` as a share of all, in [0, 1]; 1 without detections.
        changed: Images in which detections differ.
        largest_score: Largest difference of the scores of `both`.
        largest_box: Largest difference of the coordinates of `both`, in pixels of the image.
        ap_change: The candidate's AP less the reference's, in points; None without objects.
        reference: The first detector.
        candidate: The second detector.
        images: Some of the images that differ, those with most differences first.
    """

    n: int
    data: str
    split: Literal["train", "test"]
    data_sha256: str
    both: int
    only_reference: int
    only_candidate: int
    agreement: float
    changed: int
    largest_score: float
    largest_box: float
    ap_change: float | None
    reference: ComparedDetector
    candidate: ComparedDetector
    images: tuple[DifferingImage, ...]


def compare_detectors(
    reference: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    data: str,
    *,
    split: Literal["train", "test"] = "test",
    runtime: RuntimeConfig | None = None,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> CompareDetectorsResult:
    """Run two detectors on the same images.

    Args:
        reference: A detector: checkpoint, ONNX file or plan.
        candidate: Another one of the same classes.
        data: Images with boxes, for average precision as well; or any images.
        split: Part of the data.
        runtime: Where the artifacts run.
        stated: Mean and std that replace the sidecars'.
        reporter: Receives progress and defects of the data.

    Returns:
        Average precision of both, and the detections that differ.

    Raises:
        InputError: Not a detector, or detectors or data of other classes.
        DataError: Broken annotations or images.
        ArtifactError: A file does not match its sidecar.
        UnavailableError: The device, the provider or a package is not available.
    """
    from rtresnet.detection.agreement import agree

    runtime = runtime or RuntimeConfig()
    names = [os.fspath(reference), os.fspath(candidate)]
    images = DetectionImages(data, split=split)
    images.report_invalid(reporter)
    about, results = [], []
    classes: tuple[str, ...] = ()
    for name in names:
        place = runtime.for_artifact(name, names)
        with load_artifact(name, place, stated=stated) as session:
            require_detector(session)
            classes = classes or session.classes
            if session.classes != classes:
                raise InputError(f"{name}: has different classes than {names[0]}")
            detections = images.detect(session, reporter)
            results.append(detections)
            about.append(
                ComparedDetector(
                    artifact=name, precision=session.precision, assumed=session.assumed,
                    detections=sum(int((d.scores >= SHOWN).sum()) for d in detections),
                    unsettled=sum(d.unsettled for d in detections),
                    accuracy=images.accuracy(detections), runtime=session.info,
                )
            )  # fmt: skip
    pairs = [agree(one, other) for one, other in zip(*results, strict=True)]
    both, first, second = (
        sum(len(getattr(pair, field)) for pair in pairs) for field in ("both", "first", "second")
    )
    total = both + first + second
    listed = [index for index, pair in enumerate(pairs) if pair.different]
    listed.sort(key=lambda index: -pairs[index].different)
    return CompareDetectorsResult(
        n=len(images), data=data, split=split, data_sha256=images.fingerprint,
        both=both, only_reference=first, only_candidate=second,
        agreement=both / total if total else 1.0,
        changed=len(listed),
        largest_score=max(pair.score for pair in pairs),
        largest_box=max(pair.box for pair in pairs),
        ap_change=_change(*(entry.accuracy for entry in about)),
        reference=about[0], candidate=about[1],
        images=tuple(
            _differing(images, index, pairs[index], results[0][index], results[1][index], classes)
            for index in listed[:LISTED]
        ),
    )  # fmt: skip


def _change(reference: DetectionAccuracy | None, candidate: DetectionAccuracy | None
            ) -> float | None:  # fmt: skip
    if reference is None or candidate is None or reference.ap is None or candidate.ap is None:
        return None
    return candidate.ap - reference.ap


def _differing(
    images: DetectionImages,
    index: int,
    pair: Agreement,
    reference: Detections,
    candidate: Detections,
    classes: tuple[str, ...],
) -> DifferingImage:
    return DifferingImage(
        index=index,
        place=images.place(index),
        both=detected_objects(reference, classes, rows=[row for row, _ in pair.both]),
        only_reference=detected_objects(reference, classes, rows=pair.first),
        only_candidate=detected_objects(candidate, classes, rows=pair.second),
    )


def pictures(result: CompareDetectorsResult) -> dict[int, np.ndarray]:
    """Return the listed images with boxes: green of both, blue of the reference, red of the other.

    Returns:
        uint8 [H, W, 3] by index.
    """
    images = DetectionImages(result.data, split=result.split)
    return {
        entry.index: with_boxes(
            images.read(entry.index),
            blue=entry.only_reference, green=entry.both, red=entry.only_candidate,
        )
        for entry in result.images
    }  # fmt: skip
