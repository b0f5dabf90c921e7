"""Detect objects in image files, and draw the boxes on copies of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rtresnet.core import reporter
from rtresnet.core.detector_preprocess import Detections
from rtresnet.core.errors import DataError, InputError
from rtresnet.core.reporter import Reporter
from rtresnet.core.serialization import flattened
from rtresnet.runtime.session import RuntimeInfo, Session
from rtresnet.workflows.detect import require_detector
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig, load_artifact
from rtresnet.workflows.predict import all_broken, image_files

SHOWN = 0.5  # score from which a detection is listed and drawn


@dataclass(frozen=True, kw_only=True)
class DetectedObject:
    """One detection.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the image.
        label: Class name.
        score: From 0 to 1.
    """

    box: tuple[float, float, float, float]
    label: str
    score: float


@dataclass(frozen=True, kw_only=True)
class DetectedImage:
    """The detections in one image.

    Attributes:
        image: The file.
        objects: Its detections, the highest score first.
        drawn: A copy of the image with boxes; None if it was not requested.
        unsettled: Boxes for which non-maximum suppression may not have been finished.
    """

    image: str
    objects: tuple[DetectedObject, ...]
    drawn: Path | None
    unsettled: int


@dataclass(frozen=True, kw_only=True)
class DetectResult:
    """Detections in images.

    Attributes:
        artifact: What detected.
        images: The detections in each image that could be decoded.
        skipped: Errors of the other images.
        assumed: What was assumed of the artifact.
        runtime: Where it ran.
    """

    artifact: str
    images: tuple[DetectedImage, ...]
    skipped: tuple[str, ...]
    assumed: tuple[str, ...]
    runtime: RuntimeInfo = flattened()


def detect(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    artifact: str | os.PathLike[str],
    *,
    draw: str | os.PathLike[str] | None = None,
    least_score: float = SHOWN,
    runtime: RuntimeConfig | None = None,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> DetectResult:
    """Detect objects in image files.

    Args:
        images: Files or folders.
        artifact: A detector: checkpoint, ONNX file or plan.
        draw: Folder for copies of the images with boxes.
        least_score: Lowest score of returned detections.
        runtime: Where the artifact runs.
        stated: Preprocessing that replaces the sidecar's.
        reporter: Receives progress and broken images.

    Returns:
        Detections in each image.

    Raises:
        InputError: Not a detector.
        DataError: No images, or none that can be decoded.
        ArtifactError: The file does not match its sidecar.
        UnavailableError: The device, the provider or a package is not available.
    """
    from rtresnet.data.decode import decode

    files = image_files(images)
    folder = None if draw is None else Path(draw)
    if folder is not None:
        _require_other_folder(folder, files)
        folder.mkdir(parents=True, exist_ok=True)
    results: list[DetectedImage] = []
    skipped: list[str] = []
    names: set[str] = set()
    with load_artifact(artifact, runtime, stated=stated) as session:
        require_detector(session)
        with reporter.progress("detecting", total=len(files)) as update:
            for done, file in enumerate(files, 1):
                try:
                    pixels = decode(Path(file))
                except DataError as error:  # not an image, damaged, or not readable
                    skipped.append(str(error))
                    reporter.note(f"skipped {error}")
                else:
                    copy = None if folder is None else folder / _free_name(Path(file), names)
                    results.append(_detected(session, file, pixels, copy, least_score))
                update(completed=done)
        if not results:
            raise all_broken(files)
        return DetectResult(
            artifact=os.fspath(artifact), images=tuple(results), skipped=tuple(skipped),
            assumed=session.assumed, runtime=session.info,
        )  # fmt: skip


def _detected(
    session: Session, file: str, pixels: np.ndarray, copy: Path | None, least_score: float
) -> DetectedImage:
    """Detect objects in the image uint8 RGB [H, W, 3] of a file, and draw them on `copy`."""
    from rtresnet.detection.drawing import draw_boxes

    detections = session.detect(pixels)
    rows = np.flatnonzero(detections.scores >= least_score)
    objects = detected_objects(detections, session.classes, rows)
    if copy is not None:
        draw_boxes(pixels, [(o.box, o.label, o.score) for o in objects], copy)
    return DetectedImage(image=file, objects=objects, drawn=copy, unsettled=detections.unsettled)


def detected_objects(
    detections: Detections, classes: Sequence[str], rows: Iterable[int]
) -> tuple[DetectedObject, ...]:
    """Return some rows of an image's detections, for results."""
    return tuple(
        DetectedObject(
            box=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
            label=classes[int(detections.labels[row])],
            score=float(detections.scores[row]),
        )
        for row in rows
        for box in [detections.boxes[row]]
    )


def with_boxes(
    image: np.ndarray,
    *,
    blue: Iterable[DetectedObject],
    green: Iterable[DetectedObject],
    red: Iterable[DetectedObject],
) -> np.ndarray:
    """Return a copy of an image uint8 RGB [H, W, 3] with boxes and class names in three colours."""
    from rtresnet.detection.drawing import drawn

    groups = (("#2563eb", blue), ("#16a34a", green), ("#dc2626", red))
    return drawn(image, [(o.box, o.label, None, colour) for colour, group in groups for o in group])


def _require_other_folder(folder: Path, files: Sequence[str | os.PathLike[str]]) -> None:
    """Raise InputError if copies would replace the images themselves."""
    if any(Path(file).resolve().parent == folder.resolve() for file in files):
        raise InputError(
            f"{folder}: contains the input images, which the copies would overwrite",
            fix="choose another folder",
        )


def _free_name(file: Path, names: set[str]) -> str:
    """Return STEM.jpg, with a number if images of several folders have one name."""
    name, number = f"{file.stem}.jpg", 1
    while name in names:
        number += 1
        name = f"{file.stem}-{number}.jpg"
    names.add(name)
    return name
