"""Photographs in a few large files, which are faster to read than a million small ones.

A pack is a folder of plain tar files, which any tar reads, and an index:

    train-00000.tar ...   image files, unchanged, as CLASS/FILE; all-00000.tar without splits
    index.npz             int64 columns: shard, offset and length in bytes, label; and the names,
                          CLASS/FILE, in uint8 with a zero between two
    index.json            classes, splits, each shard's size, the table's sha256; written last

`rtresnet pack` writes it (`workflows/pack.py`). An image is one read at an offset, from any
thread, and the bits are those of the folder that was packed.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta
from typing_extensions import TypedDict  # in typing from Python 3.11

from rtresnet.core import serialization
from rtresnet.core.errors import DataError
from rtresnet.data.decode import CorruptImage, FileEnds, decode

INDEX, TABLE, UNFINISHED = "index.json", "index.npz", "unfinished"
FORMAT, VERSION = "rtresnet shards", 1
PACK_AGAIN = "pack it again: rtresnet pack FOLDER --out DIR --force"
COLUMNS = ("shard", "offset", "length", "label")  # int64, an entry an image

Count = Annotated[int, Meta(ge=0)]


class Shard(TypedDict):
    """A tar file of a pack."""

    file: Annotated[str, Meta(pattern=r"^[a-z]+-\d+\.tar$")]
    bytes: Count


class PackIndex(TypedDict):
    """Content of a pack's index.json; `splits` has the number of images of each split."""

    splits: dict[str, Count]
    classes: list[str]
    shards: list[Shard]
    table_sha256: str


class Shards:
    """The images of a pack, read in place.

    Args:
        name: Name of the source, as the user wrote it.
        folder: Folder of the pack.
        split: "train", "test" or "all"; a data set without splits has only "all".

    Raises:
        DataError: There is no pack, it is unfinished, or its files do not match its index.
    """

    named = True

    def __init__(self, name: str, folder: Path, split: str) -> None:
        self.name, self.folder = name, folder
        index = _read_index(folder)
        table = _read_table(folder / TABLE, index)
        self.classes: tuple[str, ...] = tuple(index["classes"])
        counts: dict[str, int] = index["splits"]
        self.splits = "all" not in counts
        first, end = 0, sum(counts.values())
        if self.splits and split != "all":
            first = 0 if split == "train" else counts["train"]
            end = first + counts[split]
        self._shard, self._offset, self._length, self.labels = (
            table[column][first:end] for column in COLUMNS
        )
        self._names, self._first, self._end = table["names"], first, end
        self._paths = [folder / shard["file"] for shard in index["shards"]]
        for path, shard in zip(self._paths, index["shards"], strict=True):
            _check_size(path, shard["bytes"])
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def image(self, index: int, at_least: int | None = None) -> np.ndarray:
        try:
            return decode("", self.content(index), at_least=at_least)
        except CorruptImage as error:
            raise CorruptImage(f"{self.locate(index)}{error}") from None

    def ends(self, index: int) -> FileEnds:
        size = int(self._length[index])
        return FileEnds.read(size, lambda length, start: self._read(index, length, start))

    def content(self, index: int) -> bytes:
        return self._read(index, int(self._length[index]), 0)

    def locate(self, index: int) -> str:
        name = os.fsdecode(self._named[index])
        return f"{self._paths[int(self._shard[index])]}: {name}"

    def _read(self, index: int, length: int, start: int) -> bytes:
        """Read bytes of a shard. Raises DataError if the shard is missing or truncated."""
        shard = int(self._shard[index])
        path = self._paths[shard]
        try:
            data = os.pread(self._descriptor(shard), length, int(self._offset[index]) + start)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        if len(data) != length:
            raise DataError(f"{path}: truncated while it was in use", fix=PACK_AGAIN)
        return data

    def fingerprint(self) -> str:
        """Return the fingerprint of the packed folder: a run can continue with either of them."""
        names = (b"/".join(name.split(b"/")[-2:]) for name in self._named)
        return files_fingerprint(names, self._length, self.labels)

    def _descriptor(self, shard: int) -> int:
        """Return a shard's file, opened when it is first read."""
        descriptor = self._open.get(shard)
        if descriptor is None:
            # No lock, because a fork could inherit it locked. If two threads open a file, the first
            # descriptor is used.
            opened = os.open(self._paths[shard], os.O_RDONLY)
            descriptor = self._open.setdefault(shard, opened)
            if descriptor != opened:
                os.close(opened)
        return descriptor

    @cached_property
    def _named(self) -> list[bytes]:
        """CLASS/FILE of each image, split on first use, because there may be a million."""
        return self._names.tobytes().split(b"\0")[self._first : self._end]


def files_fingerprint(names: Iterable[bytes], sizes: Iterable[int], labels: Iterable[int]) -> str:
    """Return the sha256 of image files' names (PARENT/FILE), sizes in bytes and labels."""
    digest = hashlib.sha256()
    for name, size, label in zip(names, sizes, labels, strict=True):
        digest.update(b"%b\0%d\0%d\n" % (name, size, label))
    return digest.hexdigest()


def _read_index(folder: Path) -> PackIndex:
    path = folder / INDEX
    try:
        index = serialization.load(path, fix=PACK_AGAIN, error=DataError)
    except FileNotFoundError:
        if (folder / UNFINISHED).exists():
            raise DataError(
                f"{folder}: packing was interrupted", fix="run the same rtresnet pack again"
            ) from None
        raise DataError(
            f"{folder}: has no {INDEX}, so it is not a pack",
            fix="create one with: rtresnet pack FOLDER --out DIR",
        ) from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path}: not an index of shards", fix=PACK_AGAIN)
    if index.get("version") != VERSION:
        raise DataError(
            f"{path}: has version {index.get('version')}, but this version of rtresnet reads "
            f"{VERSION}",
            fix=PACK_AGAIN,
        )
    valid = serialization.convert(
        index, PackIndex, where=str(path), fix=PACK_AGAIN, error=DataError
    )
    if tuple(valid["splits"]) not in (("all",), ("train", "test")):
        raise DataError(f"{path}: splits are {', '.join(valid['splits'])}", fix=PACK_AGAIN)
    return valid


def _read_table(path: Path, index: PackIndex) -> dict[str, np.ndarray]:
    """Return the columns after a check that they match the index and its sha256."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", fix=PACK_AGAIN) from None
    if hashlib.sha256(content).hexdigest() != index["table_sha256"]:
        raise DataError(f"{path}: does not match the table in {INDEX}", fix=PACK_AGAIN)
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        table = {column: file[column] for column in file.files}
    labels, shards = table["label"], table["shard"]
    if (
        len(labels) != sum(index["splits"].values())
        or labels.max(initial=0) >= len(index["classes"])
        or shards.max(initial=0) >= len(index["shards"])
    ):
        raise DataError(f"{path.with_name(INDEX)}: does not match {TABLE}", fix=PACK_AGAIN)
    return table


def _check_size(path: Path, size: int) -> None:
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", fix=PACK_AGAIN) from None
    if actual != size:
        what = "truncated" if actual < size else "replaced"
        raise DataError(f"{path}: {what} ({actual} of {size} bytes)", fix=PACK_AGAIN)
