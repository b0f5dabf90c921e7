"""Figures of pages as SVG: text stays text, and black becomes the page's text colour.

Figures of the report are small with large text, so that they can be read on a phone. Elements that
show data have an id (`artifact-0`, `tail-0`, `stage-0-1`), which tests count.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtresnet.core import atomic_io
from rtresnet.core.errors import missing_package
from rtresnet.reporting.results import Results, pareto

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from rtresnet.core.classification import ClassificationReport
    from rtresnet.workflows.result_files import ProfileRecord, Search

COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#6b7280")
GREY = COLOURS[5]
# Six nets and more, grey last.
PALETTE = (*COLOURS[:5], "#ec4899", "#06b6d4", "#84cc16", "#a16207", GREY)
SHARES = (0.5, 0.9, 0.95, 0.99, 0.999)
BINS = 40


def subplots(
    rows: int, columns: int, width: float, height: float, *, share_y: bool = False
) -> tuple[Figure, list[Any]]:
    """Return a figure and its axes, row by row, on matplotlib's file-only backend.

    Args:
        rows, columns: Number of rows and columns of axes.
        width, height: In inches.
        share_y: Whether all axes have the same range of y.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_package("matplotlib", "plots") from None
    drawing = Figure(figsize=(width, height), layout="constrained")
    grid = list(drawing.subplots(rows, columns, squeeze=False, sharey=share_y).flat)
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return drawing, grid


def figure(width: float = 6.4, height: float = 3.6) -> tuple[Figure, Any]:
    """Return a figure with one pair of axes; see `subplots`."""
    drawing, (axes,) = subplots(1, 1, width, height)
    return drawing, axes


def save_png(drawing: Figure, path: Path) -> None:
    """Write a figure as PNG, at 150 dots an inch."""
    with atomic_io.atomic_path(path) as temporary:
        drawing.savefig(temporary, format="png", dpi=150)


def svg(drawing: Figure, label: str) -> str:
    """Return the figure as an <svg> element for a page, with `label` for screen readers."""
    import matplotlib

    out = io.StringIO()
    # A fixed salt: the same numbers give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rtresnet"}):
        drawing.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    # matplotlib's own metadata contains addresses outside the page, which a page does not need.
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = text.replace("#000000", "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Text without a colour is black, whatever the page's style is.
    text = text.replace("<text ", '<text fill="currentColor" ')
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def plain(name: str) -> str:
    """Escape a name for a label: matplotlib would read text between two $ as TeX."""
    return name.replace("$", r"\$")


def _from_zero(axes: Any) -> tuple[float, float]:
    """Return limits of y from zero to above every curve, so that no marker is clipped."""
    return 0, 1.08 * max(float(max(line.get_ydata())) for line in axes.lines) or 1


def training_figure(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw training and held-out error, and the learning rate, against epochs (as figure 6)."""
    drawing, axes = figure()
    epochs = [entry["epoch"] for entry in log]
    for name, label, style in (("train_top1", "training", "--"), ("val_top1", "held out", "-")):
        if any(entry[name] is None for entry in log):
            continue
        errors = [100 - entry[name] for entry in log]
        dots = {"marker": "o", "markersize": 3.5} if len(log) <= 40 else {}
        axes.plot(epochs, errors, style, color=COLOURS[0], label=label, **dots)
    axes.set(xlabel="epoch", ylabel="error, %", ylim=_from_zero(axes))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if all(entry.get("lr") for entry in log) and len(log) > 1:
        rate, rates = axes.twinx(), [entry["lr"] for entry in log]
        rate.plot(epochs, rates, color=GREY, linewidth=1, alpha=0.8)
        rate.set_ylabel("learning rate", color=GREY)
        if len(set(rates)) < len(rates) / 2:  # one that falls tenfold in steps
            rate.set_yscale("log")
        else:
            rate.set_ylim(_from_zero(rate))
        rate.spines[["top"]].set_visible(False)
        rate.tick_params(colors=GREY, which="both")
    axes.legend(frameon=False)
    return drawing


def progress_figure(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss and images/s against epochs."""
    drawing, (loss, speed) = subplots(1, 2, 6.4, 2.6)
    epochs = [entry["epoch"] for entry in log]
    dots = {"marker": "o", "markersize": 3.5} if len(log) <= 40 else {}
    for axes, name, label, colour in (
        (loss, "loss", "training loss", COLOURS[0]),
        (speed, "images_per_second", "images/s", COLOURS[2]),
    ):
        axes.plot(epochs, [entry[name] for entry in log], color=colour, gid=name, **dots)
        axes.set(xlabel="epoch", ylabel=label, ylim=_from_zero(axes))
        axes.xaxis.get_major_locator().set_params(integer=True)
    return drawing


def reliability(report: ClassificationReport) -> str:
    """Draw accuracy against confidence, and the number of images in each bin."""
    drawing, (diagram, counts) = subplots(1, 2, 6.4, 3.0)
    for index, entry in enumerate(report.bins):
        width, middle = entry.high - entry.low, (entry.low + entry.high) / 2
        counts.bar(100 * middle, entry.n, 96 * width, color=GREY)
        if entry.accuracy is not None and entry.confidence is not None:
            diagram.bar(100 * middle, 100 * entry.accuracy, 96 * width, color=COLOURS[0],
                        alpha=0.75, gid=f"bin-{index}")  # fmt: skip
            diagram.plot([100 * entry.confidence], [100 * entry.accuracy], "o", markersize=4,
                         color="black")  # fmt: skip
    diagram.plot([0, 100], [0, 100], "--", color="#888888", linewidth=1)
    diagram.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 103))
    counts.set(xlabel="confidence, %", ylabel="images", xlim=(0, 100))
    return svg(drawing, "accuracy against confidence")


def search_figure(searches: Sequence[tuple[str, Search]]) -> Figure:
    """Draw p99 and median against the load, for searches of one kind with one bound.

    Args:
        searches: (name of the artifact, its search).
    """
    drawing, axes = figure()
    for index, (name, search) in enumerate(searches):
        colour = COLOURS[index % len(COLOURS)]
        points = [point for point in search["points"] if point["p99"] is not None]
        loads = [point["load"] for point in points]
        axes.plot(loads, [p["p99"] for p in points], "o-", color=colour, markersize=4.5,
                  label=f"{plain(name)}, p99", gid=f"search-{index}")  # fmt: skip
        axes.plot(loads, [p["median"] for p in points], ":", color=colour,
                  label=f"{plain(name)}, median")  # fmt: skip
        if search["best"] is not None:
            axes.axvline(search["best"], color=colour, linewidth=0.8, alpha=0.6)
    axes.axhline(searches[0][1]["p99_ms"], color="#888888", linewidth=1)
    load = "images per batch" if searches[0][1]["what"] == "batch" else "requests per second"
    axes.set(xlabel=load, ylabel="latency, ms", ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)
    return drawing


def latency_distribution(samples: Mapping[str, Sequence[float]], unit: str) -> str:
    """Draw the share of requests answered within a latency, a curve per artifact, up to p99.5.

    The axis is logarithmic if a long tail would leave no room for most requests.
    """
    import numpy as np

    drawing, axes = figure()  # raises if matplotlib is not installed
    from matplotlib.ticker import LogLocator, NullLocator

    for index, (name, values) in enumerate(samples.items()):
        ordered = np.sort(values)
        share = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
        axes.plot(ordered, share, color=COLOURS[index % len(COLOURS)], linewidth=1.8,
                  label=f"{plain(name)} (n={len(ordered)})")  # fmt: skip
    right = max(np.quantile(values, 0.995) for values in samples.values())
    axes.set(xlabel=f"latency, {unit}", ylabel="requests answered, %", ylim=(0, 100.5))
    axes.set_xlim(0, right * 1.03)
    if right > 5 * max(np.median(values) for values in samples.values()):
        axes.set_xscale("log")
        axes.set_xlim(0.9 * min(min(values) for values in samples.values()), right * 1.03)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"latency, {unit}, logarithmic")
    for level in (50, 99):
        axes.axhline(level, linewidth=0.8, linestyle=":", color="#888888")
    axes.legend(frameon=False, loc="lower right")
    return svg(drawing, "share of requests answered within a latency")


def colours(results: Results) -> dict[str, str]:
    """Return the colour of each artifact in every figure, by its name."""
    return {
        artifact.name: PALETTE[index % len(PALETTE)]
        for index, artifact in enumerate(results.artifacts)
    }


def tradeoff(results: Results, batch: int) -> str | None:
    """Draw top-1 or AP against median latency with the Pareto front; None without accuracy."""
    scored = [(a, e) for a, e in results.streams(batch) if a.score is not None]
    if not scored:
        return None
    measure = scored[0][0].measure
    streams = [(a, e) for a, e in scored if a.measure == measure]
    points = [(entry["latency"]["median"], artifact.score or 0.0) for artifact, entry in streams]
    front = [points[index] for index in pareto(points)]
    drawing, axes = figure(4.6, 3.2)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.plot(*zip(*front, strict=True), color=GREY, linewidth=1.2, zorder=1,
              drawstyle="steps-post", gid="front")  # fmt: skip
    for index, ((artifact, _), point) in enumerate(zip(streams, points, strict=True)):
        colour = colours(results)[artifact.name]
        axes.scatter(
            *point, s=60, color=colour if point in front else "none", edgecolors=colour,
            linewidths=1.8, zorder=3, label=plain(artifact.name), gid=f"artifact-{index}",
        )  # fmt: skip
    axes.set(xlabel=f"median latency of a batch of {batch}, ms", ylabel=f"{measure}, %")
    axes.set_xlim(0, 1.08 * max(p[0] for p in points))
    values = [p[1] for p in points]
    room = max(0.5, 0.6 * (max(values) - min(values)))
    axes.set_ylim(max(0, min(values) - room), min(100.0, max(values)) + room / 2)
    # Outside the axes: the legend's markers look like data inside them.
    drawing.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    return svg(drawing, f"{measure} against median latency, one point per artifact")


def precision_recall(curves: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Draw precision against recall, a line for each of up to 20 classes.

    Args:
        curves: Class, and precision at recalls 0, 0.01, ... 1.
    """
    drawing, axes = figure(6.4, 3.8)
    for index, (name, precision) in enumerate(curves[:20]):
        axes.plot(
            range(len(precision)), [100 * value for value in precision], linewidth=1.5,
            color=PALETTE[index % len(PALETTE)], label=plain(name),
        )  # fmt: skip
    axes.set(xlabel="recall, %", ylabel="precision, %", xlim=(0, 100), ylim=(0, 103))
    if curves:
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower left")
    return svg(drawing, "precision against recall")


def _samples(results: Results, batch: int) -> list[tuple[str, str, np.ndarray]]:
    """Return (name, colour, sorted milliseconds) of the artifacts with stored samples."""
    import numpy as np

    return [
        (artifact.name, colours(results)[artifact.name], np.sort(samples))
        for artifact, entry in results.streams(batch)
        if len(samples := entry.get("samples") or ()) > 1
    ]


def tails(results: Results, batch: int) -> str | None:
    """Draw latency against percentile on a scale that shows the tail; None without samples."""
    import numpy as np

    measured = _samples(results, batch)
    if not measured:
        return None
    drawing, axes = figure(4.4, 3.0)
    for index, (name, colour, samples) in enumerate(measured):
        n = len(samples)
        beyond = 1 - (np.arange(n) + 0.5) / n
        axes.plot(-np.log10(beyond), samples, color=colour, linewidth=1.8,
                  label=f"{plain(name)} (n={n})", gid=f"tail-{index}")  # fmt: skip
    most = max(len(samples) for _, _, samples in measured)
    shown = [0.0, *(s for s in SHARES if most * (1 - s) >= 1 - 1e-9)]
    axes.set_xticks([-np.log10(1 - s) for s in shown], [f"{100 * s:g}" for s in shown])
    axes.set(xlabel="percentile", ylabel=f"latency, ms per batch of {batch}", ylim=(0, None))
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    return svg(drawing, "latency against percentile")


def histogram(results: Results, batch: int) -> str | None:
    """Draw the share of requests by latency; the last bin includes all slower ones."""
    import numpy as np

    measured = _samples(results, batch)
    if not measured:
        return None
    drawing, axes = figure(4.4, 3.0)
    low = min(samples[0] for _, _, samples in measured)
    high = max(float(np.quantile(samples, 0.99)) for _, _, samples in measured)
    edges = np.linspace(low, max(high, low * 1.01), BINS + 1)
    for index, (name, colour, samples) in enumerate(measured):
        counts, _ = np.histogram(np.clip(samples, edges[0], edges[-1]), edges)
        share = 100 * counts / len(samples)
        axes.stairs(share, edges, fill=True, alpha=0.35, color=colour)
        axes.stairs(share, edges, color=colour, linewidth=1.4, label=plain(name),
                    gid=f"histogram-{index}")  # fmt: skip
    axes.set(xlabel=f"latency, ms per batch of {batch}", ylabel="requests, %")
    axes.legend(frameon=False, fontsize=9)
    return svg(drawing, "histogram of latencies")


def batches(
    results: Results, name: Literal["median", "images_per_second"], label: str
) -> str | None:
    """Return a field of the latency against the batch; None if there is one batch only."""
    if len(results.batches) < 2:
        return None
    drawing, axes = figure(4.4, 3.0)
    for index, artifact in enumerate(results.artifacts):
        points = sorted(
            (entry["batch"], value)
            for other, entry in results.streams()
            if other is artifact and (value := entry["latency"].get(name)) is not None
        )
        if points:
            axes.plot(
                *zip(*points, strict=True), marker="o", markersize=4.5, linewidth=1.6,
                color=colours(results)[artifact.name], label=plain(artifact.name),
                gid=f"batch-{index}",
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(results.batches, [str(batch) for batch in results.batches])
    axes.minorticks_off()
    axes.set(xlabel="batch", ylabel=label, ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)
    return svg(drawing, f"{label} against batch")


def stages(profiles: Sequence[tuple[str, ProfileRecord]]) -> str:
    """Draw a bar per profile, divided into stages, in milliseconds."""
    drawing, axes = figure(6.4, 1.1 + 0.52 * len(profiles))
    names = list(dict.fromkeys(s["name"] for _, result in profiles for s in result["stages"]))
    widest = max(sum(s["ms"] for s in result["stages"]) for _, result in profiles)
    for row, (_, result) in enumerate(profiles):
        left = 0.0
        for stage in result["stages"]:
            index = names.index(stage["name"])
            axes.barh(row, stage["ms"], left=left, height=0.62, gid=f"stage-{row}-{index}",
                      color=PALETTE[index % len(PALETTE)])  # fmt: skip
            if stage["ms"] > 0.09 * widest:
                axes.text(left + stage["ms"] / 2, row, f"{100 * stage['share']:.0f} %",
                          color="white", ha="center", va="center", fontsize=9)  # fmt: skip
            left += stage["ms"]
    for index, name in enumerate(names):
        axes.barh(0, 0, color=PALETTE[index % len(PALETTE)], label=plain(name))
    axes.set_yticks(range(len(profiles)), [plain(label) for label, _ in profiles])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_xlabel("ms")
    axes.legend(frameon=False, fontsize=9, ncols=len(names), loc="lower left",
                bbox_to_anchor=(0, 1), columnspacing=1, handlelength=1)  # fmt: skip
    return svg(drawing, "time of each stage")
