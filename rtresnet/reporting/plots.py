"""Plots as SVG that follows the page: text stays text, black becomes the page's own colour."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rtresnet.core.errors import missing_package

COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#6b7280")


def figure(width: float = 6.4, height: float = 3.6) -> tuple[Any, Any]:
    """A figure and its axes, on matplotlib's file-only backend.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_package("matplotlib", "plots") from None
    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return drawn, axes


def svg(drawn: Any, label: str) -> str:
    """The figure as an <svg> element for a page, with `label` for screen readers."""
    import matplotlib

    out = io.StringIO()
    # A fixed salt: the same numbers give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rtresnet"}):
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    # matplotlib's own metadata names addresses outside the page, which a page has no use for.
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = text.replace("#000000", "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Text without a colour of its own is black whatever the page says.
    text = text.replace("<text ", '<text fill="currentColor" ')
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def plain(name: str) -> str:
    """A name as a label shows it: matplotlib would read what stands between two $ as TeX."""
    return name.replace("$", r"\$")


def training_figure(log: Sequence[Mapping[str, Any]]) -> Any:
    """Training and held-out error, and the learning rate, against epochs (as figure 6)."""
    drawn, axes = figure()
    epochs = [entry["epoch"] for entry in log]
    for name, label, style in (("train_top1", "training", "--"), ("val_top1", "held out", "-")):
        if any(entry[name] is None for entry in log):
            continue
        errors = [100 - entry[name] for entry in log]
        dots = {"marker": "o", "markersize": 3.5} if len(log) <= 40 else {}
        axes.plot(epochs, errors, style, color=COLOURS[0], label=label, **dots)
    axes.set(xlabel="epoch", ylabel="error, %", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if all(entry.get("lr") for entry in log) and len(log) > 1:
        rate, rates = axes.twinx(), [entry["lr"] for entry in log]
        rate.plot(epochs, rates, color=COLOURS[5], linewidth=1, alpha=0.8)
        rate.set_ylabel("learning rate", color=COLOURS[5])
        if len(set(rates)) < len(rates) / 2:  # one that falls tenfold in steps
            rate.set_yscale("log")
        else:
            rate.set_ylim(0, None)
        rate.spines[["top"]].set_visible(False)
        rate.tick_params(colors=COLOURS[5], which="both")
    axes.legend(frameon=False)
    return drawn


def search_figure(searches: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    """p99 and median against the load, of searches of one kind with one bound.

    Args:
        searches: (name, what `bench --find-batch` or `--find-qps` writes with --json).
    """
    drawn, axes = figure()
    for index, (name, found) in enumerate(searches):
        colour = COLOURS[index % len(COLOURS)]
        points = [point for point in found["points"] if point["p99"] is not None]
        loads = [point["load"] for point in points]
        axes.plot(loads, [p["p99"] for p in points], "o-", color=colour, markersize=4.5,
                  label=f"{plain(name)}, p99", gid=f"search-{index}")  # fmt: skip
        axes.plot(loads, [p["median"] for p in points], ":", color=colour,
                  label=f"{plain(name)}, median")  # fmt: skip
        if found["best"] is not None:
            axes.axvline(found["best"], color=colour, linewidth=0.8, alpha=0.6)
    axes.axhline(searches[0][1]["p99_ms"], color="#888888", linewidth=1)
    what = "images a batch" if searches[0][1]["what"] == "batch" else "requests a second"
    axes.set(xlabel=what, ylabel="latency, ms", ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)
    return drawn


def training_curve(log: Sequence[Mapping[str, Any]]) -> str:
    """`training_figure` for a page."""
    return svg(training_figure(log), "training and held-out error against epochs")


def latency_distribution(samples: Mapping[str, Sequence[float]], unit: str) -> str:
    """Share of requests answered within a latency, a curve an artifact, up to p99.5.

    The axis is logarithmic where a long tail would leave no room for most requests.
    """
    import numpy as np

    drawn, axes = figure()
    from matplotlib.ticker import LogLocator, NullLocator  # after `figure`, which says if missing

    for colour, (name, values) in zip(COLOURS, samples.items(), strict=False):
        ordered = np.sort(values)
        share = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
        axes.plot(ordered, share, color=colour, linewidth=1.8, label=f"{name} (n={len(ordered)})")
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
    return svg(drawn, "share of requests answered within a latency")
