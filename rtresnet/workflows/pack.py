"""Put a folder of photographs into a few large tar files (`data/shards.py` has the format).

The tar files depend only on the images: no times, no owners. The index is written last, so that
what an interrupted run left is never mistaken for a pack; it is marked, and the next run replaces
it.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rtresnet.core import atomic_io, locks, provenance, reporter
from rtresnet.core.config import Config, option
from rtresnet.core.errors import DataError, InputError
from rtresnet.core.reporter import Reporter
from rtresnet.data.loader import prefetch_map
from rtresnet.data.shards import (
    COLUMNS,
    FORMAT,
    INDEX,
    TABLE,
    UNFINISHED,
    VERSION,
    PackIndex,
    Shard,
)
from rtresnet.data.sources import Files, ignored_files, open_source

END = bytes(1024)  # two empty blocks end a tar file
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_size(text: str) -> int:
    """Read a size as in "512MB" or "1GiB", in bytes.

    Raises:
        InputError: Not a size.
    """
    match = re.fullmatch(r"(\d+) ?([KMG]i?B)", text, re.ASCII)
    if not match or not int(match[1]):
        raise InputError("not a size", fix="as in 512MB")
    return int(match[1]) * UNITS[match[2]]


@dataclass(frozen=True, kw_only=True)
class PackConfig(Config):
    """Options of `pack`.

    Attributes:
        shard_size: Bytes of each file.
        force: Whether a finished pack is replaced.
    """

    shard_size: int = option(
        512 * 10**6,
        f"Size of each file, in {', '.join(UNITS)}.",
        metavar="SIZE",
        parse=parse_size,
        default_text="512MB",
        minimum=1,
    )
    force: bool = option(False, "Replace a complete pack.")


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """A pack that was written.

    Attributes:
        data: Value for --data: shards:DIR.
        splits: Number of images of each split.
        seconds: Duration.
    """

    out: Path
    data: str
    images: int
    splits: dict[str, int]
    classes: int
    shards: int
    bytes: int
    seconds: float


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: PackConfig | None = None,
    *,
    reporter: Reporter = reporter.DEFAULT,
) -> PackResult:
    """Pack a folder with one subfolder for each class, optionally under train/ and test/ or val/.

    The files' bytes are copied unchanged.

    Args:
        source: The folder.
        out: Folder of the shards and their index.
        config: Size of the shards.
        reporter: Receives progress and warnings.

    Returns:
        The shards that were written.

    Raises:
        DataError: The folder has no images or no classes.
        InputError: `out` contains a finished pack, files that do not belong to a pack, or cannot
            be written.
        LockedError: Another process writes into `out`.
        OSError: For example, the disk is full. Then no index is written, and the shards are
            removed.
    """
    config = config or PackConfig()
    begin = time.perf_counter()
    with reporter.progress(f"packing {source}", total=1) as update:
        index = _pack(
            str(source),
            Path(out),
            config,
            lambda done, total: update(completed=done / total),
            reporter.note,
        )
    return PackResult(
        out=Path(out),
        data=f"shards:{out}",
        images=sum(index["splits"].values()),
        splits=index["splits"],
        classes=len(index["classes"]),
        shards=len(index["shards"]),
        bytes=sum(shard["bytes"] for shard in index["shards"]),
        seconds=time.perf_counter() - begin,
    )


def _pack(
    source: str,
    folder: Path,
    config: PackConfig,
    progress: Callable[[int, int], None],
    warn: locks.Warn,
) -> PackIndex:
    """Pack a folder's image files, unchanged and in the folder source's own order.

    Damaged images are packed as they are: their readers count and name them.

    Returns:
        The index, as written: classes, splits, shards.
    """
    files = {"train": _files(source, "train")}
    if files["train"].splits:
        files["test"] = _files(source, "test")
    else:
        files = {"all": files["train"]}
    plain = source.removeprefix("folder:")
    root = Path(source) if plain == source else Path(plain).expanduser()
    if folder.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"{folder}: is inside {root}, so it would become a class", fix="choose another --out"
        )
    for line in (line for part in files.values() for line in ignored_files(part)):
        warn(line)
    with locks.hold_folder(folder, warn=warn):
        _make_room(folder, config.force)
        return _write(folder, files, root, config.shard_size, progress)


def _write(
    folder: Path,
    files: dict[str, Files],
    root: Path,
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> PackIndex:
    """Write the shards, then the table, then the index."""
    rows, total = _Rows(), sum(map(len, files.values()))
    shards: list[Shard] = []
    try:
        for split, part in files.items():
            images = _images(part, root)
            shards += _write_split(folder, split, images, rows, shard_bytes, progress, total)
        index: PackIndex = {
            "classes": list(next(iter(files.values())).classes),
            "splits": {split: len(part) for split, part in files.items()},
            "shards": shards,
            "table_sha256": rows.write(folder / TABLE),
        }
        record = {"format": FORMAT, "version": VERSION, **index, "made_by": provenance.made_by()}
        atomic_io.write_text(folder / INDEX, json.dumps(record, indent=1) + "\n")
    except BaseException:
        _sweep(folder)
        raise
    finally:
        (folder / UNFINISHED).unlink(missing_ok=True)
    return index


class _Rows:
    """The table: an entry an image, in columns."""

    def __init__(self) -> None:
        self.columns: dict[str, list[int]] = {name: [] for name in COLUMNS}
        self.names: list[bytes] = []

    def add(self, name: bytes, **entries: int) -> None:
        self.names.append(name)
        for column, value in entries.items():
            self.columns[column].append(value)

    def write(self, path: Path) -> str:
        """Return the table's sha256."""
        arrays = {column: np.array(values, np.int64) for column, values in self.columns.items()}
        names = np.frombuffer(b"\0".join(self.names), np.uint8)
        with atomic_io.atomic_path(path) as temporary:
            with open(temporary, "wb") as file:
                np.savez(file, allow_pickle=False, names=names, **arrays)
            return atomic_io.sha256(temporary)


def _files(source: str, split: str) -> Files:
    opened = open_source(source, split)
    if not isinstance(opened, Files):
        raise DataError(
            f"{source}: not a folder of images",
            fix="pack accepts a folder with one subfolder per class",
        )
    return opened


def _images(files: Files, root: Path) -> Iterator[tuple[str, int, bytes]]:
    """Yield CLASS/FILE, label and bytes of each image file, read a few ahead."""
    for index, data in prefetch_map(lambda index: _read(files.paths[index]), range(len(files))):
        parts = files.paths[index].relative_to(root).parts
        # A class folder is in the root, or in the split's folder: see `open_source`.
        parts = parts[1:] if parts[0] in ("train", "test", "val") else parts
        yield "/".join(parts), int(files.labels[index]), data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _write_split(
    folder: Path,
    split: str,
    images: Iterator[tuple[str, int, bytes]],
    rows: _Rows,
    shard_bytes: int,
    progress: Callable[[int, int], None],
    total: int,
) -> Iterator[Shard]:
    """Yield each shard's file and size once it is written."""
    first = max(rows.columns["shard"], default=-1) + 1
    number, waiting = 0, next(images, None)
    while waiting is not None:
        path = folder / f"{split}-{number:05}.tar"
        with atomic_io.atomic_path(path) as temporary, open(temporary, "wb") as file:
            while waiting is not None:
                name, label, data = waiting
                header, padding = _frame(name, len(data))
                size = len(header) + len(data) + padding
                if file.tell() and file.tell() + size + len(END) > shard_bytes:
                    break
                offset = file.tell() + len(header)
                file.write(header + data + bytes(padding))
                rows.add(
                    os.fsencode(name),
                    shard=first + number,
                    offset=offset,
                    length=len(data),
                    label=label,
                )
                progress(len(rows.names), total)
                waiting = next(images, None)
            file.write(END)
            size = file.tell()
        yield {"file": path.name, "bytes": size}
        number += 1


def _frame(name: str, size: int) -> tuple[bytes, int]:
    """Return a tar member's header and padding. The GNU format takes any name."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    header = member.tobuf(tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape")
    return header, -size % tarfile.BLOCKSIZE


def _make_room(folder: Path, force: bool) -> None:
    """Remove a complete or partial pack that may be replaced, and no other files."""
    index = folder / INDEX
    finished = index.exists() and FORMAT in index.read_text(encoding="utf-8", errors="replace")
    if finished and not force:
        raise InputError(f"{folder}: contains a pack already", fix="replace it with --force")
    strange = next(_pieces(folder), None)
    if strange is not None and not finished and not (folder / UNFINISHED).exists():
        raise InputError(
            f"{strange}: exists and does not belong to a pack", fix="choose another --out"
        )
    atomic_io.write_text(folder / UNFINISHED, "rtresnet pack is running here, or was killed\n")
    _sweep(folder)


def _sweep(folder: Path) -> None:
    for path in list(_pieces(folder)):
        path.unlink(missing_ok=True)


def _pieces(folder: Path) -> Iterator[Path]:
    """Yield every file of a pack, the index first, and incomplete files of an interrupted run."""
    for name in (INDEX, TABLE, *(f"{split}-[0-9]*.tar" for split in ("train", "test", "all"))):
        yield from folder.glob(name)
        yield from folder.glob(f".{name}.*.tmp")
