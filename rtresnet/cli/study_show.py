"""What `rtresnet study` shows: results turned into table rows and figure lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.cli import common

if TYPE_CHECKING:
    from rtresnet.reporting.study_plots import Line, Panel
    from rtresnet.study.compare import Net
    from rtresnet.study.runs import Outcome


def words(outcome: Outcome) -> str:
    """A run's result in a line."""
    if outcome.diverged:
        return f"diverged, {outcome.diverged}"
    val = "" if outcome.val_error is None else f"validation {outcome.val_error:.2f} %, "
    return f"error: training {outcome.train_error:.2f} %, {val}test {outcome.test_error:.2f} %"


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


def can_draw() -> bool:
    """Whether there can be a figure; says what is missing."""
    from rtresnet.core import hardware

    able = hardware.installed("matplotlib")
    if not able:
        common.note("no figure: pip install matplotlib, and run the same command again")
    return able


def short(data: str) -> str:
    """A data set's name for a figure: cifar10 for cifar10:DIR, a folder's or file's own name."""
    form, _, argument = data.partition(":")
    named = form if form in ("cifar10", "fashion-mnist", "synthetic", "digits") else ""
    return named or Path(argument or form).stem


def response_figure(results: list[dict[str, Any]], images: str) -> Any:
    """Figure 7 of the results of `study responses`, or None."""
    from rtresnet.reporting.study_plots import Line, response_curves

    if not can_draw():
        return None
    names = [entry["model"] for entry in results]
    lines = []
    for colour, entry in enumerate(results):
        values = list(entry["responses"].values())
        name = entry["model"]
        if names.count(name) > 1:  # two of one net are told apart by their folders
            path = Path(entry["checkpoint"])
            name = path.parent.name if path.name == "best.pt" else f"{path.parent.name}/{path.name}"
        dashed = entry["model"].startswith("plain")
        x = range(1, len(values) + 1)
        lines.append(Line(label=name, colour=colour, dashed=dashed, x=x, y=values))
    plain = "; plain nets dashed" if any(line.dashed for line in lines) else ""
    subtitle = f"{images}; after batch norm, before ReLU and addition{plain}"
    return response_curves(lines, subtitle=subtitle)
