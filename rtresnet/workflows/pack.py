"""Put a folder of photographs into a few large tar files."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from rtresnet.core import reporter
from rtresnet.core.config import Config, option
from rtresnet.core.errors import InputError
from rtresnet.core.reporter import Reporter

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
        InputError: `out` contains a finished pack, or cannot be written.
    """
    from rtresnet.workflows import packing

    config = config or PackConfig()
    begin = time.perf_counter()
    with reporter.progress(f"packing {source}", total=1) as update:
        index = packing.pack(
            str(source),
            Path(out),
            shard_bytes=config.shard_size,
            force=config.force,
            progress=lambda done, total: update(completed=done / total),
            warn=reporter.note,
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
