"""`rtresnet inspect`: what an artifact is, and where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common
from rtresnet.cli.build import describe_attested
from rtresnet.core.errors import InputError
from rtresnet.core.preprocess import FLOAT
from rtresnet.core.reporter import plural
from rtresnet.core.serialization import to_builtins
from rtresnet.core.sidecar import Calibration
from rtresnet.workflows.inspect import (
    ChainEntry,
    InspectResult,
    inspect,
    inspect_folder,
    inspect_layers,
)

if TYPE_CHECKING:
    from rtresnet.builder.layers import Layers


@click.command("inspect")
@click.argument("path", metavar="FILE|FOLDER", type=click.Path(path_type=Path))
@click.option(
    "--layers",
    is_flag=True,
    help="Show a plan's fused layers, and what did not fuse.  [default: off]",
)
@click.option(
    "--svg",
    metavar="FILE",
    callback=common.text_place,
    help="Draw a plan's layers by stage.  [default: no drawing]",
)
@common.json_option
def command(path: Path, layers: bool, svg: str | None, json_file: str | None) -> None:
    """Show an artifact, its whole chain, and a plan's header. Needs no GPU.

    For a folder, show a table of the artifacts in it.
    """
    from rtresnet.core import atomic_io
    from rtresnet.reporting import engine_layers

    if path.is_dir():
        if layers or svg:
            raise InputError(f"{path}: a folder; --layers and --svg are for one plan")
        _show_folder(path, json_file)
        return
    result = inspect(path)
    document = to_builtins(result)
    if layers or svg:
        engine = inspect_layers(path)
        document["engine"] = _with_written_bytes(engine)
        if svg:
            atomic_io.write_text(svg, engine_layers.draw(engine, path.name))
    _show(result)
    if layers:
        engine_layers.show(common.out_console(), engine)
    if result.operations:
        counted = ", ".join(f"{count} {name}" for name, count in result.operations.items())
        common.say(f"graph: {counted}")
    common.write_json(json_file, "inspect", document)
    result.require_unchanged()


def _with_written_bytes(engine: Layers) -> dict[str, Any]:
    """Return the layers as --json writes them, each with the bytes that it writes."""
    from rtresnet.reporting import engine_layers

    record: dict[str, Any] = to_builtins(engine)
    for layer, entry in zip(engine.layers, record["layers"], strict=True):
        batch = engine.batches[min(layer.profile, len(engine.batches) - 1)]
        entry["written_bytes"] = engine_layers.written(layer, batch)
    return record


def _show(result: InspectResult) -> None:
    from rtresnet.reporting import tables

    for index, entry in enumerate(result.chain):
        indent, record = "  " * index, entry.sidecar
        what = ""
        if record:
            what = f": {record.kind}, {record.model.architecture}, {record.precision}"
        common.say(f"{indent}{'<- ' if index else ''}{entry.path}{what}  ({entry.state})")
        for line in _details(entry, first=index == 0):
            common.say(f"{indent}   {line}")
        for listing in tables.measured_tables(record.measured if record else {}):
            tables.show(common.out_console(), listing.headings, listing.rows)
    if head := result.header:
        common.say(
            f"header: TensorRT-RTX {head.version}, {head.bytes:,} bytes, for "
            f"{', '.join(head.targets)}"
        )
    if result.manifest and result.chain[0].sidecar is None:
        facts = to_builtins(result.manifest).items()
        text = ", ".join(f"{key} {tables.one_line(value)}" for key, value in facts if value)
        common.say(f"name field: {text}")


def _show_folder(folder: Path, json_file: str | None) -> None:
    from rtresnet.reporting import tables

    result = inspect_folder(folder)
    rows = [
        (entry.path.relative_to(folder), entry.kind, entry.architecture, entry.precision,
         f"{entry.bytes / 1e6:.2f}", entry.state)
        for entry in result.artifacts
    ]  # fmt: skip
    tables.show(common.out_console(), ("file", "kind", "net", "precision", "MB", "state"), rows)
    common.write_json(json_file, "inspect", result)
    result.require_unchanged()


def _details(entry: ChainEntry, *, first: bool) -> list[str]:
    from rtresnet.reporting import tables

    record = entry.sidecar
    if record is None:
        return []
    lines = []
    if record.sha256:
        lines.append(f"sha256 {record.sha256[:16]}..., {record.bytes / 1e6:.2f} MB")
    if first:
        i, d = record.input, record.detection
        size = f"{i.size}x{i.size} (resize {i.resize}, {i.interpolation})"
        if d is not None:
            canvas = f", on {d.canvas[0]}x{d.canvas[1]}" if d.canvas else ""
            size = f"of a detector, {d.shorter} to {d.longer} pixels{canvas} ({i.interpolation})"
        lines.append(
            f"input {size}, mean {list(i.mean)}, std {list(i.std)}; "
            f"{plural(len(record.model.classes), 'class')}"
        )
        if record.assumed:
            lines.append(f"assumed: {'; '.join(record.assumed)}")
        if i.layout != FLOAT:
            lines.append(f"takes {i.layout}: mean and std are inside")
        if record.topk:
            lines.append(f"gives the {record.topk} most probable classes, no logits")
        source = f" ({record.weights.source})" if record.weights.source else ""
        lines.append(f"weights {record.weights.origin}{source}")
    if c := record.calibration:
        lines.append(
            f"calibrated by {c.method} on {plural(c.n, 'image')} of {c.images}: {_scales(c)}"
        )
    if p := record.plan:
        batches = ", ".join(map(str, p.profiles))
        lines.append(f"{p.builder} {p.version}, batches {batches}, for {', '.join(p.targets)}")
        if p.attested:
            lines.append(f"{describe_attested(p)}; {plural(p.attested.layers, 'layer')}")
    lines += tables.measured_lines(record.measured)
    if record.made_by:
        lines.append(f"made by: {record.made_by.get('command')}")
    return lines


def _scales(calibration: Calibration) -> str:
    """Return where its scales are, and whether another calibration has been written there since."""
    from rtresnet.core import atomic_io

    place = Path(calibration.scales)
    known = place.suffix == ".json" and place.is_file()  # learned ones are in their checkpoint
    changed = known and atomic_io.sha256(place) != calibration.scales_sha256
    return f"{place.as_posix()}{' (changed since)' if changed else ''}"
