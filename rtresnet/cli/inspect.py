"""`rtresnet inspect`: an artifact's content and provenance."""

from __future__ import annotations

from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.core import atomic_io
from rtresnet.core.errors import InputError
from rtresnet.core.serialization import to_builtins
from rtresnet.reporting import artifact, engine_layers
from rtresnet.workflows.inspect import inspect, inspect_folder, inspect_layers


@click.command("inspect")
@click.argument("path", metavar="FILE|FOLDER", type=common.PATH)
@click.option(
    "--layers",
    is_flag=True,
    help="Show a plan's fused layers, and operators that were not fused.  [default: off]",
)
@click.option(
    "--svg",
    metavar="FILE",
    callback=common.text_place,
    help="Draw a plan's layers by stage.  [default: no drawing]",
)
@common.json_option
def command(path: Path, layers: bool, svg: str | None) -> None:
    """Show an artifact, the files it was made from, and a plan's header. Needs no GPU.

    For a folder, the command prints a table of its artifacts.
    """
    if path.is_dir():
        if layers or svg:
            raise InputError(f"{path}: is a folder; --layers and --svg apply to one plan")
        listing = inspect_folder(path)
        common.show([artifact.folder_table(path, listing)])
        common.write_json("inspect", listing)
        listing.require_unchanged()
        return
    result = inspect(path)
    document = to_builtins(result)
    if layers or svg:
        engine = inspect_layers(path)
        document["engine"] = engine_layers.with_written_bytes(engine)
        if svg:
            atomic_io.write_text(svg, engine_layers.draw(engine, path.name))
    listed = engine_layers.lines(engine) if layers else ()
    common.show(artifact.inspect_lines(result, listed))
    common.write_json("inspect", document)
    result.require_unchanged()
