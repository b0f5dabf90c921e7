"""`rtresnet inspect`: what an artifact is, and where it came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from rtresnet.cli import common
from rtresnet.cli.build import describe_attested
from rtresnet.core import serialization
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.preprocess import FLOAT
from rtresnet.core.sidecar import Plan


@click.command("inspect")
@click.argument("path", metavar="FILE|FOLDER", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="A plan's fused layers, and what did not fuse.")
@click.option(
    "--svg", metavar="FILE", callback=common.text_place, help="Draw a plan's layers by stage."
)
@common.json_option
def command(path: Path, layers: bool, svg: str | None, json_file: str | None) -> None:
    """Show an artifact, its whole chain, and a plan's header. Needs no GPU.

    For a folder, show a table of the artifacts in it.
    """
    from rtresnet.core import atomic_io
    from rtresnet.reporting import measured, tables

    if path.is_dir():
        if layers or svg:
            raise InputError(f"{path}: a folder; --layers and --svg are for one plan")
        _inspect_folder(path, json_file)
        return
    result = run(path)
    if layers or svg:
        from rtresnet.cli import inspect_layers
        from rtresnet.reporting import engine_graph

        result["engine"] = inspect_layers.load(path)
        if svg:
            drawing = engine_graph.draw(result["engine"], path.name)
            atomic_io.write_text(svg, drawing)
    console = common.out_console()
    for index, link in enumerate(result["chain"]):
        console.print(f"{'  ' * index}{'<- ' if index else ''}{_headline(link)}", soft_wrap=True)
        for line in _details(link, path):
            console.print(f"{'  ' * index}   {line}", soft_wrap=True, markup=False)
        for listing in measured.listings((link["sidecar"] or {}).get("measured") or {}):
            tables.show(console, listing.headings, listing.rows)
    if result["header"]:
        head = result["header"]
        console.print(
            f"header: TensorRT-RTX {head['version']}, {head['bytes']:,} bytes, for "
            f"{', '.join(head['targets'])}",
            soft_wrap=True,
        )
    if result["manifest"] and result["chain"][0]["sidecar"] is None:
        said = ", ".join(
            f"{key} {measured.plain(value)}" for key, value in result["manifest"].items()
        )
        console.print(f"it says of itself: {said}", soft_wrap=True, markup=False)
    if layers:
        inspect_layers.show(console, result["engine"])
    if result["operations"]:
        counted = ", ".join(f"{count} {name}" for name, count in result["operations"].items())
        console.print(f"graph: {counted}", soft_wrap=True)
    common.write_json(json_file, "inspect", result)
    if result["chain"][-1]["state"] == "changed":
        raise ArtifactError(
            f"{result['chain'][-1]['path']}: changed since {path} was made from it",
            fix="make the later files anew, by the commands above",
        )


def run(path: Path) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes.

    Raises:
        ArtifactError: The file is damaged or does not match its sidecar.
    """
    from rtresnet.builder import header, manifest
    from rtresnet.core import artifacts, atomic_io, hardware

    atomic_io.require_file(path)
    kind = artifacts.kind_of(path)
    sidecar = artifacts.verify(path)
    head, operations, said = None, None, None
    if kind == "plan":
        found = header.read(path)
        if found is None and sidecar is None:
            raise ArtifactError(
                f"{path}: no sidecar and not a TensorRT-RTX plan; nothing can be said of it here"
            )
        head = dataclasses.asdict(found) if found else None
        said = manifest.find(path)
    elif kind == "onnx" and hardware.installed("onnx"):
        operations = _operations(path)
    elif kind == "checkpoint" and sidecar is None:
        return _foreign_checkpoint(path)
    chain = [
        {
            "path": str(link),
            "state": state,
            "sidecar": dataclasses.asdict(record) if record else None,
        }
        for link, record, state in artifacts.chain(path)
    ]
    return {
        "kind": kind,
        "chain": chain,
        "header": head,
        "manifest": said,
        "operations": operations,
    }


def _inspect_folder(folder: Path, json_file: str | None) -> None:
    """Shows the artifacts in a folder as a table.

    Raises:
        InputError: There are none.
        ArtifactError: One of them does not match its sidecar.
    """
    from rtresnet.reporting import tables

    found = list_folder(folder)
    if not found:
        raise InputError(f"{folder}: no checkpoint, ONNX file or plan in this folder")
    rows = [
        (Path(entry["path"]).relative_to(folder), entry["kind"], entry["architecture"],
         entry["precision"], f"{entry['bytes'] / 1e6:.2f}", entry["state"])
        for entry in found
    ]  # fmt: skip
    tables.show(common.out_console(), ("file", "kind", "net", "precision", "MB", "state"), rows)
    common.write_json(json_file, "inspect", {"folder": str(folder), "artifacts": found})
    wrong = [e["path"] for e in found if e["state"] in ("changed", "broken sidecar")]
    if wrong:
        raise ArtifactError(
            f"{', '.join(wrong)}: not the file that its sidecar describes",
            fix=f"see: rtresnet inspect {wrong[0]}",
        )


def list_folder(folder: Path) -> list[dict[str, Any]]:
    """The artifacts in a folder and the folders in it, as `--json` has them."""
    from rtresnet.core import artifacts

    return [
        {
            "path": str(path),
            "kind": artifacts.kind_of(path),
            "architecture": sidecar.model.architecture if sidecar else None,
            "precision": sidecar.precision if sidecar else None,
            "bytes": path.stat().st_size,
            "state": state,
        }
        for path, sidecar, state in artifacts.under(folder)
    ]


def _foreign_checkpoint(path: Path) -> dict[str, Any]:
    common.require_torch("reading a checkpoint without sidecar")
    from rtresnet.models import checkpoint

    loaded = checkpoint.load(path)
    record = {
        "kind": "checkpoint",
        "model": dataclasses.asdict(loaded.model),
        "input": dataclasses.asdict(loaded.input),
        "weights": dataclasses.asdict(loaded.weights),
        "precision": "fp32",
        "assumed": loaded.assumed,
    }
    link = {"path": str(path), "state": "no sidecar, recognized by its tensors", "sidecar": record}
    return {
        "kind": "checkpoint",
        "chain": [link],
        "header": None,
        "manifest": None,
        "operations": None,
    }


def _operations(path: Path) -> dict[str, int]:
    from collections import Counter

    from rtresnet.onnxlib import io

    model = io.load(path, checked=True)
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def _headline(link: dict[str, Any]) -> str:
    record = link["sidecar"]
    what = ""
    if record:
        what = f": {record['kind']}, {record['model']['architecture']}, {record['precision']}"
    return f"{link['path']}{what}  ({link['state']})"


def _details(link: dict[str, Any], path: Path) -> list[str]:
    from rtresnet.reporting import measured

    record = link["sidecar"]
    if record is None:
        return []
    lines = []
    if record.get("sha256"):
        lines.append(f"sha256 {record['sha256'][:16]}..., {record['bytes'] / 1e6:.2f} MB")
    if link["path"] == str(path):
        i = record["input"]
        lines.append(
            f"input {i['size']}x{i['size']} (resize {i['resize']}), mean {list(i['mean'])}, "
            f"std {list(i['std'])}; {len(record['model']['classes'])} classes"
        )
        if record.get("assumed"):
            lines.append(f"assumed: {'; '.join(record['assumed'])}")
        if i.get("layout", FLOAT) != FLOAT:
            lines.append(f"takes {i['layout']}: mean and std are inside")
        if record.get("topk"):
            lines.append(f"gives the {record['topk']} most probable classes, no logits")
        weights = record["weights"]
        lines.append(
            f"weights {weights['origin']}"
            + (f" ({weights['source']})" if weights["source"] else "")
        )
    if record.get("calibration"):
        c = record["calibration"]
        lines.append(
            f"calibrated by {c['method']} on {c['n']} images of {c['images']}: {_scales(c)}"
        )
    if record.get("plan"):
        p = record["plan"]
        batches = ", ".join(f"{q['min']}:{q['opt']}:{q['max']}" for q in p["profiles"])
        lines.append(
            f"{p['builder']} {p['version']}, batches {batches}, for {', '.join(p['targets'])}"
        )
        if p["attested"]:
            plan = serialization.from_json(Plan, p)
            lines.append(f"{describe_attested(plan)}; {p['attested']['layers']} layers")
    lines += measured.lines(record.get("measured") or {})
    if record.get("made_by"):
        lines.append(f"made by: {record['made_by'].get('command')}")
    return lines


def _scales(calibration: dict[str, Any]) -> str:
    """Where its scales are, and whether another calibration has been written there since."""
    from rtresnet.core import atomic_io

    place = Path(calibration["scales"])
    known = place.suffix == ".json" and place.is_file()  # learned ones lie in their checkpoint
    changed = known and atomic_io.sha256(place) != calibration["scales_sha256"]
    return f"{place.as_posix()}{' (written anew since)' if changed else ''}"
