"""Studies as table rows, figure lines and pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rtresnet.reporting.study_plots import Line, Panel
    from rtresnet.study.compare import Net


class LayerResponses(Protocol):
    """See `workflows.study.LayerResponses`."""

    @property
    def checkpoint(self) -> str:
        """The file."""
        ...

    @property
    def model(self) -> str:
        """Architecture."""
        ...

    @property
    def responses(self) -> dict[str, float]:
        """Standard deviation of each layer."""
        ...


def table(nets: Sequence[Net]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, a net a row; what a net costs only where nets of one depth differ."""
    from rtresnet.study.compare import ERRORS

    costs = len({net.multiply_adds for net in nets}) > len({net.spec.depth for net in nets})
    headings = ["net", "parameters", "training", "validation", "test", "n"]
    if costs:
        headings.insert(2, "mult-adds")
    rows = []
    for net in nets:
        lost = len(net.outcomes) - len(net.finished)
        none = "-" if net.finished else "diverged"
        cells = [net.label, f"{net.parameters:,}"]
        if costs:
            cells.append(f"{net.multiply_adds / 1e6:,.1f} M")
        cells += [str(net.error(name) or none) for name in ERRORS]
        rows.append([*cells, f"{len(net.finished)}" + (f", {lost} diverged" if lost else "")])
    return headings, rows


def _line(net: Net, name: str, colour: int, label: str, dashed: bool = False) -> list[Line]:
    from rtresnet.reporting.study_plots import Line

    curve = net.curve(name)
    if curve is None:
        return []
    return [
        Line(label=label, colour=colour, dashed=dashed, x=curve.steps, y=curve.mean, std=curve.std)
    ]


def plain_and_residual(nets: Sequence[Net]) -> list[Panel]:
    """Plain nets left, residual nets right; a colour a depth, training errors dashed."""
    from rtresnet.reporting.study_plots import Panel

    depths = list(dict.fromkeys(net.spec.depth for net in nets))
    panels = []
    for title, plain in (("plain nets", True), ("residual nets", False)):
        lines = []
        for net in nets:
            if (net.spec.shortcut is None) != plain:
                continue
            colour = depths.index(net.spec.depth)
            solid = _line(net, "val_top1", colour, net.label)
            lines += _line(net, "train_top1", colour, "" if solid else net.label, dashed=True)
            lines += solid
        panels.append(Panel(title=title, lines=lines))
    return panels


def training_and_validation(nets: Sequence[Net]) -> list[Panel]:
    """Training errors left, validation errors right; a colour a net."""
    from rtresnet.reporting.study_plots import Panel

    panels = []
    for title, name in (("training error", "train_top1"), ("validation error", "val_top1")):
        lines = [line for n, net in enumerate(nets) for line in _line(net, name, n, net.label)]
        if lines:
            panels.append(Panel(title=title, lines=lines))
    return panels


def response_figure(results: Sequence[LayerResponses], images: str) -> Any:
    """Figure 7: a line for each checkpoint."""
    from rtresnet.reporting.study_plots import Line, response_curves

    names = [entry.model for entry in results]
    lines = []
    for colour, entry in enumerate(results):
        values = list(entry.responses.values())
        name = entry.model
        if names.count(name) > 1:  # the folders distinguish two checkpoints of one net
            path = Path(entry.checkpoint)
            name = path.parent.name if path.name == "best.pt" else f"{path.parent.name}/{path.name}"
        dashed = entry.model.startswith("plain")
        x = range(1, len(values) + 1)
        lines.append(Line(label=name, colour=colour, dashed=dashed, x=x, y=values))
    plain = "; plain nets dashed" if any(line.dashed for line in lines) else ""
    subtitle = f"{images}; after batch norm, before ReLU and addition{plain}"
    return response_curves(lines, subtitle=subtitle)
