"""Trains a small detector on the annotated images of the package deepforest, and measures it there.

    pip download --no-deps deepforest==2.1.0 && unzip -q deepforest-*.whl 'deepforest/data/*'
    python benchmarks/detection_deepforest.py deepforest/data [--without-largest]

A test of the machinery on photographs with many small boxes: the net must learn its training
images by heart. The average precision says nothing about other images. The four images with XML
files have 951 boxes of tree crowns. They are cut into tiles of at most 400 pixels, because they
differ in size: 400 x 400 to 2,299 x 2,472 pixels. A box is marked difficult in a tile that shows
less than half of it, and is neither trained on nor counted there. One image has all objects of two
of the three classes; its tile is repeated in the training images. Quarter-width ResNet-18 from
untrained weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

import rtresnet
from rtresnet.core import hardware
from rtresnet.detection.data import DetectionSource, open_detection

TILE = 400  # pixels, largest side
LARGEST = 2000  # pixels; --without-largest leaves out higher images
RARE, REPEATS = "Alive", 5
EPOCHS, EPOCHS_WITHOUT_LARGEST = 80, 160
SETTINGS = (
    "shorter=512", "longer=640", "anchors=24,48,96", "pool=7", "width=0.25", "candidates=1000",
    "regions=300", "rpn_batch=256", "head_batch=64", "batch=2", "lr=0.02", "flip=false",
    "weight_decay=0", "milestones=0.55,0.85",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder deepforest/data of the package")
    parser.add_argument("--without-largest", action="store_true", help="three of the four images")
    parser.add_argument("--epochs", type=int)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/detection_deepforest.json")
    )
    arguments = parser.parse_args()
    largest, epochs = (None, EPOCHS)
    if arguments.without_largest:
        largest, epochs = LARGEST, EPOCHS_WITHOUT_LARGEST
    epochs = arguments.epochs or epochs
    with tempfile.TemporaryDirectory() as folder:
        counts = cut_into_tiles(arguments.data, Path(folder) / "tiles", largest)
        wall, cpu = time.perf_counter(), time.process_time()
        trained = overfit(Path(folder) / "tiles", Path(folder) / "run", epochs)
        seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    assert trained.measured is not None
    result = {
        "what": "quarter-width ResNet-18 Faster R-CNN, trained and measured on the same tiles of "
        "annotated images of deepforest 2.1.0",
        "device": hardware.cpu(),
        "versions": hardware.versions(("rtresnet", "torch", "numpy")),
        "loaded": "other processes ran at the same time; cpu_s is this process's own time",
        **counts, "epochs": epochs, "settings": SETTINGS,
        "ap50": trained.measured.ap50, "voc07": trained.measured.voc07, "ap": trained.measured.ap,
        "classes": trained.measured.classes, **seconds,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def overfit(tiles: Path, out: Path, epochs: int) -> rtresnet.TrainDetectorResult:
    """Train a detector on tiles and test it on the same tiles.

    Args:
        tiles: From `cut_into_tiles`; the training images are a new folder next to it.
        out: Folder of the run.
        epochs: Length of the run.
    """
    images = tiles.with_name("training-tiles")
    shutil.copytree(tiles, images)
    for file in tiles.glob("*.xml"):
        if f"<name>{RARE}</name>" in file.read_text():
            for number in range(REPEATS):
                for path in (file, file.with_suffix(".png")):
                    shutil.copy(path, images / f"{file.stem}-{number}{path.suffix}")
    return rtresnet.train_detector(
        rtresnet.TrainDetectorConfig(
            backbone="resnet18", data=f"voc:{images}", test_data=f"voc:{tiles}", out=out,
            recipe="scratch-detection", epochs=epochs, settings=SETTINGS,
        )
    )  # fmt: skip


def cut_into_tiles(data: Path, out: Path, largest: int | None = None) -> dict[str, int]:
    """Write the annotated images as tiles with VOC annotations.

    Args:
        data: The package's folder of images and XML files.
        out: New folder of the tiles.
        largest: Height in pixels above which an image is left out.

    Returns:
        Number of images, boxes and tiles, and of the tiles' boxes that count and are difficult.
    """
    out.mkdir(parents=True)
    counts = dict.fromkeys(("images", "boxes", "tiles", "boxes_counted", "boxes_difficult"), 0)
    with tempfile.TemporaryDirectory() as folder:
        for file in data.glob("*.xml"):
            for path in (file, file.with_suffix(".png")):
                (Path(folder) / path.name).symlink_to(path.resolve())
        source = open_detection(f"voc:{folder}")
        for index, targets in enumerate(source.targets):
            height, width = source.read(index).shape[:2]
            if largest is not None and height > largest:
                continue
            counts["images"] += 1
            counts["boxes"] += len(targets.boxes)
            for (top, bottom), (left, right) in itertools.product(_parts(height), _parts(width)):
                path = out / f"{index}-{top}-{left}"
                difficult = _write_tile(source, index, (left, top, right, bottom), path)
                counts["tiles"] += 1
                counts["boxes_difficult"] += sum(difficult)
                counts["boxes_counted"] += len(difficult) - sum(difficult)
    return counts


def _parts(length: int) -> list[tuple[int, int]]:
    """Divide a length into equal parts of at most `TILE`."""
    number = math.ceil(length / TILE)
    edges = [round(part * length / number) for part in range(number + 1)]
    return list(itertools.pairwise(edges))


def _write_tile(
    source: DetectionSource, index: int, tile: tuple[int, int, int, int], path: Path
) -> list[bool]:
    """Write path.png and path.xml; return for each of its boxes whether it is difficult."""
    left, top, right, bottom = tile
    pixels = source.read(index)[top:bottom, left:right]
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{path.name}.png"
    targets, result = source.targets[index], []
    offset = np.array([left, top, left, top])
    for box, label in zip(targets.boxes, targets.labels, strict=True):
        cut = np.clip(box - offset, 0, [right - left, bottom - top] * 2).round().astype(int)
        sides = cut[2:] - cut[:2]
        if sides.min() <= 0:
            continue
        result.append(bool(sides.prod() < 0.5 * (box[2:] - box[:2]).prod()))
        entry = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(entry, "name").text = source.classes[label]
        ElementTree.SubElement(entry, "difficult").text = str(int(result[-1]))
        corners = ElementTree.SubElement(entry, "bndbox")
        # VOC counts pixels from 1 and includes the last one.
        values = (cut[0] + 1, cut[1] + 1, cut[2], cut[3])
        for name, value in zip(("xmin", "ymin", "xmax", "ymax"), values, strict=True):
            ElementTree.SubElement(corners, name).text = str(value)
    ElementTree.ElementTree(root).write(path.with_suffix(".xml"))
    return result


if __name__ == "__main__":
    main()
