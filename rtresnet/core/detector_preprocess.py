"""Resize an image onto a detector's input, and convert its boxes back to the image.

Used by training, evaluation, calibration and serving. Independent of files and nets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rtresnet.core.errors import InputError
from rtresnet.core.preprocess import Preprocess, resize
from rtresnet.core.sidecar import Detection

STRIDE = 16  # pixels between positions of the map that the regions are cut from

INPUTS = ("images", "extent")
OUTPUTS = ("boxes", "scores", "labels", "unsettled")
"""Names of a detector's inputs and outputs."""


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Detections in one image, sorted by descending score.

    Attributes:
        boxes: float32 [N, 4]: x1, y1, x2, y2 in the image's own pixels, continuous.
        scores: float32 [N], from 0 to 1.
        labels: int64 [N], indices of the classes.
        unsettled: Boxes for which non-maximum suppression may not have converged; 0 proves the
            result.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    unsettled: int = 0

    def __len__(self) -> int:
        return len(self.scores)


def resized_size(height: int, width: int, spec: Detection) -> tuple[int, int]:
    """Return the size that an image is resized to.

    The shorter side becomes `spec.shorter`, unless the longer one would be above `spec.longer` or
    the image larger than the canvas of the file.
    """
    scale = min(spec.shorter / min(height, width), spec.longer / max(height, width))
    if spec.canvas is not None:
        scale = min(scale, spec.canvas[0] / height, spec.canvas[1] / width)
    limits = spec.canvas or (1 << 30, 1 << 30)
    return tuple(
        min(max(1, round(side * scale)), limit)
        for side, limit in zip((height, width), limits, strict=True)
    )  # type: ignore[return-value]


def to_canvas(
    image: np.ndarray, spec: Detection, preprocess: Preprocess, *, flipped: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Resize and normalize an image, and pad it with the mean.

    Args:
        image: uint8 RGB [H, W, 3].
        spec: Sizes; without a canvas the sides are padded to multiples of 16.
        preprocess: Mean and std; its other fields do not apply to detectors.
        flipped: Whether to mirror the image.

    Returns:
        float32 [1, 3, height, width], and height and width of the image on it, float32 [1, 2].

    Raises:
        InputError: Anything but uint8 RGB.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(
            f"image is {image.dtype} {list(image.shape)}; expected uint8 RGB [H, W, 3]"
        )
    height, width = resized_size(image.shape[0], image.shape[1], spec)
    small = resize(image, height, width, preprocess.interpolation)
    if flipped:
        small = small[:, ::-1]
    rows, columns = spec.canvas or (-(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE)
    batch = np.zeros((1, 3, rows, columns), np.float32)
    batch[..., :height, :width] = preprocess.normalize(small[None])
    return batch, np.array([[height, width]], np.float32)


def box_scale(height: int, width: int, extent: np.ndarray) -> np.ndarray:
    """Return factors from coordinates in an image to coordinates on the canvas: float32 [4]."""
    y, x = extent.reshape(2) / (height, width)
    return np.array([x, y, x, y], np.float32)


def from_outputs(outputs: dict[str, np.ndarray], height: int, width: int, extent: np.ndarray
               ) -> Detections:  # fmt: skip
    """Convert the outputs of a net for one image to the image's own coordinates.

    Args:
        outputs: boxes [1, D, 4], scores [1, D], labels [1, D], unsettled [1].
        height: Height of the image.
        width: Width of the image.
        extent: Value returned by `to_canvas`.
    """
    valid = outputs["scores"][0] > 0
    return Detections(
        boxes=outputs["boxes"][0][valid] / box_scale(height, width, extent),
        scores=outputs["scores"][0][valid],
        labels=outputs["labels"][0][valid].astype(np.int64),
        unsettled=int(outputs["unsettled"].sum()),
    )
