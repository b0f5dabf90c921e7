"""Figures of the report: accuracy against latency, tails, batches, and where the time goes.

Small figures with large text, so that they can be read on a phone. What stands for a datum carries
an id (`artifact-0`, `tail-0`, `stage-0-1`), by which tests count and style sheets could find it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rtresnet.reporting.plots import COLOURS, figure, plain, svg
from rtresnet.reporting.results import Gathered, Timing, pareto

PALETTE = (*COLOURS[:5], "#ec4899", "#06b6d4", "#84cc16", "#a16207", COLOURS[5])
SHARES = (0.5, 0.9, 0.95, 0.99, 0.999)
BINS = 40


def colours(found: Gathered) -> dict[str, str]:
    """One colour an artifact, in every figure."""
    return {
        artifact.name: PALETTE[index % len(PALETTE)]
        for index, artifact in enumerate(found.artifacts)
    }


def tradeoff(found: Gathered, batch: int) -> str | None:
    """Top-1 against median latency, with the front that none beats; None without accuracy."""
    timings = [t for t in _latest(found.streams(batch)) if t.artifact.top1 is not None]
    if not timings:
        return None
    points = [(t.latency["median"], float(t.artifact.top1 or 0)) for t in timings]
    front = [points[index] for index in pareto(points)]
    drawn, axes = figure(4.6, 3.2)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.plot(*zip(*front, strict=True), color=COLOURS[5], linewidth=1.2, zorder=1,
              drawstyle="steps-post", gid="front")  # fmt: skip
    shades = colours(found)
    for index, (timing, point) in enumerate(zip(timings, points, strict=True)):
        whole = point in front
        axes.scatter(
            *point, s=60, color=shades[timing.artifact.name] if whole else "none",
            edgecolors=shades[timing.artifact.name], linewidths=1.8, zorder=3,
            label=plain(timing.artifact.name), gid=f"artifact-{index}",
        )  # fmt: skip
    axes.set(xlabel=f"median latency of a batch of {batch}, ms", ylabel="top-1, %")
    axes.set_xlim(0, 1.08 * max(p[0] for p in points))
    values = [p[1] for p in points]
    room = max(0.5, 0.6 * (max(values) - min(values)))
    axes.set_ylim(max(0, min(values) - room), min(100.0, max(values)) + room / 2)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return svg(drawn, "top-1 accuracy against median latency, an artifact a point")


def tails(found: Gathered, batch: int) -> str | None:
    """Latency against percentile, on a scale that gives the tail its room; None without samples."""
    import numpy as np

    timings = [t for t in _latest(found.streams(batch)) if len(t.samples) > 1]
    if not timings:
        return None
    drawn, axes = figure(4.4, 3.0)
    shades = colours(found)
    most = max(len(t.samples) for t in timings)
    for index, timing in enumerate(timings):
        ordered = np.sort(timing.samples)
        n = len(ordered)
        beyond = 1 - (np.arange(n) + 0.5) / n
        axes.plot(-np.log10(beyond), ordered, color=shades[timing.artifact.name], linewidth=1.8,
                  label=f"{plain(timing.artifact.name)} (n={n})", gid=f"tail-{index}")  # fmt: skip
    shown = [0.0, *(s for s in SHARES if most * (1 - s) >= 1 - 1e-9)]
    axes.set_xticks([-np.log10(1 - s) for s in shown], [f"{100 * s:g}" for s in shown])
    axes.set(xlabel="percentile", ylabel=f"latency, ms a batch of {batch}", ylim=(0, None))
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    return svg(drawn, "latency against percentile")


def histogram(found: Gathered, batch: int) -> str | None:
    """How often which latency came; what is slower than the last bin is counted in it."""
    import numpy as np

    timings = [t for t in _latest(found.streams(batch)) if len(t.samples) > 1]
    if not timings:
        return None
    drawn, axes = figure(4.4, 3.0)
    shades = colours(found)
    low = min(min(t.samples) for t in timings)
    high = max(float(np.quantile(t.samples, 0.99)) for t in timings)
    edges = np.linspace(low, max(high, low * 1.01), BINS + 1)
    for index, timing in enumerate(timings):
        counts, _ = np.histogram(np.clip(timing.samples, edges[0], edges[-1]), edges)
        share = 100 * counts / len(timing.samples)
        axes.stairs(share, edges, fill=True, alpha=0.35, color=shades[timing.artifact.name])
        axes.stairs(share, edges, color=shades[timing.artifact.name], linewidth=1.4,
                    label=plain(timing.artifact.name), gid=f"histogram-{index}")  # fmt: skip
    axes.set(xlabel=f"latency, ms a batch of {batch}", ylabel="requests, %")
    axes.legend(frameon=False, fontsize=9)
    return svg(drawn, "histogram of latencies")


def batches(found: Gathered, name: str, label: str) -> str | None:
    """A figure of `latency` against the batch; None where there is one batch only."""
    if len(found.batches) < 2:
        return None
    drawn, axes = figure(4.4, 3.0)
    shades = colours(found)
    for index, artifact in enumerate(found.artifacts):
        points = sorted(
            (t.batch, t.latency[name])
            for t in _latest(found.streams())
            if t.artifact is artifact and t.latency.get(name) is not None
        )
        if points:
            axes.plot(
                *zip(*points, strict=True), marker="o", markersize=4.5, linewidth=1.6,
                color=shades[artifact.name], label=plain(artifact.name), gid=f"batch-{index}",
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.batches, [str(batch) for batch in found.batches])
    axes.minorticks_off()
    axes.set(xlabel="batch", ylabel=label, ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)
    return svg(drawn, f"{label} against batch")


def stages(profiles: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A bar a profile, cut into stages, in milliseconds."""
    drawn, axes = figure(6.4, 1.1 + 0.52 * len(profiles))
    names = list(dict.fromkeys(s["name"] for _, result in profiles for s in result["stages"]))
    widest = max(sum(s["ms"] for s in result["stages"]) for _, result in profiles)
    for row, (_, result) in enumerate(profiles):
        left = 0.0
        for stage in result["stages"]:
            place = names.index(stage["name"])
            axes.barh(row, stage["ms"], left=left, height=0.62, gid=f"stage-{row}-{place}",
                      color=PALETTE[place % len(PALETTE)])  # fmt: skip
            if stage["ms"] > 0.09 * widest:
                axes.text(left + stage["ms"] / 2, row, f"{100 * stage['share']:.0f} %",
                          color="white", ha="center", va="center", fontsize=9)  # fmt: skip
            left += stage["ms"]
    for place, name in enumerate(names):
        axes.barh(0, 0, color=PALETTE[place % len(PALETTE)], label=plain(name))
    axes.set_yticks(range(len(profiles)), [plain(label) for label, _ in profiles])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_xlabel("ms")
    axes.legend(frameon=False, fontsize=9, ncols=len(names), loc="lower left",
                bbox_to_anchor=(0, 1), columnspacing=1, handlelength=1)  # fmt: skip
    return svg(drawn, "time of each stage")


def _latest(timings: Sequence[Timing]) -> list[Timing]:
    """One an artifact and batch: the last that was given."""
    return list({(t.artifact.name, t.batch): t for t in timings}.values())
