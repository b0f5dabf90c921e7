"""`rtresnet pack`: a folder of photographs as a few large files."""

from __future__ import annotations

from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.reporter import plural
from rtresnet.workflows.pack import PackConfig, pack


@click.command("pack")
@click.argument("source")
@click.option("--out", type=common.PATH, required=True, help="Output folder.")
@config_options(PackConfig)
@common.json_option
def command(source: str, out: Path, config: PackConfig) -> None:
    """Pack a folder of photographs into a few large tar files, for --data shards:DIR.

    SOURCE has one folder for each class, optionally under train/ and test/ or val/. The files'
    bytes are copied unchanged. A few large files are faster to read than a million small ones.
    """
    result = pack(source, out, config, reporter=common.REPORTER)
    counts = ", ".join(f"{split} {count:,}" for split, count in result.splits.items())
    common.say(
        f"{result.out}: {plural(result.images, 'image')} ({counts}) of {result.classes} classes, "
        f"{result.bytes / 1e6:,.1f} MB in {plural(result.shards, 'shard')}, {result.seconds:.1f} s"
    )
    common.say(f"next: rtresnet train --data {result.data}")
    common.write_json("pack", result)
