"""Resizing onto a detector's canvas, and back."""

from __future__ import annotations

import numpy as np
import pytest

from rtresnet.core import detector_preprocess
from rtresnet.core.errors import InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Detection

PREPROCESS = Preprocess.for_size(32)


@pytest.mark.parametrize(
    ("size", "spec", "expected"),
    [
        ((375, 500), Detection(), (600, 800)),
        ((333, 1000), Detection(), (333, 1000)),  # the longer side is at its limit
        ((500, 375), Detection(canvas=(608, 1008)), (608, 456)),  # the canvas limits the height
        ((1, 4000), Detection(), (1, 1000)),
    ],
)
def test_resized_size(size: tuple[int, int], spec: Detection, expected: tuple[int, int]) -> None:
    assert detector_preprocess.resized_size(*size, spec) == expected


def test_to_canvas_pads_with_the_mean_and_gives_the_extent() -> None:
    image = np.full((30, 40, 3), 255, np.uint8)
    batch, extent = detector_preprocess.to_canvas(
        image, Detection(shorter=60, longer=200), PREPROCESS
    )
    assert batch.shape == (1, 3, 64, 80) and extent.tolist() == [[60, 80]]
    assert (batch[..., :60, :] > 2).all() and (batch[..., 60:, :] == 0).all()


def test_to_canvas_flipped_mirrors_the_image_only() -> None:
    image = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    spec = Detection(shorter=30, longer=40, canvas=(32, 48))
    plain, _ = detector_preprocess.to_canvas(image, spec, PREPROCESS)
    flipped, extent = detector_preprocess.to_canvas(image, spec, PREPROCESS, flipped=True)
    assert extent.tolist() == [[30, 40]]
    assert np.array_equal(flipped[..., :30, :40], plain[..., :30, 39::-1])
    assert (flipped[..., 40:] == 0).all()


def test_from_outputs_is_in_the_images_own_coordinates() -> None:
    spec = Detection(shorter=60, longer=200)
    _, extent = detector_preprocess.to_canvas(np.zeros((30, 40, 3), np.uint8), spec, PREPROCESS)
    outputs = {
        "boxes": np.array([[[0, 10, 80, 60], [0, 0, 0, 0]]], np.float32),
        "scores": np.array([[0.9, 0]], np.float32),
        "labels": np.array([[3, -1]]),
        "unsettled": np.array([2.0], np.float32),
    }
    detections = detector_preprocess.from_outputs(outputs, 30, 40, extent)
    assert detections.boxes.tolist() == [[0, 5, 40, 30]]
    assert detections.labels.tolist() == [3] and len(detections) == 1
    assert detections.unsettled == 2


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 4), (4, 4, 4)])
def test_to_canvas_other_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        detector_preprocess.to_canvas(np.zeros(shape, np.uint8), Detection(), PREPROCESS)
