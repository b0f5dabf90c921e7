"""Detection on the package deepforest's annotated images.

Skipped unless the package is installed, or RTRESNET_DEEPFOREST names the unpacked folder
deepforest/data of its wheel.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from rtresnet.core import detector_preprocess
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Detection
from rtresnet.detection.data import open_detection

OBJECTS = 951  # of four images, in deepforest 2.1.0


@pytest.fixture(scope="module")
def package_data() -> Path:
    """The package's folder of images and annotations."""
    folder = os.environ.get("RTRESNET_DEEPFOREST")
    package = importlib.util.find_spec("deepforest")  # imports nothing of it
    if folder is None and (package is None or package.origin is None):
        pytest.skip("deepforest is not installed")
    return Path(folder) if folder else Path(package.origin).parent / "data"  # type: ignore


@pytest.fixture(scope="module")
def annotated(package_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package's XML files and their images."""
    folder = tmp_path_factory.mktemp("deepforest")
    for file in package_data.glob("*.xml"):
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
        batch, extent = detector_preprocess.to_canvas(image, spec, Preprocess.for_size(224))
        scale = detector_preprocess.box_scale(height, width, extent)
        on_canvas = targets.boxes * scale
        assert (on_canvas[:, 2] <= batch.shape[3] + 1).all()
        assert (on_canvas[:, 3] <= batch.shape[2] + 1).all()
        assert np.allclose(on_canvas / scale, targets.boxes, atol=1e-2)


@pytest.mark.slow
def test_detector_overfits_the_annotated_images(
    package_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes on two CPU cores; the largest of the four images is left out."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import detection_deepforest as benchmark

    counts = benchmark.cut_into_tiles(package_data, tmp_path / "tiles", benchmark.LARGEST)
    assert counts == {
        "images": 3, "boxes": 377, "tiles": 14, "boxes_counted": 377, "boxes_difficult": 51,
    }  # fmt: skip
    epochs = benchmark.EPOCHS_WITHOUT_LARGEST
    trained = benchmark.overfit(tmp_path / "tiles", tmp_path / "run", epochs)
    sys.modules.pop("detection_deepforest")
    assert trained.measured is not None and trained.measured.ap50 is not None
    assert trained.measured.ap50 > 90
