"""`rtresnet pack`: a folder of photographs as a few large files."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import click

from rtresnet.cli import common
from rtresnet.core.errors import InputError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@click.command("pack", short_help="Put a folder of photographs into a few large files.")
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder.")
@click.option(
    "--shard-size", default="512MB", show_default=True, help=f"Of each file: {', '.join(UNITS)}."
)
@click.option("--force", is_flag=True, help="Replace a finished pack.")
@common.json_option
def command(json_file: str | None, **options: Any) -> None:
    """Put a folder of photographs into a few large tar files, for --data shards:DIR.

    SOURCE has one folder a class, optionally under train/ and test/ or val/. The files' bytes stay
    as they are, and a disk is spared a million small ones.
    """
    result = run(**options)
    counts = ", ".join(f"{split} {count:,}" for split, count in result["splits"].items())
    common.out_console().print(
        f"{result['out']}: {result['images']:,} images ({counts}) of {result['classes']} classes, "
        f"{result['bytes'] / 1e6:,.1f} MB in {result['shards']} shards, {result['seconds']:.1f} s\n"
        f"next: rtresnet train --data {result['data']}",
        soft_wrap=True,
        markup=False,
    )
    common.write_json(json_file, "pack", result)


def run(
    source: str, *, out: Path, shard_size: str = "512MB", force: bool = False
) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes."""
    from rtresnet.data.packing import pack

    limit = _bytes(shard_size)
    begin = time.perf_counter()
    with common.progress(f"packing {source}", total=1) as update:
        index = pack(
            source,
            out,
            shard_bytes=limit,
            force=force,
            progress=lambda done, total: update(completed=done / total),
            warn=common.note,
        )
    return {
        "out": str(out),
        "data": f"shards:{out}",
        "images": sum(index["splits"].values()),
        "splits": index["splits"],
        "classes": len(index["classes"]),
        "shards": len(index["shards"]),
        "bytes": sum(shard["bytes"] for shard in index["shards"]),
        "seconds": time.perf_counter() - begin,
    }


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+) ?([KMG]i?B)", size, re.ASCII)
    if not found or not int(found[1]):
        raise InputError(f"--shard-size {size}: not a size", fix="as in 512MB")
    return int(found[1]) * UNITS[found[2]]
