"""Images with boxes by name, and their defects.

    shapes:N            N drawn images of circles, squares and triangles that overlap; no files
    voc:DIR[:SPLIT]     PASCAL VOC: Annotations, JPEGImages and ImageSets/Main, or XML files only
    coco:JSON:IMAGES    COCO: one annotation file, and the folder of its images

Several are joined with commas. Boxes are (x1, y1, x2, y2) in continuous pixels: VOC's inclusive
1-based corners (1, 1, 3, 3) become (0, 0, 3, 3), COCO's x, y, width, height become corners.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from rtresnet.core import serialization
from rtresnet.core.errors import DataError, InputError, UnknownNameError
from rtresnet.data.decode import decode
from rtresnet.data.sources import IMAGE_SUFFIXES

FORMS = ("shapes:N", "voc:DIR[:SPLIT]", "coco:JSON:IMAGES")
SHAPES = ("circle", "square", "triangle")
SHAPES_SIDE = 128
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
VOC_FIX = (
    "name a folder with XML files, or with Annotations and JPEGImages, as in voc:VOCdevkit/VOC2007"
)
COCO_FIX = (
    "name the annotations and the folder of their images, as in "
    "coco:annotations/instances_val2017.json:val2017"
)
LISTED = 10  # invalid boxes that an error or a note names


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The boxes of one image.

    Attributes:
        boxes: float32 [N, 4].
        labels: int64 [N].
        ignored: bool [N]: difficult (VOC) or crowd (COCO), neither trained on nor counted.
        crowd: bool [N]: a group, that any number of detections may lie in.
        areas: float64 [N]: COCO's own, else of the boxes.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[float], int, bool, bool, float | None]]) -> Targets:
        """Build it from (box, label, ignored, crowd, area or None) for each object."""
        boxes = np.array([row[0] for row in rows], np.float32).reshape(-1, 4)
        areas = [
            a if row[4] is None else row[4] for row, a in zip(rows, box_areas(boxes), strict=True)
        ]
        return cls(
            boxes=boxes,
            labels=np.array([row[1] for row in rows], np.int64),
            ignored=np.array([row[2] for row in rows], bool),
            crowd=np.array([row[3] for row in rows], bool),
            areas=np.array(areas, np.float64),
        )


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """Return the areas of boxes [N, 4] in square pixels: float64 [N]."""
    areas: np.ndarray = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64).prod(1)
    return areas


@dataclass(frozen=True, kw_only=True)
class DetectionSource:
    """Images with boxes.

    Attributes:
        name: Name as on the command line.
        classes: Class names in the order of the labels.
        targets: The boxes of each image.
        read: The pixels of an image by its index, uint8 RGB [H, W, 3].
        origins: Where each image is, for messages.
        invalid: What is wrong with the boxes that were left out, a line each.
        splits: Whether the data has a test split.
        digest: sha256 of the sizes of the image files, or of the way shapes are drawn.
    """

    name: str
    classes: tuple[str, ...]
    targets: tuple[Targets, ...]
    read: Callable[[int], np.ndarray]
    origins: tuple[str, ...]
    invalid: tuple[str, ...] = ()
    splits: bool = False
    digest: str = ""

    def __len__(self) -> int:
        return len(self.targets)

    def fingerprint(self) -> str:
        """Return a sha256 of names and sizes of the image files, and of all boxes.

        Flags and areas count only where they are not the default, so that data without them keeps
        the hash that earlier versions recorded.
        """
        digest = hashlib.sha256(json.dumps([self.classes, self.digest]).encode())
        for origin, targets in zip(self.origins, self.targets, strict=True):
            digest.update(origin.rpartition("/")[2].encode())
            digest.update(targets.boxes.tobytes() + targets.labels.tobytes())
            if targets.ignored.any() or targets.crowd.any():
                digest.update(targets.ignored.tobytes() + targets.crowd.tobytes())
            if not np.array_equal(targets.areas, box_areas(targets.boxes)):
                digest.update(targets.areas.tobytes())
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """Return the number of boxes of each class."""
        counts = Counter(int(label) for t in self.targets for label in t.labels)
        return {name: counts[index] for index, name in enumerate(self.classes)}


def open_detection(spec: str, split: str = "train") -> DetectionSource:
    """Open images with boxes.

    Args:
        spec: One of FORMS, or several joined with commas.
        split: "train" or "test". COCO's files are one split each: either gives the whole file.

    Raises:
        DataError: Missing or broken files, or sources with different classes.
        UnknownNameError: An unknown kind of source.
    """
    parts = [_open(part, split) for part in spec.split(",")]
    if len(parts) == 1:
        return parts[0]
    if len({part.classes for part in parts}) > 1:
        raise DataError(f"{spec}: the sources have different classes")
    owner = [(part, index) for part in parts for index in range(len(part))]

    def read(index: int) -> np.ndarray:
        part, inner = owner[index]
        return part.read(inner)

    return DetectionSource(
        name=spec,
        classes=parts[0].classes,
        targets=tuple(t for part in parts for t in part.targets),
        read=read,
        origins=tuple(origin for part in parts for origin in part.origins),
        invalid=tuple(line for part in parts for line in part.invalid),
        splits=all(part.splits for part in parts),
        digest=" ".join(part.digest for part in parts),
    )


def _open(spec: str, split: str) -> DetectionSource:
    form, _, argument = spec.partition(":")
    if form == "shapes" and argument:
        return _shapes(spec, argument, split)
    if form == "voc" and argument:
        return _voc(spec, argument, split)
    if form == "coco" and argument:
        return _coco(spec, argument)
    raise UnknownNameError("detection data", spec, FORMS)


def _shapes(spec: str, argument: str, split: str) -> DetectionSource:
    if not argument.isdecimal() or int(argument) < 1:
        raise InputError(f"{spec}: needs a number of images", fix="as in shapes:400")
    # The test images are the same for every N, and none of the training images.
    count = int(argument) if split == "train" else min(int(argument), 100)
    drawn = [_drawing(split, index) for index in range(count)]
    return DetectionSource(
        name=spec, classes=SHAPES, targets=tuple(targets for _, targets in drawn),
        read=lambda index: drawn[index][0],
        origins=tuple(f"{spec}: {split} image {index}" for index in range(count)),
        splits=True, digest=f"{split} {SHAPES_SIDE}",
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _drawing(split: str, index: int) -> tuple[np.ndarray, Targets]:
    """Draw one to four shapes on noise; a later one covers at most 40 % of an earlier one."""
    rng = np.random.default_rng([index, split == "train"])
    side = SHAPES_SIDE
    y, x = np.mgrid[0:side, 0:side] + 0.5
    image = rng.integers(60, 140, (1, 1, 3)) + rng.normal(0, 12, (side, side, 3))
    owner = np.full((side, side), -1)
    masks: list[np.ndarray] = []
    rows: list[tuple[Sequence[float], int, bool, bool, float | None]] = []
    for _ in range(int(rng.integers(1, 5))):
        half = float(rng.uniform(10, 32))
        cx, cy = rng.uniform(half, side - half, 2)
        kind = int(rng.integers(3))
        dx, dy = np.abs(x - cx), y - cy
        mask = (
            dx**2 + dy**2 <= half**2
            if kind == 0
            else (dx <= half) & (np.abs(dy) <= half)
            if kind == 1
            else (np.abs(dy) <= half) & (dx <= (dy + half) / 2)
        )
        visible = owner.copy()
        visible[mask] = len(masks)
        if any(((visible == i) & old).sum() < 0.6 * old.sum() for i, old in enumerate(masks)):
            continue
        owner = visible
        masks.append(mask)
        colour = rng.integers(0, 256, 3)
        image[mask] = colour + rng.normal(0, 12, (int(mask.sum()), 3))
        columns, lines = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        box = (columns[0], lines[0], columns[-1] + 1, lines[-1] + 1)
        rows.append((box, kind, False, False, None))
    return np.clip(image, 0, 255).astype(np.uint8), Targets.of(rows)


def _usable(box: Sequence[float], where: str, invalid: list[str]) -> bool:
    """Return whether a box is finite and has an area; appends a line to `invalid` otherwise."""
    if all(map(math.isfinite, box)) and box[2] > box[0] and box[3] > box[1]:
        return True
    invalid.append(f"{where}: box {', '.join(f'{value:g}' for value in box)} has no area")
    return False


def _voc(spec: str, argument: str, split: str) -> DetectionSource:
    folder, _, named = argument.rpartition(":")
    root = Path(folder or named).expanduser()
    chosen = named if folder else ""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder", fix=VOC_FIX)
    lists = root / "ImageSets" / "Main"
    annotations = root / "Annotations" if (root / "Annotations").is_dir() else root
    files = {path.stem: path for path in sorted(annotations.rglob("*.xml"))}
    if not files:
        raise DataError(f"{root}: no annotations (*.xml)", fix=VOC_FIX)
    has_splits = not chosen and lists.is_dir()
    if has_splits:
        list_names = ("trainval", "train") if split == "train" else ("test", "val")
        chosen = next((name for name in list_names if (lists / f"{name}.txt").is_file()), "")
        if not chosen:
            raise DataError(
                f"{lists}: no {' and no '.join(f'{name}.txt' for name in list_names)}",
                fix=f"name a list of images, as in voc:{root}:LIST for LIST.txt",
            )
    stems = list(files)
    if chosen:
        try:
            text = (lists / f"{chosen}.txt").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{lists / f'{chosen}.txt'}: cannot be read ({error})") from None
        stems = [line.split()[0] for line in text.splitlines() if line.split()]
        missing = [stem for stem in stems if stem not in files]
        if missing:
            raise DataError(f"{annotations}: {missing[0]}.xml is listed but missing")
    # The classes are those of all splits, so that they do not depend on the split.
    parsed = {stem: _voc_objects(files[stem]) for stem in stems}
    for stem in files.keys() - parsed.keys():
        with contextlib.suppress(DataError):  # reported where its own split is opened
            parsed[stem] = _voc_objects(files[stem])
    names = {name for _, objects in parsed.values() for name, *_ in objects}
    classes = VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))
    numbers = {name: index for index, name in enumerate(classes)}
    invalid: list[str] = []
    targets = tuple(
        Targets.of(
            [
                (box, numbers[name], difficult, False, None)
                for name, difficult, box in parsed[stem][1]
                if _usable(box, str(files[stem]), invalid)
            ]
        )
        for stem in stems
    )
    paths = [_voc_image(root, files[stem], parsed[stem][0]) for stem in stems]
    return _from_files(spec, classes, targets, paths, invalid, splits=has_splits)


def _voc_objects(path: Path) -> tuple[str, list[tuple[str, bool, tuple[float, ...]]]]:
    """Return an annotation's file name, and name, difficult flag and box of each object."""
    try:
        tree = ElementTree.parse(path).getroot()
        objects: list[tuple[str, bool, tuple[float, ...]]] = []
        for entry in tree.iter("object"):
            corners = entry.find("bndbox")
            name = entry.findtext("name")
            if corners is None or name is None:
                raise ValueError("an object without a name or a box")
            low_x, low_y, high_x, high_y = (
                float(corners.findtext(key) or "nan") for key in ("xmin", "ymin", "xmax", "ymax")
            )
            difficult = (entry.findtext("difficult") or "0").strip() == "1"
            objects.append((name.strip(), difficult, (low_x - 1, low_y - 1, high_x, high_y)))
        return (tree.findtext("filename") or "").strip(), objects
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise DataError(f"{path}: not a VOC annotation ({error})") from None


def _voc_image(root: Path, annotation: Path, stated: str) -> Path:
    """Return the image of an annotation: by its stem, or by the name that it states."""
    folders = (root / "JPEGImages", annotation.parent)
    names = [f"{annotation.stem}{suffix}" for suffix in IMAGE_SUFFIXES]
    names.append(Path(stated).name or names[0])
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise DataError(
        f"{annotation}: no image {annotation.stem}.*",
        fix=f"put the image into {folders[0]} or next to its XML file",
    )


def _coco(spec: str, argument: str) -> DetectionSource:
    file, _, folder = argument.rpartition(":")
    if not file:
        raise InputError(f"{spec}: needs a file and a folder", fix=COCO_FIX)
    path, root = Path(file).expanduser(), Path(folder).expanduser()
    try:
        data = serialization.load(path, error=DataError)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", fix=COCO_FIX) from None
    if not root.is_dir():
        raise DataError(f"{root}: no such folder", fix=COCO_FIX)
    try:
        categories = sorted(data["categories"], key=lambda entry: entry["id"])
        numbers = {entry["id"]: index for index, entry in enumerate(categories)}
        images = {entry["id"]: str(entry["file_name"]) for entry in data["images"]}
        invalid: list[str] = []
        rows: dict[Any, list[Any]] = {key: [] for key in images}
        for entry in data.get("annotations", []):
            x, y, width, height = entry["bbox"]
            box, crowd = (x, y, x + width, y + height), bool(entry.get("iscrowd", 0))
            if _usable(box, f"{path}: annotation {entry.get('id')}", invalid):
                row = (box, numbers[entry["category_id"]], crowd, crowd, entry.get("area"))
                rows[entry["image_id"]].append(row)
        classes = tuple(str(entry["name"]) for entry in categories)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a COCO annotation file ({error!r})") from None
    targets = tuple(Targets.of(rows[key]) for key in images)
    return _from_files(spec, classes, targets, [root / name for name in images.values()], invalid)


def _from_files(
    spec: str,
    classes: Sequence[str],
    targets: tuple[Targets, ...],
    paths: Sequence[Path],
    invalid: Sequence[str],
    *,
    splits: bool = False,
) -> DetectionSource:
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"{missing}: named by the annotations but missing")
    if not paths:
        raise DataError(f"{spec}: no images")
    return DetectionSource(
        name=spec, classes=tuple(classes), targets=targets, read=lambda i: decode(paths[i]),
        origins=tuple(map(str, paths)), invalid=tuple(invalid), splits=splits,
        digest=" ".join(str(path.stat().st_size) for path in paths),
    )  # fmt: skip


def report_invalid(source: DetectionSource) -> Iterator[str]:
    """Return lines that list the first invalid boxes and count the others."""
    yield from source.invalid[:LISTED]
    if len(source.invalid) > LISTED:
        yield f"and {len(source.invalid) - LISTED} more boxes without an area; they are left out"
