"""An engine's fused layers as a table, and what did not fuse."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Any

from rich.console import Console

from rtresnet.reporting import engine_graph

WHY = {
    "unfused": "Adds in layers of their own: the convolution before each writes its sums to memory "
    "in {wide}, and this layer reads them again",
    "rounds": "Q/DQ pairs that only round: their int8 leaves no layer, which costs accuracy and "
    "gains nothing",
    "reformat": "layers that only move or convert data",
}


def as_record(engine: Any) -> dict[str, Any]:
    """An engine's layers (`builder.layers.Layers`) as `--json` writes them, with bytes written."""
    record = dataclasses.asdict(engine)
    for layer in record["layers"]:
        batch = engine.batches[min(layer["profile"], len(engine.batches) - 1)]
        layer["written_bytes"] = engine_graph.written(layer, batch)
    return record


def show(console: Console, engine: dict[str, Any]) -> None:
    """Prints the first profile's layers, in 80 columns."""
    batch = engine["batches"][0]
    layers = [x for x in engine["layers"] if x["profile"] == 0 and x["role"] != "idle"]
    console.print(f"layers in order, with what they write at batch {batch}, in MB:", markup=False)
    for stage, group in groupby(layers, key=lambda layer: layer["stage"]):
        members = list(group)
        size = sum(layer["written_bytes"] for layer in members) / 1e6
        console.print(f"{stage}: {len(members)} layers, {size:.1f} MB", markup=False)
        for layer in members:
            console.print(_line(layer), markup=False, soft_wrap=True)
    total = sum(layer["written_bytes"] for layer in layers) / 1e6
    memory = (
        f"; activation memory {engine['activations'][0] / 1e6:.1f} MB"
        if engine["activations"]
        else ""
    )
    console.print(
        f"in all {len(layers)} layers, write {total:.1f} MB{memory} (largest batch)", markup=False
    )
    for line in _unfused(layers, set(engine["adds"])):
        console.print(line, markup=False)


def _line(layer: dict[str, Any]) -> str:
    def types(side: str) -> str:
        return "+".join(dict.fromkeys(tensor["dtype"] for tensor in layer[side]))

    shape = layer["outputs"][0]["shape"] if layer["outputs"] else ()
    operation = layer["operation"].replace(" + ", "+")
    return (
        f"  {layer['block'][:9]:<9} {operation[:31]:<31} "
        f"{types('inputs') + '>' + types('outputs'):<15.15} "
        f"{'x'.join(map(str, shape[1:])):>11.11} {layer['written_bytes'] / 1e6:6.2f}"
    ).rstrip()


def _unfused(layers: list[dict[str, Any]], adds: set[str]) -> list[str]:
    alone = [
        name
        for layer in layers
        if layer["role"] not in ("conv", "matmul")
        for name in layer["nodes"]
        if name in adds
    ]
    wide = {t["dtype"] for x in layers if x["role"] == "conv" for t in x["outputs"]} - {"Int8"}
    rounds = [name for layer in layers for name in layer["rounds"]]
    moves = [x["operation"] for x in layers if x["role"] == "reformat"]
    found = (
        (alone, WHY["unfused"].format(wide=" or ".join(sorted(wide)) or "their own type")),
        (rounds, WHY["rounds"]),
        (moves, WHY["reformat"]),
    )
    return [
        f"{len(names)} {why}: {', '.join(names[:4])}"
        + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for names, why in found
        if names
    ]
