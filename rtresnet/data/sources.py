"""Data sets by name, the same names for every command.

    digits              8x8 scans that scikit-learn ships, resized to 32x32; no network
    fashion-mnist:DIR   idx files, plain or .gz
    cifar10:DIR         the Python batches
    folder:DIR          one folder per class, optionally under train/ and test/ or val/
    DIR                 the same
    shards:DIR          a folder that `rtresnet pack` wrote
    run:DIR             the test images that a run held out of a data set without test images
    npz:FILE            arrays `images` uint8 [N, H, W, 3] or [N, H, W], `labels` [N]
    synthetic:N         N random images, for measurements without data

Images are uint8 RGB, transparent ones composited on white (`decode.py`). `core/preprocess.py`
resizes, crops and normalizes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from rtresnet.core.errors import DataError, InputError, UnknownNameError
from rtresnet.core.labels import LabelMap, match
from rtresnet.core.reporter import plural
from rtresnet.data import FORMS
from rtresnet.data.decode import FileEnds, decode
from rtresnet.data.formats import read_cifar10, read_digits, read_fashion_mnist, read_npz
from rtresnet.data.held_out import SPLIT_FILE, read_held_out
from rtresnet.data.shards import Shards, files_fingerprint

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm",
    ".avif", ".heic", ".heif",
)  # fmt: skip
UNREADABLE_SUFFIXES = (
    ".jxl", ".jp2", ".tga", ".psd", ".svg", ".pgm", ".pbm", ".pnm", ".dng", ".cr2", ".cr3", ".nef",
    ".arw", ".raf", ".orf", ".rw2", ".raw",
)  # fmt: skip
NAMED_FILES = 3  # ignored files that a note names
MAX_CLASSES = 1_000_000  # arrays without class names: a larger label is an error
SPLITS = ("train", "test", "all")


class Source(Protocol):
    """A set of images.

    Attributes:
        name: As the user wrote it.
        classes: Class names, in the order of the labels.
        labels: int64 [N]; -1 for images without a label.
        splits: Whether the set has its own train and test splits.
        named: Whether `classes` are names; False if they are numbers.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    splits: bool
    named: bool

    def __len__(self) -> int: ...

    def image(self, index: int, at_least: int | None = None) -> np.ndarray:
        """Decode an image to uint8 RGB [H, W, 3].

        Args:
            index: Index of the image.
            at_least: Required shorter side, in pixels; the result may be smaller than the
                file, but not smaller than this.

        Raises:
            CorruptImage: It cannot be decoded.
        """
        ...

    def ends(self, index: int) -> FileEnds:
        """Read size, beginning and end of an image as it is stored. Raises DataError."""
        ...

    def content(self, index: int) -> bytes:
        """Read an image as it is stored: its file, or its pixels. Raises DataError."""
        ...

    def locate(self, index: int) -> str:
        """Return the place of an image, for messages."""
        ...

    def fingerprint(self) -> str:
        """Return a sha256 that identifies images and labels."""
        ...


class Arrays:
    """Images of one size in memory: uint8 [N, H, W, 3]."""

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str],
        *,
        splits: bool = False,
        named: bool = True,
    ) -> None:
        self.name, self.images, self.classes, self.splits = name, images, tuple(classes), splits
        self.labels, self.named = labels.astype(np.int64), named

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int, at_least: int | None = None) -> np.ndarray:
        picture: np.ndarray = self.images[index]
        return picture

    def ends(self, index: int) -> FileEnds:
        return FileEnds.of(self.content(index))

    def content(self, index: int) -> bytes:
        pixels: bytes = self.images[index].tobytes()
        return pixels

    def locate(self, index: int) -> str:
        return f"{self.name}: image {index}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


class Files:
    """Image files, decoded on demand.

    Attributes:
        ignored: Reason to the files that look like images and are not read.
    """

    named = True

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        labels: np.ndarray,
        classes: Sequence[str],
        *,
        splits: bool = False,
        ignored: Mapping[str, Sequence[Path]] | None = None,
    ) -> None:
        self.name, self.paths, self.classes, self.splits = name, list(paths), tuple(classes), splits
        self.labels, self.ignored = labels.astype(np.int64), ignored or {}

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int, at_least: int | None = None) -> np.ndarray:
        return decode(self.paths[index], at_least=at_least)

    def ends(self, index: int) -> FileEnds:
        try:
            with open(self.paths[index], "rb", buffering=0) as file:
                descriptor = file.fileno()
                size = os.fstat(descriptor).st_size
                return FileEnds.read(size, lambda n, start: os.pread(descriptor, n, start))
        except OSError as error:
            raise DataError(f"{self.paths[index]}: {error.strerror}") from None

    def content(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise DataError(f"{self.paths[index]}: {error.strerror}") from None

    def locate(self, index: int) -> str:
        return str(self.paths[index])

    def fingerprint(self) -> str:
        """Hash names, sizes and labels, because reading ImageNet's contents takes an hour."""
        names = (os.fsencode(f"{path.parent.name}/{path.name}") for path in self.paths)
        return files_fingerprint(names, map(_size, self.paths), self.labels)


class Subset:
    """Some of a source's images, in a given order. Base of all sources that read another one.

    Args:
        source: The complete data set.
        chosen: Indices in it; None takes all.
        name: The source's by default.
    """

    def __init__(
        self, source: Source, chosen: np.ndarray | None = None, name: str | None = None
    ) -> None:
        self.source = source
        self.chosen = np.arange(len(source)) if chosen is None else chosen
        self.name = source.name if name is None else name
        self.classes, self.splits = source.classes, source.splits
        self.labels, self.named = source.labels[self.chosen], source.named

    def __len__(self) -> int:
        return len(self.chosen)

    def image(self, index: int, at_least: int | None = None) -> np.ndarray:
        return self.source.image(int(self.chosen[index]), at_least)

    def holds(self, index: int, at_least: int | None = None) -> bool:
        """Return whether a cache in this or a wrapped source has the pixels of `image`."""
        inner = self.source
        return isinstance(inner, Subset) and inner.holds(int(self.chosen[index]), at_least)

    def ends(self, index: int) -> FileEnds:
        return self.source.ends(int(self.chosen[index]))

    def content(self, index: int) -> bytes:
        return self.source.content(int(self.chosen[index]))

    def locate(self, index: int) -> str:
        return self.source.locate(int(self.chosen[index]))

    def fingerprint(self) -> str:
        """Hash the source's fingerprint and the chosen indices."""
        own = self.source.fingerprint().encode() + self.chosen.tobytes()
        return hashlib.sha256(own).hexdigest()


class Relabelled(Subset):
    """All images of a source, labelled with a model's class numbers.

    Args:
        source: The images.
        mapping: From the source's labels to the model's classes.
        classes: The model's class names.
    """

    def __init__(self, source: Source, mapping: LabelMap, classes: Sequence[str]) -> None:
        super().__init__(source)
        self.mapping, self.classes, self.named = mapping, tuple(classes), True
        self.labels = mapping.apply(source.labels)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def for_model(
    source: Source,
    classes: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    model_name: str = "the model",
) -> Relabelled:
    """Label a source with a model's class numbers; see `labels.match`.

    Raises:
        DataError: The labels do not match the model's classes.
    """
    mapping = match(
        classes, source.classes, data_named=source.named, names=names,
        model_name=model_name, data_name=source.name,
    )  # fmt: skip
    return Relabelled(source, mapping, classes)


def open_source(spec: str, split: str = "all") -> Source:
    """Open labelled images by name.

    Args:
        spec: One of FORMS, or a path to a folder.
        split: "train", "test" or "all". A set without splits is opened in full for each of them;
            see `Source.splits`.

    Raises:
        DataError: There is no data, a class is empty, there is only one class, or arrays do not
            match.
        UnknownNameError: The form is unknown.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    form, _, argument = spec.partition(":")
    if spec == "digits":
        return _arrays(spec, *read_digits(split), splits=True)
    if form == "fashion-mnist" and argument:
        return _arrays(spec, *read_fashion_mnist(_folder(argument), split), splits=True)
    if form == "cifar10" and argument:
        return _arrays(spec, *read_cifar10(_folder(argument), split), splits=True)
    if form == "npz" and argument:
        images, labels, names = read_npz(Path(argument))
        count = int(labels.max()) + 1 if labels.size and labels.dtype.kind in "iu" else 0
        numbers = [str(index) for index in range(min(count, MAX_CLASSES))]
        return _arrays(spec, images, labels, names or numbers, named=bool(names))
    if form == "synthetic" and argument:
        return _synthetic(spec, argument)
    if form == "shards" and argument:
        return Shards(spec, _folder(argument), split)
    if form == "run" and argument:
        return _held_out(spec, _folder(argument), split)
    if form == "folder" and argument:
        return _class_folders(spec, _folder(argument), split)
    if spec and Path(spec).is_dir():
        return _class_folders(spec, Path(spec), split)
    if form in ("voc", "coco", "shapes") and argument:
        raise InputError(
            f"{spec}: a detection data set, but this command needs a classification data set",
            fix="train one with: rtresnet train --task detect --data " + spec,
        )
    if os.sep in spec or (form == spec and Path(spec).suffix):
        raise DataError(f"{spec}: no such folder", fix="data is one of " + ", ".join(FORMS))
    raise UnknownNameError("folder or data set" if form == spec else "data", spec, FORMS)


def open_images(spec: str) -> Source:
    """Open images that need no labels: a labelled source, a folder of images, or a list.

    A list is a text file with one path per line, relative to the list. If a folder has train/, only
    that split is opened, so that calibration does not use test images; otherwise all its images.

    Raises:
        DataError: No images there.
    """
    path = Path(spec.removeprefix("folder:"))
    if path.is_file() and path.suffix == ".txt":
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not a list in UTF-8 ({error})") from None
        paths = [path.parent / line for line in lines if line and not line.startswith("#")]
        missing = [entry for entry in paths if not entry.is_file()]
        if missing:
            raise DataError(
                f"{path}: lists {missing[0]}, which does not exist (paths are relative to the list)"
            )
    elif path.is_dir():
        paths = images_under(path / "train" if (path / "train").is_dir() else path)
    else:
        return open_source(spec, "train")
    if not paths:
        raise DataError(f"{path}: no images ({', '.join(IMAGE_SUFFIXES)})")
    return Files(spec, paths, np.full(len(paths), -1), ())


def ignored_files(source: Source) -> list[str]:
    """Describe the files of a folder that look like images and are not read, by reason."""
    lines = []
    for reason, paths in source.ignored.items() if isinstance(source, Files) else ():
        names = ", ".join(map(str, paths[:NAMED_FILES]))
        more = ", ..." if len(paths) > NAMED_FILES else ""
        lines.append(f"{plural(len(paths), 'file')} {reason} ignored: {names}{more}")
    return lines


def images_under(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Return every image file below a folder, sorted; without hidden files and folders."""
    images = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    visible = (p for p in images if not any(part[0] == "." for part in p.relative_to(folder).parts))
    # A dangling link counts, so that it is reported as an image that cannot be read.
    return sorted(p for p in visible if p.is_file() or (p.is_symlink() and not p.exists()))


def _size(path: Path) -> int:
    """Return the bytes of a file; 0 if it cannot be read, such as a dangling link."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _folder(argument: str) -> Path:
    folder = Path(argument).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder", fix="check the path")
    return folder


def _held_out(spec: str, folder: Path, split: str) -> Source:
    record = read_held_out(folder)
    if record is None:
        raise DataError(
            f"{folder}: has no {SPLIT_FILE}, because it is not a run, or its data set "
            "has its own test images",
            fix="name the data set itself",
        )
    source = open_source(record.data)
    if source.fingerprint() != record.fingerprint:
        raise DataError(
            f"{spec}: the images of {record.data} have changed since the run",
            fix="restore them, or name the data set itself",
        )
    every, test = np.arange(len(source)), np.array(record.test, np.int64)
    chosen = {"train": np.setdiff1d(every, test), "test": test, "all": every}[split]
    part = Subset(source, chosen, spec)
    part.splits = True
    return part


def _synthetic(spec: str, argument: str) -> Source:
    if not argument.isdecimal() or int(argument) < 1:
        raise InputError(f"{spec}: needs a number of images", fix="as in synthetic:256")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (int(argument), 32, 32, 3), dtype=np.uint8)
    labels = np.arange(int(argument)) % 10
    return Arrays(spec, images, labels, [str(index) for index in range(10)], named=False)


def _arrays(
    spec: str,
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    splits: bool = False,
    named: bool = True,
) -> Source:
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise DataError(
            f"{spec}: images are {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 3]"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{spec}: labels are {labels.dtype} {list(labels.shape)}, not integers [{len(images)}]"
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(
            f"{spec}: labels range from {labels.min()} to {labels.max()}, but there are "
            f"{len(classes)} classes"
        )
    return Arrays(spec, images, labels, classes, splits=splits, named=named)


def _class_folders(spec: str, root: Path, split: str) -> Source:
    train = root / "train" if (root / "train").is_dir() else None
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    unused = images_under(root / "val") if test == root / "test" else []
    if train and test:
        roots = {"train": [train], "test": [test], "all": [train, test]}[split]
    else:
        roots = [train or test or root]
    names_from = train or roots[0]
    classes = _class_names(names_from)
    for name in classes:
        if name != name.encode(errors="replace").decode():
            raise DataError(
                f"{names_from}: the name of class {name!r} is not UTF-8", fix="rename the folder"
            )
    if not classes:
        raise DataError(f"{names_from}: no class folders", fix="create one folder for each class")
    if len(classes) == 1:
        inner = names_from / classes[0]
        fix = "a classifier needs two or more"
        if len(_class_names(inner)) > 1:
            fix += f"; if the folders in {inner} are the classes, use --data {inner}"
        raise DataError(f"{names_from}: only one class ({classes[0]})", fix=fix)
    paths: list[Path] = []
    labels: list[int] = []
    unreadable: list[Path] = []
    outside: list[Path] = []
    for base in roots:
        outside += (
            path
            for path in base.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and path.name[0] != "."
        )
        unknown = sorted(set(_class_names(base)).difference(classes))
        if unknown:
            raise DataError(f"{base}: class {unknown[0]!r} is not in {names_from}")
        for label, name in enumerate(classes):
            files = images_under(base / name, (*IMAGE_SUFFIXES, *UNREADABLE_SUFFIXES))
            images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
            unreadable += (path for path in files if path.suffix.lower() in UNREADABLE_SUFFIXES)
            if not images and base == names_from:
                raise DataError(
                    f"{base / name}: the class has no images",
                    fix="add some, or use a folder that contains only class folders",
                )
            paths += images
            labels += [label] * len(images)
    if not paths:
        raise DataError(f"{roots[0]}: no image in any class")
    reasons = {
        "in formats that cannot be read (convert to JPEG or PNG)": unreadable,
        "outside the class folders": sorted(outside),
        "in val/, because test/ has the test images": unused,
    }
    ignored = {reason: files for reason, files in reasons.items() if files}
    return Files(
        spec, paths, np.array(labels), classes, splits=bool(train and test), ignored=ignored
    )


def _class_names(folder: Path) -> list[str]:
    return sorted(e.name for e in folder.iterdir() if e.is_dir() and e.name[0] != ".")
