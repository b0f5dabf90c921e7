"""A detector as a callable of rows, so that a `Batcher` can queue its images.

A row holds an image on its canvas and the height and width that it fills: float32 [3 * H * W + 2].
"""

from __future__ import annotations

import numpy as np

from rtresnet.core import detector_preprocess
from rtresnet.core.detector_preprocess import OUTPUTS, Detections
from rtresnet.core.errors import InputError
from rtresnet.runtime.session import Session


class DetectorRows:
    """Runs a detector on rows, one by one.

    Args:
        session: The session of a detector's file or plan.

    Attributes:
        session: The session.
        shape: Shape of an image on its canvas: (3, H, W).

    Raises:
        InputError: The provider does not run detectors, or the file is a checkpoint.
    """

    def __init__(self, session: Session) -> None:
        spec, run = session.detection, getattr(session.backend, "detect", None)
        if spec is None or run is None:
            raise InputError(f"{session.path}: {session.backend.provider} does not run detectors")
        if spec.canvas is None:
            raise InputError(
                f"{session.path}: a detector's checkpoint, which has no canvas of a fixed size",
                fix=f"make an ONNX file: rtresnet export --weights {session.path}",
            )
        self.session, self._spec, self._run = session, spec, run
        self.shape = (3, *spec.canvas)

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run rows [N, 3 * H * W + 2]; returns arrays [N, ...] in the order of `OUTPUTS`."""
        answers = [
            self._run(row[:-2].reshape(1, *self.shape), row[-2:].reshape(1, 2)) for row in rows
        ]
        return tuple(np.concatenate([answer[name] for answer in answers]) for name in OUTPUTS)

    def pack(self, images: np.ndarray, extent: np.ndarray) -> np.ndarray:
        """Return the rows of images float32 [N, 3, H, W] and their extents [N, 2].

        Raises:
            InputError: The number of extents is not that of the images, or one exceeds the canvas.
        """
        limits = np.array(self.shape[1:])
        if len(extent) != len(images) or not ((extent >= 1) & (extent <= limits)).all():
            raise InputError(
                f"extent: a height and width from 1 to {limits[0]}, {limits[1]} for each image "
                "are needed"
            )
        return np.concatenate([images.reshape(len(images), -1), extent], axis=1)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Return the row [1, ...] of an image uint8 RGB [H, W, 3] of any size."""
        return self.pack(*detector_preprocess.to_canvas(image, self._spec, self.session.preprocess))

    def detections(
        self, outputs: tuple[np.ndarray, ...], row: np.ndarray, height: int, width: int
    ) -> Detections:
        """Return one image's detections in its own coordinates.

        Args:
            outputs: The image's outputs, [1, ...] in the order of `OUTPUTS`.
            row: The row that `prepare` returned.
            height, width: Size of the image in pixels.
        """
        named = dict(zip(OUTPUTS, outputs, strict=True))
        return detector_preprocess.from_outputs(named, height, width, row.ravel()[-2:])

    def objects(self, detections: Detections, least_score: float) -> list[dict[str, object]]:
        """Return detections with at least a score as dicts for JSON: box, label and score."""
        return [
            {"box": box, "label": self.session.classes[label], "score": score}
            for box, label, score in zip(
                detections.boxes.tolist(),
                detections.labels.tolist(),
                detections.scores.tolist(),
                strict=True,
            )
            if score >= least_score
        ]
