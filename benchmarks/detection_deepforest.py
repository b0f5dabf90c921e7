"""Trains a small detector on the annotated images of the package deepforest, and measures it there.

    pip download --no-deps deepforest==2.1.0 && unzip -q deepforest-*.whl 'deepforest/data/*'
    python benchmarks/detection_deepforest.py deepforest/data

A test of the machinery on photographs with many small boxes: the net must learn its training
images by heart. The average precision says nothing about other images. The four images with XML
files have 951 boxes of tree crowns; the largest is 2,299 x 2,472 pixels, so they are cut into tiles
of at most 400 pixels. A box of which a tile shows less than half is marked difficult there: it is
neither trained on nor counted. Half-width ResNet-18 from untrained weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
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
EPOCHS = 80
SETTINGS = (
    "shorter=512", "longer=640", "anchors=24,48,96", "pool=7", "width=0.25", "candidates=1000",
    "regions=300", "rpn_batch=256", "head_batch=64", "batch=4", "lr=0.02",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder deepforest/data of the package")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--keep", type=Path, help="folder for the trained net")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/detection_deepforest.json")
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiles = Path(folder) / "tiles"
        counts = cut_into_tiles(arguments.data, tiles)
        wall, cpu = time.perf_counter(), time.process_time()
        trained = overfit(
            tiles, arguments.keep or Path(folder) / "run", arguments.epochs, arguments.settings
        )
        seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    assert trained.measured is not None
    result = {
        "what": "quarter-width ResNet-18 Faster R-CNN, trained and measured on the same tiles of "
        "the annotated images of deepforest 2.1.0",
        "device": hardware.cpu(),
        "versions": hardware.versions(("rtresnet", "torch", "numpy")),
        "loaded": "other processes ran at the same time; cpu_s is this process's own time",
        **counts, "epochs": arguments.epochs, "settings": [*SETTINGS, *arguments.settings],
        "ap50": trained.measured.ap50, "voc07": trained.measured.voc07, "ap": trained.measured.ap,
        "classes": trained.measured.classes, **seconds,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def overfit(
    tiles: Path, out: Path, epochs: int = EPOCHS, settings: list[str] | None = None
) -> rtresnet.TrainDetectorResult:
    """Train a detector on tiles and test it on the same tiles."""
    return rtresnet.train_detector(
        rtresnet.TrainDetectorConfig(
            backbone="resnet18", data=f"voc:{tiles}", test_data=f"voc:{tiles}", out=out,
            recipe="scratch-detection", epochs=epochs, settings=(*SETTINGS, *(settings or ())),
        )
    )  # fmt: skip


def cut_into_tiles(data: Path, out: Path, side: int = TILE) -> dict[str, int]:
    """Write the annotated images as tiles of at most `side` pixels with VOC annotations.

    Returns:
        Number of images, boxes and tiles, and of the tiles' boxes that count and are difficult.
    """
    out.mkdir(parents=True)
    counts = dict.fromkeys(("images", "boxes", "tiles", "boxes_counted", "boxes_difficult"), 0)
    with tempfile.TemporaryDirectory() as folder:
        for file in data.glob("*.xml"):
            (Path(folder) / file.name).symlink_to(file.resolve())
            (Path(folder) / f"{file.stem}.png").symlink_to(file.with_suffix(".png").resolve())
        source = open_detection(f"voc:{folder}")
        for index in range(len(source)):
            height, width = source.read(index).shape[:2]
            counts["images"] += 1
            counts["boxes"] += len(source.targets[index].boxes)
            for top, bottom in _parts(height, side):
                for left, right in _parts(width, side):
                    name = f"{index}-{top}-{left}"
                    difficult = _write_tile(source, index, (left, top, right, bottom), out / name)
                    counts["tiles"] += 1
                    counts["boxes_difficult"] += sum(difficult)
                    counts["boxes_counted"] += len(difficult) - sum(difficult)
    return counts


def _parts(length: int, side: int) -> list[tuple[int, int]]:
    """Divide a length into equal parts of at most `side`."""
    number = math.ceil(length / side)
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
