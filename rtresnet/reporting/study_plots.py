"""Figures of the studies: error curves side by side, and layer responses."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rtresnet.core.errors import missing_package
from rtresnet.reporting.plots import COLOURS

SETTLED = 0.25  # of a run: what came before does not set the height of the axes
# Six nets and more, grey last.
PALETTE = (*COLOURS[:5], "#ec4899", "#06b6d4", "#84cc16", "#a16207", COLOURS[5])
SMALL = 8.5  # points
LABEL_ROOM = 0.045  # of the axes' height that a line of small text takes
LETTERS_AN_INCH = 15.2  # of small text


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a figure.

    Attributes:
        label: Next to its end or in the legend; "" for a second line of the same thing.
        colour: Index of a colour.
        dashed: Training errors, or plain nets.
        x, y: Points.
        std: Half the width of a band around `y`, or None.
    """

    label: str
    colour: int
    dashed: bool
    x: Sequence[float]
    y: Sequence[float]
    std: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Axes with a heading."""

    title: str
    lines: Sequence[Line]


def _axes(rows: int, columns: int, width: float, height: float, *, share: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_package("matplotlib", "plots") from None
    drawn = Figure(figsize=(width, height), layout="constrained")
    grid = drawn.subplots(rows, columns, squeeze=False, sharey=share == "y")
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return drawn, list(grid.flat)


def _head(drawn: Any, title: str, subtitle: str) -> None:
    """Title and, smaller, as many lines of subtitle as it needs; room is made for both."""
    width, height = drawn.get_size_inches()
    lines = textwrap.wrap(subtitle, int(LETTERS_AN_INCH * width))
    drawn.suptitle(title + "\n" * len(lines), fontsize=12, x=0.1 / width, ha="left", va="top")
    drawn.text(
        0.1 / width, 1 - 0.33 / height, "\n".join(lines),
        fontsize=SMALL, color=COLOURS[5], ha="left", va="top",
    )  # fmt: skip


def error_curves(panels: Sequence[Panel], *, title: str, subtitle: str) -> Any:
    """Errors in percent against steps, training dashed and validation solid (as figure 6).

    The nets are named at the ends of their solid lines. The first quarter of a run may run out
    of the axes at the top, as in the paper: what counts is where the lines end.
    """
    drawn, grid = _axes(1, len(panels), 4.9 * len(panels), 4.3, share="y")
    _head(drawn, title, subtitle)
    top = _height([line for panel in panels for line in panel.lines])
    for axes, panel in zip(grid, panels, strict=True):
        axes.set_title(panel.title, fontsize=10, loc="left")
        for line in panel.lines:
            style = {"linestyle": "--", "linewidth": 1.1} if line.dashed else {"linewidth": 1.8}
            colour = PALETTE[line.colour % len(PALETTE)]
            dot = "o" if len(line.x) == 1 else None
            axes.plot(line.x, line.y, color=colour, marker=dot, markersize=3.5, **style)
            if line.std is not None:
                low = [y - s for y, s in zip(line.y, line.std, strict=True)]
                high = [y + s for y, s in zip(line.y, line.std, strict=True)]
                axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="steps", ylim=(0, top), xlim=(0, None))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.xaxis.get_major_locator().set_params(nbins=6, integer=True)
        axes.margins(x=0)
        _name_ends(axes, panel.lines, top)
    grid[0].set_ylabel("error, %")
    if any(line.dashed for panel in panels for line in panel.lines):
        _styles(grid[-1])
    return drawn


def _height(lines: Sequence[Line]) -> float:
    values = [
        y for line in lines for x, y in zip(line.x, line.y, strict=True)
        if x >= SETTLED * line.x[-1]
    ]  # fmt: skip
    return min(100.0, 1.12 * max(values, default=100.0)) or 1.0


def _name_ends(axes: Any, lines: Sequence[Line], top: float) -> None:
    """Labels right of the lines' ends, moved apart where they would lie on each other."""
    ends = sorted((line for line in lines if line.label), key=lambda line: line.y[-1])
    room = LABEL_ROOM * top
    up, down = [min(line.y[-1], top) for line in ends], [min(line.y[-1], top) for line in ends]
    for place in range(1, len(ends)):
        up[place] = max(up[place], up[place - 1] + room)
        down[-1 - place] = min(down[-1 - place], down[-place] - room)
    for place, line in enumerate(ends):
        height = max((up[place] + down[place]) / 2, place * room)  # none below the axes
        axes.annotate(
            line.label,
            (1.0, height / top), xycoords="axes fraction", xytext=(5, 0),
            textcoords="offset points", fontsize=SMALL, va="center", annotation_clip=False,
            color=PALETTE[line.colour % len(PALETTE)],
        )  # fmt: skip


def _styles(axes: Any) -> None:
    """A legend of what dashed and solid mean."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[5], linestyle="--", linewidth=1.1, label="training"),
        Line2D([], [], color=COLOURS[5], linewidth=1.8, label="validation"),
    ]
    axes.legend(handles=handles, frameon=False, fontsize=SMALL, loc="upper right")


def response_curves(lines: Sequence[Line], *, subtitle: str) -> Any:
    """Standard deviations of 3x3 layers (figure 7): in layer order, and below sorted."""
    drawn, (order, magnitude) = _axes(2, 1, 7.2, 6.4, share="none")
    _head(drawn, "Layer responses", subtitle)
    for line in lines:
        style = {
            "color": PALETTE[line.colour % len(PALETTE)],
            "linestyle": "--" if line.dashed else "-",
            "linewidth": 1.6,
            "marker": "o" if len(line.x) <= 60 else None,
            "markersize": 2.5,
        }
        order.plot(line.x, line.y, label=line.label, **style)
        magnitude.plot(line.x, sorted(line.y, reverse=True), **style)
    order.set_title("in layer order", fontsize=10, loc="left")
    magnitude.set_title("sorted by magnitude", fontsize=10, loc="left")
    for axes in (order, magnitude):
        axes.set(ylabel="standard deviation", ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
    columns = 2 if len(lines) < 6 else 3
    room = 1 + 0.1 * (1 + (len(lines) - 1) // columns)  # above the lines, for the legend
    order.set_ylim(0, room * max(max(line.y) for line in lines))
    order.set_xlabel("3x3 layer")
    magnitude.set_xlabel("rank")
    order.legend(frameon=False, fontsize=SMALL, loc="upper right", ncols=columns)
    return drawn
