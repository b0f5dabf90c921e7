"""Runs a detector over images and measures its average precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from rtresnet.core import detector_preprocess
from rtresnet.core.detector_preprocess import Detections
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Detection
from rtresnet.data.loader import prefetch_map
from rtresnet.detection import average_precision, net
from rtresnet.detection.average_precision import DetectionAccuracy
from rtresnet.detection.data import DetectionSource
from rtresnet.detection.net import Detector

Run = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
"""Images float32 [1, 3, H, W] and extent [1, 2] to the outputs of a detector by name."""


def torch_run(detector: Detector) -> Run:
    """Return a function that runs a net in torch, on the device of its weights."""
    import torch

    device = next(detector.parameters()).device

    def run(images: np.ndarray, extent: np.ndarray) -> dict[str, np.ndarray]:
        return net.detect(
            detector, torch.from_numpy(images).to(device), torch.from_numpy(extent).to(device)
        )

    return run


def detect_all(
    run: Run,
    source: DetectionSource,
    spec: Detection,
    preprocess: Preprocess,
) -> Iterator[Detections]:
    """Return the detections of each image, in the image's own coordinates.

    Args:
        run: What runs the detector.
        source: The images.
        spec: Their sizes on the canvas.
        preprocess: Mean and std.
    """

    def prepare(index: int) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
        image = source.read(index)
        return (image.shape[0], image.shape[1]), *detector_preprocess.to_canvas(
            image, spec, preprocess
        )

    for _, (size, images, extent) in prefetch_map(prepare, range(len(source))):
        yield detector_preprocess.from_outputs(run(images, extent), *size, extent)


def accuracy(
    run: Run,
    source: DetectionSource,
    spec: Detection,
    preprocess: Preprocess,
    progress: Callable[[int], None] = lambda done: None,
) -> DetectionAccuracy:
    """Average precision on all images of a source.

    Args:
        run: See `detect_all`.
        source: The same.
        spec: The same.
        preprocess: The same.
        progress: Called with the number of images done.
    """
    detections = []
    for done, entry in enumerate(detect_all(run, source, spec, preprocess), 1):
        detections.append(entry)
        progress(done)
    return average_precision.evaluate(source.targets, detections, source.classes)
