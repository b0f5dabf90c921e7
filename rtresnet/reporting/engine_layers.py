"""An engine's layers by stage, as SVG and as a table: precisions, and what did not fuse.

The picture has one band a stage, one frame a block and one box a layer, in the order of execution.
A wide box computes (a convolution, a matrix product); a narrow one only moves, converts, adds or
rounds. A stripe below it is the type that it writes, where that differs. It is drawn without a
plotting library and follows the reader's light or dark, alone and in a page.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

WHY = {
    "unfused": "Adds in layers of their own: the convolution before each writes its sums to memory "
    "in {wide}, and this layer reads them again",
    "rounds": "Q/DQ pairs that only round: their int8 leaves no layer, which costs accuracy and "
    "gains nothing",
    "reformat": "layers that only move or convert data",
}
COLOURS = {"Int8": "#10b981", "Half": "#3b82f6", "BFloat16": "#8b5cf6", "Float": "#f59e0b"}
OTHER = "#6b7280"
WIDTH, MARGIN = 920, 16
WIDE, NARROW, HEIGHT, GAP = 52, 13, 34, 3
FRAME, TITLE, BAND = 12, 26, 14  # around a block, above a stage, between stages
STYLE = """
.eg { color: #1b1f24; font: 11px system-ui, sans-serif; }
.eg text { fill: currentColor; }
.eg .faint { opacity: .65; }
.eg .stage { font-size: 13px; font-weight: 600; }
.eg .in { fill: #fff; font-size: 10px; }
.eg .frame { fill: currentColor; fill-opacity: .05; stroke: currentColor; stroke-opacity: .2; }
.eg .unfused { stroke: #dc2626; stroke-width: 2; }
@media (prefers-color-scheme: dark) { .eg { color: #e5e9ee; } .eg .unfused { stroke: #f87171; } }
@media print { .eg { color: #000; } }
"""


def draw(engine: Mapping[str, Any], title: str) -> str:
    """The picture of one optimization profile's layers.

    Args:
        engine: What an engine's layer file holds: batches, adds, layers.
        title: A line on the engine, shown on top.

    Returns:
        An <svg> element.
    """
    batch, adds = engine["batches"][0], set(engine["adds"])
    layers = [x for x in engine["layers"] if x["profile"] == 0 and x["role"] != "idle"]
    parts: list[str] = []
    y = 64.0
    for stage, group in groupby(layers, key=lambda layer: layer["stage"]):
        members = list(group)
        parts.append(
            f'<text class="stage" x="{MARGIN}" y="{y + 14:g}">{html.escape(stage)}</text>'
            f'<text class="faint" x="{MARGIN + 62}" y="{y + 14:g}">'
            f"{html.escape(_summary(members, batch))}</text>"
        )
        y = _blocks(parts, members, batch, adds, y + TITLE) + BAND
    head = f'<text class="stage" x="{MARGIN}" y="20">{html.escape(title)}</text>'
    head += _legend(layers, adds)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="eg" viewBox="0 0 {WIDTH} {y:g}" '
        f'role="img" aria-label="layers of {html.escape(title)}"><style>{STYLE}</style>{head}'
        f"{''.join(parts)}</svg>\n"
    )


def precision(layer: Mapping[str, Any]) -> str:
    """The type a layer computes in: that of a kernel's first input; of others, of the output."""
    tensors = layer["inputs"] if layer["role"] in ("conv", "matmul") else layer["outputs"]
    return str(tensors[0]["dtype"]) if tensors else ""


def written(layer: Mapping[str, Any], batch: int) -> int:
    """Bytes that a layer writes at a batch."""
    total = 0.0
    for tensor in layer["outputs"]:
        size = {"Float": 4.0, "Int32": 4.0, "Int64": 8.0, "Half": 2.0, "BFloat16": 2.0}
        count = 1
        for side in tensor["shape"]:
            count *= batch if side < 0 else side
        total += count * size.get(tensor["dtype"], 1.0)
    return int(total)


def _summary(members: Sequence[Mapping[str, Any]], batch: int) -> str:
    kernels = [layer for layer in members if layer["role"] in ("conv", "matmul")]
    counted: dict[str, int] = {}
    for layer in kernels:
        counted[precision(layer)] = counted.get(precision(layer), 0) + 1
    what = ", ".join(f"{count} in {dtype}" for dtype, count in counted.items())
    rest = len(members) - len(kernels)
    size = sum(written(layer, batch) for layer in members) / 1e6
    others = f"; {rest} other{'s' * (rest > 1)}" if rest else ""
    return f"{what}{others}; writes {size:.1f} MB at batch {batch}".lstrip("; ")


def _blocks(
    parts: list[str], members: list[Mapping[str, Any]], batch: int, adds: set[str], y: float
) -> float:
    """Draws a stage's blocks, wrapped into rows; returns where they end."""
    x, row = float(MARGIN), FRAME * 2 + HEIGHT + 6
    for block, group in groupby(members, key=lambda layer: layer["block"]):
        layers = list(group)
        width = sum(_width(layer) + GAP for layer in layers) - GAP + FRAME
        if x > MARGIN and x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + row
        parts.append(
            f'<rect class="frame" x="{x:g}" y="{y:g}" width="{width:g}" height="{row - 6:g}" '
            f'rx="4"/><text class="faint" x="{x + 6:g}" y="{y + 12:g}" font-size="9">'
            f"{html.escape(block)}</text>"
        )
        place = x + FRAME / 2
        for layer in layers:
            parts.append(_box(layer, batch, adds, place, y + FRAME + 5))
            place += _width(layer) + GAP
        x += width + 6
    return y + row


def _width(layer: Mapping[str, Any]) -> int:
    return WIDE if layer["role"] in ("conv", "matmul") else NARROW


def _box(layer: Mapping[str, Any], batch: int, adds: set[str], x: float, y: float) -> str:
    colour = COLOURS.get(precision(layer), OTHER)
    wide = _width(layer) == WIDE
    alone = not wide and adds & set(layer["nodes"])
    types = " to ".join(
        "+".join(dict.fromkeys(t["dtype"] for t in layer[side])) for side in ("inputs", "outputs")
    )
    hint = f"{layer['operation']}\n{types}, writes {written(layer, batch):,} bytes\n" + ", ".join(
        layer["nodes"]
    )
    label = ""
    if wide:
        first, *rest = layer["operation"].split(" + ")
        lines = [first.replace("matmul", "product"), "+".join(rest)]
        label = "".join(
            f'<text class="in" text-anchor="middle" x="{x + WIDE / 2:g}" y="{y + dy:g}">'
            f"{html.escape(line)}</text>"
            for line, dy in zip(lines, (15, 27) if rest else (21, 0), strict=True)
            if line
        )
    mark = ' class="unfused"' if alone else ""
    out = layer["outputs"][0]["dtype"] if wide and layer["outputs"] else ""
    edge = ""
    if out and out != precision(layer):
        edge = (
            f'<rect x="{x:g}" y="{y + HEIGHT - 5:g}" width="{WIDE}" height="5" '
            f'fill="{COLOURS.get(out, OTHER)}"/>'
        )
    clear = "" if wide else ' fill-opacity=".55"'
    return (
        f'<g><title>{html.escape(hint)}</title><rect{mark} x="{x:g}" y="{y:g}" '
        f'width="{_width(layer)}" height="{HEIGHT}" rx="2" fill="{colour}"{clear}/>'
        f"{edge}{label}</g>"
    )


def _legend(layers: Sequence[Mapping[str, Any]], adds: set[str]) -> str:
    entries = [
        (dtype, f'height="12" fill="{COLOURS.get(dtype, OTHER)}"', WIDE // 2)
        for dtype in dict.fromkeys(precision(layer) for layer in layers)
        if dtype
    ]
    entries.append(
        (
            "adds, converts, rounds or moves",
            f'height="12" fill="{OTHER}" fill-opacity=".55"',
            NARROW,
        )
    )
    if any(_width(layer) == NARROW and adds & set(layer["nodes"]) for layer in layers):
        entries.append(
            ("an Add that did not fuse", 'height="12" fill="none" class="unfused"', NARROW)
        )
    wide = (x for x in layers if _width(x) == WIDE and x["outputs"])
    if any(x["outputs"][0]["dtype"] != precision(x) for x in wide):
        entries.append(("stripe: the type it writes", f'fill="{OTHER}" height="5"', WIDE // 2))
    x, parts = float(MARGIN), []
    for words, look, width in entries:
        parts.append(
            f'<rect x="{x:g}" y="34" width="{width}" rx="2" {look}/>'
            f'<text x="{x + width + 5:g}" y="44">{html.escape(words)}</text>'
        )
        x += width + 24 + 6.4 * len(words)
    return "".join(parts)


def as_record(engine: Any) -> dict[str, Any]:
    """An engine's layers (`builder.layers.Layers`) as `--json` writes them, with bytes written."""
    record = dataclasses.asdict(engine)
    for layer in record["layers"]:
        batch = engine.batches[min(layer["profile"], len(engine.batches) - 1)]
        layer["written_bytes"] = written(layer, batch)
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
    groups = (
        (alone, WHY["unfused"].format(wide=" or ".join(sorted(wide)) or "their own type")),
        (rounds, WHY["rounds"]),
        (moves, WHY["reformat"]),
    )
    return [
        f"{len(names)} {why}: {', '.join(names[:4])}"
        + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for names, why in groups
        if names
    ]
