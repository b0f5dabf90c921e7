"""The annotated images of the package deepforest, where it is installed; its data, not its code."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from rtresnet.core import canvas
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Detection
from rtresnet.detection.data import open_detection

OBJECTS = 951  # of four images, in deepforest 2.1.0


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package's XML files and their images."""
    found = importlib.util.find_spec("deepforest")  # imports nothing of it
    if found is None or found.origin is None:
        pytest.skip("deepforest is not installed")
    folder = tmp_path_factory.mktemp("deepforest")
    for file in (Path(found.origin).parent / "data").glob("*.xml"):
        image = file.with_suffix(".png")
        if image.is_file():
            for path in (file, image):
                shutil.copy(path, folder)
    return folder


def test_every_box_lies_in_its_image_and_survives_the_canvas(annotated: Path) -> None:
    source = open_detection(f"voc:{annotated}")
    assert len(source) == 4 and source.classes == ("Alive", "Dead", "Tree")
    assert sum(len(t.boxes) for t in source.targets) + len(source.invalid) == OBJECTS
    spec = Detection(canvas=(608, 1008))
    for index, targets in enumerate(source.targets):
        image = source.read(index)
        height, width = image.shape[:2]
        assert (targets.boxes >= 0).all()
        assert (targets.boxes <= np.array([width, height, width, height]) + 1).all()
        batch, extent = canvas.to_canvas(image, spec, Preprocess.for_size(224))
        scale = canvas.box_scale(height, width, extent)
        there = targets.boxes * scale
        assert (there[:, 2] <= batch.shape[3] + 1).all() and (
            there[:, 3] <= batch.shape[2] + 1
        ).all()
        assert np.allclose(there / scale, targets.boxes, atol=1e-2)
