"""Which files are detectors, how one is loaded, and the images that it runs on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rtresnet.core import artifacts
from rtresnet.core.errors import ArtifactError, InputError

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.core.detector_preprocess import Detections
    from rtresnet.core.reporter import Reporter
    from rtresnet.detection.average_precision import DetectionAccuracy
    from rtresnet.detection.data import DetectionSource
    from rtresnet.runtime.session import Session
    from rtresnet.workflows.input_spec import InputConfig


def is_detector(path: str | os.PathLike[str]) -> bool:
    """Return whether an artifact is a detector, by its sidecar or else by the file itself."""
    try:
        sidecar = artifacts.read_sidecar(path)
    except ArtifactError:  # the step that loads the file reports it
        return False
    if sidecar is not None:
        return sidecar.detection is not None
    kind = artifacts.SUFFIXES.get(Path(path).suffix.lower())
    if not Path(path).is_file() or kind is None:
        return False
    if kind == "onnx":
        from rtresnet.onnxlib import io, metadata

        try:
            described = metadata.described(Path(path), io.load(path))
        except (InputError, ImportError):
            return False
        return described is not None and described.detection is not None
    if kind == "plan":
        from rtresnet.core import plan_info

        try:
            described = plan_info.described(Path(path))
        except ArtifactError:
            return False
        return described is not None and described.detection is not None
    return _is_detector_checkpoint(Path(path))


def _is_detector_checkpoint(path: Path) -> bool:
    import torch

    from rtresnet.detection import foreign

    if path.suffix.lower() != ".safetensors":
        try:
            payload: object = torch.load(path, map_location="meta", weights_only=True)
        except Exception:  # a broken file raises almost anything; loading it reports it
            return False
        if isinstance(payload, dict) and "rtresnet" in payload:
            return "detection" in payload
    return foreign.read_state(path) is not None


def load_checkpoint(path: Path, device: str) -> Session:
    """Load a detector's checkpoint in torch.

    Args:
        path: The file.
        device: "cpu" or "cuda".

    Raises:
        ArtifactError: It is broken, or its weights do not fit its net.
    """
    from rtresnet.detection import checkpoint
    from rtresnet.detection.backend import TorchDetector
    from rtresnet.runtime.session import Session

    loaded = checkpoint.load(path)
    net = checkpoint.build(loaded, name=os.fspath(path))
    return Session(
        path,
        artifacts.read_sidecar(path),
        TorchDetector(net.to(device)),
        input=loaded.input,
        classes=loaded.model.classes,
        precision="fp32",
        weights=loaded.weights.sha256,
        assumed=loaded.assumed,
        detection=loaded.detection,
    )


def require_detector(session: Session) -> None:
    """Raise InputError of a classifier."""
    if session.detection is None:
        raise InputError(
            f"{session.path}: is a classifier, but this command needs a detector",
            fix="train one with: rtresnet train --task detect",
        )


def require_classifier(path: str | os.PathLike[str], verb: str) -> None:
    """Raise InputError for a detector in a command for classifiers."""
    if is_detector(path):
        raise InputError(
            f"{path}: is a detector, but {verb} needs a classifier", fix=f"rtresnet bench {path}"
        )


def require_no_size(session: Session, stated: InputConfig) -> None:
    """Raise InputError if the side of the input is stated for a detector."""
    if session.detection is not None and stated.size is not None:
        raise InputError(
            f"{session.path}: a detector, which takes images of any size", fix="leave out --size"
        )


class DetectionImages:
    """Images for a detector by a source's name: with boxes, or any images.

    Args:
        spec: Images as on the command line.
        count: Largest number of images, evenly chosen; all by default.
        split: Part of a source with boxes.
        need_boxes: Whether a source without boxes is an error.

    Attributes:
        boxes: The source, if it has boxes.
        fingerprint: sha256 of the source.
        indices: The chosen images.

    Raises:
        DataError: Broken annotations, or no images.
        UnknownNameError: An unknown kind of source.
    """

    def __init__(
        self,
        spec: str,
        count: int | None = None,
        *,
        split: Literal["train", "test"] = "train",
        need_boxes: bool = False,
    ) -> None:
        from rtresnet.data.sources import open_images
        from rtresnet.detection.data import FORMS, open_detection

        self.boxes: DetectionSource | None = None
        self.read: Callable[[int], np.ndarray]
        self.place: Callable[[int], str]
        if need_boxes or spec.partition(":")[0] in {form.partition(":")[0] for form in FORMS}:
            boxes = self.boxes = open_detection(spec, split)
            self.read, self.place = boxes.read, boxes.origins.__getitem__
            total, self.fingerprint = len(boxes), boxes.fingerprint()
        else:
            source = open_images(spec)
            self.read, self.place = source.image, source.locate
            total, self.fingerprint = len(source), source.fingerprint()
        chosen = total if count is None else min(count, total)
        self.indices = [round(i * (total - 1) / max(chosen - 1, 1)) for i in range(chosen)]

    def __len__(self) -> int:
        return len(self.indices)

    def pixels(self) -> Iterator[np.ndarray]:
        """Return the chosen images, uint8 RGB [H, W, 3]."""
        from rtresnet.data.loader import prefetch_map

        return (image for _, image in prefetch_map(self.read, self.indices))

    def detect(self, session: Session, reporter: Reporter) -> list[Detections]:
        """Return the detections in each of the chosen images, with progress.

        Raises:
            InputError: The boxes are of other classes than the detector's.
        """
        if self.boxes is not None:
            require_classes(session, self.boxes.classes, self.boxes.name)
        detections: list[Detections] = []
        with reporter.progress(f"detecting with {session.path}", total=len(self)) as update:
            for image in self.pixels():
                detections.append(session.detect(image))
                update(completed=len(detections))
        return detections

    def accuracy(self, detections: Sequence[Detections]) -> DetectionAccuracy | None:
        """Average precision of the detections in the chosen images; None without boxes."""
        from rtresnet.detection import average_precision

        if self.boxes is None:
            return None
        targets = [self.boxes.targets[index] for index in self.indices]
        return average_precision.evaluate(targets, detections, self.boxes.classes)

    def report_invalid(self, reporter: Reporter) -> None:
        """Report the ignored boxes of the source."""
        from rtresnet.detection.data import report_invalid

        for line in report_invalid(self.boxes) if self.boxes is not None else ():
            reporter.note(line)


def require_classes(session: Session, classes: tuple[str, ...], data: str) -> None:
    """Raise InputError if the data's classes are not the detector's."""
    if session.classes != classes:
        missing = [name for name in classes if name not in session.classes]
        raise InputError(
            f"{data}: its classes are not those of {session.path.name}"
            + (f" ({missing[0]} is unknown)" if missing else ""),
            fix="use data with the classes that it was trained on",
        )
