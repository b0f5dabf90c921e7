"""What the report says, as a page and as Markdown: its tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from rtresnet.reporting.results import Gathered, Timing
from rtresnet.reporting.tables import Row, number

PERCENTILES = ("p90", "p95", "p99", "p999")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table under a heading, with what explains it."""

    heading: str
    headings: Sequence[str]
    rows: Sequence[Row]
    about: str = ""


def latest(timings: Sequence[Timing]) -> list[Timing]:
    """One an artifact, batch and scenario: the last that was given."""
    return list({(t.artifact.name, t.batch, t.scenario): t for t in timings}.values())


def summary(found: Gathered) -> list[str]:
    """What each artifact gains and loses against the baseline, in a sentence."""
    base, batch = found.baseline, found.batch
    if base is None or batch is None:
        return []
    streams = {t.artifact.name: t for t in latest(found.streams(batch))}
    reference = streams[base.name]
    lines = []
    for timing in streams.values():
        if timing.artifact is base:
            continue
        times = speed(timing, reference)
        line = (
            f"{timing.artifact.name} answers a batch of {batch} in "
            f"{number(timing.latency['median'])} ms, {times:.2f} times as fast as {base.name}"
        )
        if timing.artifact.top1 is not None and base.top1 is not None:
            points = timing.artifact.top1 - base.top1
            change = "the same top-1" if points == 0 else f"{points:+.2f} points of top-1"
            line += f", with {change}"
        lines.append(line + ".")
    return lines


def speed(timing: Timing, reference: Timing) -> float:
    """Paired where `bench` measured both in one call, in turn; else the ratio of medians."""
    paired = timing.speed if reference.speed == 1 else None
    together = timing.entry.get("versions") == reference.entry.get("versions")
    if paired and together:
        return float(paired)
    return float(reference.latency["median"] / timing.latency["median"])


def sections(found: Gathered) -> dict[str, Section]:
    """Every table by a short name; those without rows are left out."""
    all_sections = {
        "artifacts": _artifacts(found),
        "accuracy": _accuracy(found),
        "origin": _origin(found),
        "latency": _latency(found),
        "searches": _searches(found),
        "blocks": _blocks(found),
        "chain": _chain(found),
        "environment": _environment(found),
    }
    return {name: section for name, section in all_sections.items() if section.rows}


def _artifacts(found: Gathered) -> Section:
    batch = found.batch
    streams = {t.artifact.name: t for t in latest(found.streams(batch))} if batch else {}
    base = found.baseline
    rows = []
    for artifact in found.artifacts:
        timing = streams.get(artifact.name)
        agreement = artifact.agreement
        rows.append(
            (
                artifact.name,
                artifact.precision,
                artifact.bytes / 1e6 if artifact.bytes is not None else None,
                artifact.top1,
                artifact.accuracy.get("n"),
                100 * agreement[0] if agreement else None,
                timing.latency["median"] if timing else None,
                timing.latency.get("images_per_second") if timing else None,
                speed(timing, streams[base.name]) if timing and base else None,
            )
        )
    headings = ("artifact", "precision", "MB", "top-1 %", "images", "agree %",
                f"ms, batch {batch}", "images/s", "speed")  # fmt: skip
    kept = [index for index in range(len(headings)) if any(row[index] is not None for row in rows)]
    data = dict.fromkeys(
        f"{_short(a.accuracy['data'])}, {a.accuracy.get('split') or 'all'}"
        for a in found.artifacts if a.top1 is not None and a.accuracy.get("data")
    )  # fmt: skip
    about = []
    if data:
        about.append(f"Top-1 on {'; '.join(data)}.")
    if any(a.agreement for a in found.artifacts):
        names = dict.fromkeys(a.agreement[2] for a in found.artifacts if a.agreement)
        about.append(f"Agreement: same top-1 as {', '.join(names)}.")
    if base is not None:
        about.append(f"Speed against {base.name}.")
    return Section(
        heading="Artifacts",
        headings=[headings[index] for index in kept],
        rows=[[row[index] for index in kept] for row in rows],
        about=" ".join(about),
    )


def _accuracy(found: Gathered) -> Section:
    """Every accuracy, where there are some that the first table has no room for."""
    rows = [
        (
            artifact.name, _short(record.get("data") or "unknown"), record.get("split") or "all",
            record.get("protocol") or "center", record.get("top1_percent"),
            record.get("top5_percent"), record.get("n"),
        )
        for artifact in found.artifacts if not artifact.untrained
        for record in artifact.accuracies
    ]  # fmt: skip
    more = any(record is not a.accuracy for a in found.artifacts for record in a.accuracies)
    return Section(
        heading="Accuracy on each data set",
        headings=("artifact", "data", "split", "protocol", "top-1 %", "top-5 %", "images"),
        rows=rows if more else [],
    )


def _origin(found: Gathered) -> Section:
    """What training measured of the checkpoint, and what quantization cost."""
    rows = []
    for artifact in found.artifacts:
        trained, gate = artifact.trained, artifact.gate
        if not trained and not gate:
            continue
        interval = f"{gate['low']:.2f} to {gate['high']:.2f}" if gate else None
        rows.append(
            (
                artifact.name, trained.get("name"), trained.get("test_top1"),
                trained.get("test_n"), gate.get("points"), interval, gate.get("n"),
                gate.get("bound"), gate.get("verdict"),
            )
        )  # fmt: skip
    headings = ("artifact", "checkpoint", "its test top-1 %", "images", "INT8 loses, points",
                "95 %", "images", "bound", "the bound")  # fmt: skip
    kept = [index for index in range(len(headings)) if any(row[index] is not None for row in rows)]
    data = dict.fromkeys(_short(a.gate["data"]) for a in found.artifacts if a.gate)
    return Section(
        heading="Training and quantization",
        headings=[headings[index] for index in kept],
        rows=[[row[index] for index in kept] for row in rows],
        about=f"INT8 against FP32 on the same images of {', '.join(data)}, with the 95 % interval "
        "of the loss."
        if data
        else "",
    )


def _short(data: str) -> str:
    """A data set's name without the folders it lies in on the machine that measured."""
    kind, colon, place = data.partition(":")
    return f"{kind}{colon}{PurePath(place).name}" if colon else PurePath(data).name


def _latency(found: Gathered) -> Section:
    timings = latest(found.timings)
    scenarios = len({t.scenario for t in timings}) > 1
    shares = [p for p in PERCENTILES if any(t.latency.get(p) is not None for t in timings)]
    rows = [
        (
            t.artifact.name, *((t.scenario,) if scenarios else ()), t.batch, t.latency["median"],
            *(t.latency.get(p) for p in shares), t.latency.get("std"),
            t.latency.get("images_per_second"), t.latency.get("n"),
        )
        for t in timings
    ]  # fmt: skip
    names = {"p999": "p99.9"}
    return Section(
        heading="Latency",
        headings=("artifact", *(("scenario",) if scenarios else ()), "batch", "median ms",
                  *(names.get(p, p) for p in shares), "std", "images/s", "n"),
        rows=rows,
        about="Milliseconds a batch, wall time, every sample kept. A dash: too few samples.",
    )  # fmt: skip


def _searches(found: Gathered) -> Section:
    rows = []
    for artifact, search in found.searches:
        at_best = [p for p in search["points"] if p["load"] == search["best"]]
        # The middle one of the repeats: where most of them hold the bound, it does.
        at_best.sort(key=lambda p: float("inf") if p["p99"] is None else p["p99"])
        middle = at_best[(len(at_best) - 1) // 2] if at_best else {}
        rows.append(
            (
                artifact.name,
                "images a batch" if search["what"] == "batch" else "requests/s",
                search["p99_ms"],
                search["best"],
                middle.get("p99"),
                middle.get("images_per_second"),
                middle.get("n"),
            )
        )
    about = "The largest load whose p99 holds the bound, in most repeats. A dash: none does."
    if any(search["limit"] for _, search in found.searches):
        about += " Where it is the largest that was tried, more may hold as well."
    return Section(
        heading="The most that holds a bound",
        headings=("artifact", "load", "p99 bound, ms", "most", "p99 there, ms", "images/s", "n"),
        rows=rows,
        about=about,
    )


def _blocks(found: Gathered) -> Section:
    rows = [
        (
            artifact.name, result.get("batch"), part["name"], part["ms"], 100 * part["share"],
            (part.get("flops_per_second") or 0) / 1e9, (part.get("bytes_per_second") or 0) / 1e9,
            part.get("bound"),
        )
        for artifact, result in found.profiles
        for part in result["blocks"]
    ]  # fmt: skip
    off = [a.name for a, result in found.profiles if result.get("agrees") is False]
    about = "Medians of a node, summed. Bound: what the time goes into, against the roofline."
    if off:
        about += f" Sums of {', '.join(off)} differ from the whole by more than 10 %."
    return Section(
        heading="Where the time goes, block by block",
        headings=("artifact", "batch", "block", "ms", "share %", "GFLOP/s", "GB/s", "bound by"),
        rows=rows,
        about=about,
    )


def _chain(found: Gathered) -> Section:
    rows = [
        (f"{'← ' * depth}{file}", kind, precision, sha[:16] if sha else None, state)
        for artifact in found.artifacts
        for depth, (file, kind, precision, sha, state) in enumerate(artifact.chain)
    ]
    return Section(
        heading="Where the artifacts came from",
        headings=("artifact", "kind", "precision", "sha256", "state"),
        rows=rows,
        about="Each arrow is a step back; hashes were checked when this report was made.",
    )


def _environment(found: Gathered) -> Section:
    rows = [
        (
            what, where.get("device"), where.get("provider"), where.get("threads"),
            ", ".join(f"{name} {version}" for name, version in (where["versions"] or {}).items()),
        )
        for what, where in found.environments
    ]  # fmt: skip
    return Section(
        heading="Environment",
        headings=("of", "device", "provider", "threads", "versions"),
        rows=rows,
    )


def remarks(found: Gathered) -> list[str]:
    """Notes, with those that follow from the data."""
    lines = list(found.notes)
    if any(artifact.untrained for artifact in found.artifacts):
        lines.append("Untrained weights: latency is meaningful, accuracy is not shown.")
    elif found.timings and all(a.top1 is None for a in found.artifacts):
        lines.append("No accuracy is known: rtresnet eval ARTIFACT --data DATA --json FILE.")
    return lines
