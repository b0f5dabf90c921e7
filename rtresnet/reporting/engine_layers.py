"""An engine's layers by stage, as SVG and as a table: precisions, and unfused operations.

The figure has one band for each stage, one frame for each block and one box for each layer, in the
order of execution. A wide box computes (a convolution, a matrix product); a narrow one only moves,
converts, adds or rounds. A stripe below it is the type that it writes, if that differs. It needs
no plotting library and follows the reader's light or dark mode, alone and in a page.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rtresnet.core.reporter import plural
from rtresnet.core.serialization import to_builtins
from rtresnet.reporting import pages

if TYPE_CHECKING:
    from rtresnet.builder.layers import Layer, Layers

UNFUSED = (
    "Adds in separate layers: the convolution before each writes its sums to memory in {wide}, "
    "and this layer reads them again"
)
ROUNDS = (
    "Q/DQ pairs that only round: no layer writes their int8, so they cost accuracy without a "
    "speed-up"
)
COLOURS = {"Int8": "#10b981", "Half": "#3b82f6", "BFloat16": "#8b5cf6", "Float": "#f59e0b"}
OTHER = "#6b7280"
WIDTH, MARGIN = 920, 16
WIDE, NARROW, GAP = 52, 13, 3  # widths of a compute box, another box, and the gap between boxes
ROW, TITLE, BAND = 64, 26, 14  # heights of a frame, a stage's title, and the gap between stages


def draw(engine: Layers, title: str) -> str:
    """Draw the layers of the first optimization profile.

    Args:
        engine: The layers kept next to a plan.
        title: A line on the engine, shown on top.

    Returns:
        An <svg> element.

    Raises:
        UnavailableError: Jinja2 is not installed.
    """
    bands, y = [], 64.0
    for stage, members in _stages(engine):
        frames = list(_frames(engine, members, y + TITLE))
        about = _summary(members, engine.batches[0])
        bands.append({"stage": stage, "about": about, "y": y, "frames": frames})
        y = float(str(frames[-1]["y"])) + ROW + BAND
    return pages.render(
        "engine.svg", title=title, bands=bands, legend=list(_legend(engine)), width=WIDTH, height=y
    )


def written(layer: Layer, batch: int) -> int:
    """Return bytes that a layer writes at a batch."""
    return sum(tensor.bytes(batch) or 0 for tensor in layer.outputs)


def _stages(engine: Layers) -> list[tuple[str, list[Layer]]]:
    """Return the layers of the first profile in which data passes."""
    layers = [x for x in engine.layers if x.profile == 0 and x.role != "idle"]
    return [(stage, list(group)) for stage, group in groupby(layers, key=lambda x: x.stage)]


def _computes(layer: Layer) -> bool:
    return layer.role in ("conv", "matmul")


def _precision(layer: Layer) -> str:
    """Return the type a layer computes in: a kernel's first input, else the output."""
    tensors = layer.inputs if _computes(layer) else layer.outputs
    return tensors[0].dtype if tensors else ""


def _stripe(layer: Layer) -> str:
    """Return the type that a kernel writes, if it differs from the one it computes in."""
    if not _computes(layer) or not layer.outputs:
        return ""
    return layer.outputs[0].dtype if layer.outputs[0].dtype != _precision(layer) else ""


def _unfused(layer: Layer, engine: Layers) -> bool:
    return not _computes(layer) and bool(set(engine.adds) & set(layer.nodes))


def _width(layer: Layer) -> int:
    return WIDE if _computes(layer) else NARROW


def _types(layer: Layer, separator: str) -> str:
    sides = (layer.inputs, layer.outputs)
    return separator.join("+".join(dict.fromkeys(t.dtype for t in side)) for side in sides)


def _summary(members: Sequence[Layer], batch: int) -> str:
    counts = Counter(_precision(layer) for layer in members if _computes(layer))
    parts = [", ".join(f"{count} in {dtype}" for dtype, count in counts.items())]
    if others := len(members) - counts.total():
        parts.append(f"{others} other{'s' * (others > 1)}")
    parts.append(f"writes {sum(written(x, batch) for x in members) / 1e6:.1f} MB at batch {batch}")
    return "; ".join(filter(None, parts))


def _frames(engine: Layers, members: Sequence[Layer], y: float) -> Iterator[dict[str, object]]:
    """Return the blocks of a stage, wrapped into rows."""
    x = float(MARGIN)
    for block, group in groupby(members, key=lambda layer: layer.block):
        layers = list(group)
        width = sum(_width(layer) + GAP for layer in layers) - GAP + 12
        if x > MARGIN and x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + ROW
        boxes, offset = [], x + 6
        for layer in layers:
            first, *rest = layer.operation.split(" + ")
            lines = [first.replace("matmul", "product"), *(["+".join(rest)] if rest else [])]
            boxes.append(
                {
                    "x": offset, "width": _width(layer), "unfused": _unfused(layer, engine),
                    "fill": COLOURS.get(_precision(layer), OTHER),
                    "stripe": COLOURS.get(_stripe(layer), OTHER) if _stripe(layer) else "",
                    "lines": lines if _computes(layer) else [],
                    "hint": f"{layer.operation}\n{_types(layer, ' to ')}, writes "
                    f"{written(layer, engine.batches[0]):,} bytes\n" + ", ".join(layer.nodes),
                }
            )  # fmt: skip
            offset += _width(layer) + GAP
        yield {"block": block, "x": x, "y": y, "width": width, "boxes": boxes}
        x += width + 6


def _legend(engine: Layers) -> Iterator[dict[str, object]]:
    layers = [layer for _, members in _stages(engine) for layer in members]
    entries: list[tuple[str, dict[str, object]]] = [
        (dtype, {"fill": COLOURS.get(dtype, OTHER)})
        for dtype in dict.fromkeys(map(_precision, layers))
        if dtype
    ]
    entries.append(("adds, converts, rounds or moves", {"width": NARROW, "translucent": True}))
    if any(_unfused(layer, engine) for layer in layers):
        look: dict[str, object] = {"width": NARROW, "fill": "none", "unfused": True}
        entries.append(("an Add that did not fuse", look))
    if any(map(_stripe, layers)):
        entries.append(("stripe: output type", {"height": 5}))
    x = float(MARGIN)
    for words, changes in entries:
        look = {"x": x, "words": words, "width": WIDE // 2, "height": 12, "fill": OTHER} | changes
        yield {"translucent": False, "unfused": False} | look
        x += float(str(look["width"])) + 24 + 6.4 * len(words)


def with_written_bytes(engine: Layers) -> dict[str, object]:
    """Return the layers as --json writes them, each with the bytes that it writes."""
    record: dict[str, Any] = to_builtins(engine)
    for layer, entry in zip(engine.layers, record["layers"], strict=True):
        batch = engine.batches[min(layer.profile, len(engine.batches) - 1)]
        entry["written_bytes"] = written(layer, batch)
    return record


def lines(engine: Layers) -> Iterator[str]:
    """Return the first profile's layers in 80 columns, and the causes of lost time or accuracy."""
    batch = engine.batches[0]

    def megabytes(layers: Sequence[Layer]) -> float:
        return sum(written(layer, batch) for layer in layers) / 1e6

    yield f"layers in order, with the MB that they write at batch {batch}:"
    layers = []
    for stage, members in _stages(engine):
        layers += members
        yield f"{stage}: {plural(len(members), 'layer')}, {megabytes(members):.1f} MB"
        for layer in members:
            shape = "x".join(map(str, layer.outputs[0].shape[1:] if layer.outputs else ()))
            line = (
                f"  {layer.block[:9]:<9} {layer.operation.replace(' + ', '+')[:31]:<31} "
                f"{_types(layer, '>'):<15.15} {shape:>11.11} {megabytes([layer]):6.2f}"
            )
            yield line.rstrip()
    memory = ""
    if engine.activations:
        memory = f"; activation memory {engine.activations[0] / 1e6:.1f} MB"
    yield (
        f"total: {plural(len(layers), 'layer')}, write {megabytes(layers):.1f} MB{memory} "
        "(largest batch)"
    )
    for problem in _problems(engine, layers):
        yield from textwrap.wrap(problem, 80, break_on_hyphens=False)


def _problems(engine: Layers, layers: Sequence[Layer]) -> Iterator[str]:
    """Return a line for each kind of layer that costs time or accuracy."""
    alone = [name for x in layers if not _computes(x) for name in x.nodes if name in engine.adds]
    wide = {t.dtype for x in layers if x.role == "conv" for t in x.outputs} - {"Int8"}
    rounds = [name for layer in layers for name in layer.rounds]
    moves = [layer.operation for layer in layers if layer.role == "reformat"]
    for names, problem in (
        (alone, UNFUSED.format(wide=" or ".join(sorted(wide)) or "their own type")),
        (rounds, ROUNDS),
        (moves, "layers that only move or convert data"),
    ):
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        if names:
            yield f"{len(names)} {problem}: {', '.join(names[:4])}{more}"
