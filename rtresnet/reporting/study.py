"""Studies as tables and figures: error curves side by side, and layer responses."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core.reporter import plural
from rtresnet.reporting.plots import GREY, PALETTE, subplots
from rtresnet.reporting.tables import DataTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rtresnet.study.ablations import CurveName, Net
    from rtresnet.workflows.study import LayerResponses
    from rtresnet.workflows.study_analysis import (
        CostResult,
        GradientsResult,
        LesionsResult,
        NetGradients,
    )
    from rtresnet.workflows.study_detection import BackboneRecord, DetectionStudyResult

SETTLED = 0.25  # share of a run that does not determine the height of the axes
SMALL = 8.5  # points
LABEL_ROOM = 0.045  # height of a line of small text, relative to the axes
LETTERS_AN_INCH = 15.2  # number of letters of small text per inch
ABOUT = (
    "Errors in %: mean and standard deviation over the seeds. Training error of the last epoch on "
    "the augmented images; validation and test errors of the epoch that was best on the "
    "held-out images."
)


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


def _head(drawing: Figure, title: str, subtitle: str) -> None:
    """Add a title and a smaller subtitle of as many lines as needed, and the space for both."""
    width, height = drawing.get_size_inches()
    lines = textwrap.wrap(subtitle, int(LETTERS_AN_INCH * width))
    drawing.suptitle(title + "\n" * len(lines), fontsize=12, x=0.1 / width, ha="left", va="top")
    drawing.text(
        0.1 / width, 1 - 0.33 / height, "\n".join(lines),
        fontsize=SMALL, color=GREY, ha="left", va="top",
    )  # fmt: skip


def error_curves(panels: Sequence[Panel], *, title: str, subtitle: str) -> Figure:
    """Draw errors in percent against steps: training dashed, validation solid (as figure 6).

    The nets are named at the ends of their solid lines. The first quarter of a run may run out
    of the axes at the top, as in the paper, because the ends of the lines matter.
    """
    drawing, grid = subplots(1, len(panels), 4.9 * len(panels), 4.3, share_y=True)
    _head(drawing, title, subtitle)
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
    return drawing


def _height(lines: Sequence[Line]) -> float:
    values = [
        y for line in lines for x, y in zip(line.x, line.y, strict=True)
        if x >= SETTLED * line.x[-1]
    ]  # fmt: skip
    return min(100.0, 1.12 * max(values, default=100.0)) or 1.0


def _name_ends(axes: Any, lines: Sequence[Line], top: float) -> None:
    """Label the lines at their right ends; labels that would overlap are moved."""
    ends = sorted((line for line in lines if line.label), key=lambda line: line.y[-1])
    room = LABEL_ROOM * top
    up, down = [min(line.y[-1], top) for line in ends], [min(line.y[-1], top) for line in ends]
    for position in range(1, len(ends)):
        up[position] = max(up[position], up[position - 1] + room)
        down[-1 - position] = min(down[-1 - position], down[-position] - room)
    for position, line in enumerate(ends):
        height = max((up[position] + down[position]) / 2, position * room)  # none below the axes
        axes.annotate(
            line.label,
            (1.0, height / top), xycoords="axes fraction", xytext=(5, 0),
            textcoords="offset points", fontsize=SMALL, va="center", annotation_clip=False,
            color=PALETTE[line.colour % len(PALETTE)],
        )  # fmt: skip


def _styles(axes: Any) -> None:
    """Return a legend of dashed and solid lines."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=GREY, linestyle="--", linewidth=1.1, label="training"),
        Line2D([], [], color=GREY, linewidth=1.8, label="validation"),
    ]
    axes.legend(handles=handles, frameon=False, fontsize=SMALL, loc="upper right")


def response_curves(lines: Sequence[Line], *, subtitle: str) -> Figure:
    """Draw standard deviations of 3x3 layers (figure 7): in layer order, and sorted below."""
    drawing, (order, magnitude) = subplots(2, 1, 7.2, 6.4)
    _head(drawing, "Layer responses", subtitle)
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
    return drawing


def table(nets: Sequence[Net]) -> DataTable:
    """Return a row for each net; multiply-adds only where nets of one depth differ in them."""
    from rtresnet.study.ablations import ERRORS

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
    return DataTable(headings=headings, rows=rows, about=ABOUT)


def _line(net: Net, name: CurveName, colour: int, label: str, dashed: bool = False) -> list[Line]:
    curve = net.curve(name)
    if curve is None:
        return []
    return [
        Line(label=label, colour=colour, dashed=dashed, x=curve.steps, y=curve.mean, std=curve.std)
    ]


def plain_and_residual(nets: Sequence[Net]) -> list[Panel]:
    """Draw plain nets on the left, residual nets on the right; training errors are dashed."""
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
    """Draw training errors on the left, validation errors on the right, one colour per net."""
    panels = []
    curves: tuple[tuple[str, CurveName], ...] = (
        ("training error", "train_top1"), ("validation error", "val_top1")
    )  # fmt: skip
    for title, name in curves:
        lines = [line for n, net in enumerate(nets) for line in _line(net, name, n, net.label)]
        if lines:
            panels.append(Panel(title=title, lines=lines))
    return panels


def response_table(entry: LayerResponses, data: str) -> DataTable:
    """Return a row for each 3x3 layer of one checkpoint."""
    return DataTable(
        title=f"{entry.model}, {entry.checkpoint}, {plural(entry.n, 'image')} of {data}",
        headings=("layer", "name", "std of response"),
        rows=[(n, name, value) for n, (name, value) in enumerate(entry.responses.items(), 1)],
    )


def response_figure(results: Sequence[LayerResponses], images: str) -> Figure:
    """Draw figure 7 with a line for each checkpoint."""
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


def cost_table(result: CostResult) -> DataTable:
    """Return a row for each net."""
    return DataTable(
        headings=("net", "input", "parameters", "FC %", "mult-adds", "FC %", "of VGG-19 %"),
        rows=[
            (
                net.model, f"{net.size}x{net.size}", f"{net.parameters:,}",
                f"{100 * net.fc_parameters:.1f}", f"{net.multiply_adds / 1e9:.3f} G",
                f"{100 * net.fc_multiply_adds:.2f}", f"{100 * net.of_vgg19:.1f}",
            )
            for net in result.nets
        ],
        about="For one image; VGG-19 at 224x224. FC: the share of the fully connected layers.",
    )  # fmt: skip


def cost_figure(result: CostResult) -> Figure:
    """Draw the multiply-adds of the ImageNet nets, the share of FC layers in another colour."""
    nets = [net for net in result.nets if net.size == 224 and not net.model.endswith("_bn")]
    drawing, (axes,) = subplots(1, 1, 7.2, 0.6 + 0.32 * len(nets))
    _head(drawing, "Multiply-adds of an image of 224x224", "with each net's share of VGG-19's")
    for position, net in enumerate(nets):
        total = net.multiply_adds / 1e9
        colour = PALETTE[0] if net.model.startswith("resnet") else GREY
        axes.barh(position, total, color=colour, height=0.7)
        axes.text(total, position, f"  {total:.2f} G, {100 * net.of_vgg19:.1f} %", va="center",
                  fontsize=SMALL)  # fmt: skip
    axes.set_yticks(range(len(nets)), [net.model for net in nets], fontsize=SMALL)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("multiply-adds, G")
    return drawing


def gradient_table(result: GradientsResult) -> DataTable:
    """Return a row for each net and measurement."""
    rows = []
    for net in result.nets:
        for point in net.points:
            values = list(point.norms.values())
            rows.append((
                net.model, point.step, f"{point.loss:.3f}", f"{values[0]:.3g}",
                f"{values[-1]:.3g}", f"{point.ratio:,.3g}",
            ))  # fmt: skip
    return DataTable(
        headings=("net", "step", "loss", "first layer", "last layer", "first / last"),
        rows=rows,
        about="L2 norm of the loss's gradient for the weights of the first and the last 3x3 "
        "convolution.",
    )


def gradient_figure(result: GradientsResult, data: str) -> Figure:
    """Draw the norms by layer on a logarithmic axis, at initialization and after the run."""
    last = max(point.step for net in result.nets for point in net.points)
    shown = [0, -1] if last else [0]
    drawing, grid = subplots(len(shown), 1, 7.2, 1.2 + 2.8 * len(shown))
    _head(drawing, "Gradients by layer",
          f"L2 norm for the weights of each 3x3 convolution; batch of {result.batch} images of "
          f"{data}, seed {result.seed}; plain nets dashed")  # fmt: skip
    for axes, position in zip(grid, shown, strict=True):
        for colour, net in enumerate(result.nets):
            _gradient_line(axes, net, position, colour)
        axes.set(yscale="log", ylabel="norm")
        title = "at initialization" if position == 0 else f"after {last} steps"
        axes.set_title(title, fontsize=10, loc="left")
    grid[-1].set_xlabel("depth of the layer, 0 first, 1 last")
    grid[0].legend(frameon=False, fontsize=SMALL, ncols=2)
    return drawing


def _gradient_line(axes: Any, net: NetGradients, position: int, colour: int) -> None:
    values = list(net.points[position].norms.values())
    x = [index / max(len(values) - 1, 1) for index in range(len(values))]
    style = "--" if net.model.startswith("plain") else "-"
    axes.plot(x, values, style, color=PALETTE[colour % len(PALETTE)], label=net.model,
              linewidth=1.6)  # fmt: skip


def lesion_table(result: LesionsResult) -> DataTable:
    """Return a row for each block."""
    return DataTable(
        headings=("without block", "top-1 %", "drop", "alone in INT8, dB"),
        rows=[
            (block.block, f"{block.top1:.2f}", f"{block.drop:.2f}", f"{block.int8_db:.1f}")
            for block in result.blocks
        ],
        about=f"The whole net: {result.top1:.2f} % of {result.n:,} images. INT8: signal-to-noise "
        f"ratio at the logits with this block alone in INT8, ranges from "
        f"{result.calibration_images} images."
        + "".join(f" Note: {line}." for line in result.remarks),
    )


def lesion_figure(result: LesionsResult, data: str) -> Figure:
    """Draw the accuracy without each block, and below it the INT8 noise of that block."""
    drawing, (accuracy, noise) = subplots(2, 1, 7.2, 5.6)
    _head(drawing, f"{result.model} without one of its blocks",
          f"{result.n:,} images of {data}; line: the whole net, {result.top1:.2f} %")  # fmt: skip
    names = [block.block.removeprefix("layer") for block in result.blocks]
    stages = [name.split(".")[0] for name in names]
    order = list(dict.fromkeys(stages))
    colours = [PALETTE[order.index(stage) % len(PALETTE)] for stage in stages]
    accuracy.bar(range(len(names)), [block.top1 for block in result.blocks], color=colours)
    accuracy.axhline(result.top1, color=GREY, linewidth=1)
    accuracy.set(ylabel="top-1 without the block, %", ylim=(0, 100))
    noise.bar(range(len(names)), [block.int8_db for block in result.blocks], color=colours)
    noise.set(ylabel="block alone in INT8, dB", xlabel="block, as stage.position")
    noise.set_title("signal-to-noise ratio at the logits: higher is better", fontsize=SMALL,
                    loc="left")  # fmt: skip
    for axes in (accuracy, noise):
        axes.set_xticks(range(len(names)), names, fontsize=SMALL if len(names) < 24 else 5,
                        rotation=0 if len(names) < 13 else 90)  # fmt: skip
    return drawing


def detection_table(result: DetectionStudyResult) -> DataTable:
    """Return a row for each backbone."""
    rows = []
    for record in result.backbones:
        lost = sum(run.diverged is not None for run in record.runs)
        finished = len(record.runs) - lost
        none = "-" if finished else "diverged"
        rows.append((
            record.backbone, f"{record.parameters:,}",
            *(str(value or none) for value in (record.ap50, record.ap, record.voc07)),
            f"{finished}" + (f", {lost} diverged" if lost else ""),
        ))  # fmt: skip
    return DataTable(
        headings=("backbone", "parameters", "AP50 %", "AP %", "VOC07 %", "n"),
        rows=rows,
        about="Average precision on the test images in %, mean and standard deviation over the "
        "seeds; parameters of the whole detector.",
    )


def detection_figure(result: DetectionStudyResult) -> Figure:
    """Average precision by backbone, a dot for each seed, and the training loss against steps."""
    drawing, (bars, losses) = subplots(1, 2, 9.8, 4.0)
    _head(drawing, "Backbones of Faster R-CNN under one recipe", result.note)
    for position, record in enumerate(result.backbones):
        colour = PALETTE[position % len(PALETTE)]
        for offset, name, alpha in ((-0.2, "ap50", 1.0), (0.2, "ap", 0.55)):
            _precision_bar(bars, record, position + offset, name, colour, alpha)
        curves = [run for run in record.runs if run.loss]
        for seed, run in enumerate(curves):
            losses.plot(run.steps, run.loss, color=colour, linewidth=1.4, alpha=0.85,
                        label="" if seed else record.backbone)  # fmt: skip
    names = [record.backbone for record in result.backbones]
    bars.set_xticks(range(len(names)), names, fontsize=SMALL)
    bars.set(ylabel="%", ylim=(0, 100))
    bars.set_title("AP50 (dark) and AP (light) on the test images", fontsize=10, loc="left")
    losses.set(xlabel="steps", ylim=(0, None))
    losses.set_title("training loss", fontsize=10, loc="left")
    if any(run.loss for record in result.backbones for run in record.runs):
        losses.legend(frameon=False, fontsize=SMALL)
    return drawing


def _precision_bar(
    axes: Any, record: BackboneRecord, x: float, name: str, colour: str, alpha: float
) -> None:
    spread = getattr(record, name)
    if spread is None:
        return
    axes.bar(x, spread.mean, width=0.36, color=colour, alpha=alpha)
    values = [getattr(run.measured, name) for run in record.runs if run.measured is not None]
    if len(values) > 1:
        axes.plot([x] * len(values), values, "o", color="black", markersize=3.5)
    axes.text(x, max(values) + 2.5, f"{spread.mean:.1f}", ha="center", fontsize=SMALL)
