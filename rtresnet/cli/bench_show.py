"""How results of `rtresnet bench` are told, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rtresnet.cli import common

HOW = {
    "single-stream": "Latency in ms a batch, wall time, one request after another.",
    "multi-stream": "Latency in ms a query of 8 images, one query after another.",
    "offline": "Time in ms a batch, one batch after another; throughput is the figure.",
}
FIGURES = ("median", "p90", "p95", "p99", "images_per_second")


def show(result: dict[str, Any], *, intervals: bool = False, trtexec: bool = False) -> None:
    """The table, with what it was taken on under it."""
    from rtresnet.reporting import tables

    console = common.out_console()
    entries = result["results"]
    several = len({entry["asked"] for entry in entries}) > 1 or any(
        entry["comparison"] for entry in entries
    )
    headings = ["file", "batch", "median", "p90", "p95", "p99", "img/s", "n"]
    rows: list[tuple[object, ...]] = []
    for entry in entries:
        latency = entry["latency"]
        figures = (latency[name] for name in FIGURES)
        speed = (f"{entry['speed']:.2f}",) if several else ()
        name = Path(entry["measured"]).name
        rows.append((name, entry["batch"], *figures, latency["n"], *speed))
    tables.show(console, [*headings, *(["speed"] if several else [])], rows)
    for line in _lines(result, several):
        console.print(line, soft_wrap=True, markup=False)
    for remark in result["environment"]["remarks"]:
        console.print(f"NOTE: {remark}", style="bold yellow", markup=False, soft_wrap=True)
    if intervals:
        _intervals(entries)
    for entry in entries if trtexec else ():
        console.print(f"As trtexec would put it, {_name(entry)}:", markup=False)
        console.print(entry["trtexec"], markup=False, soft_wrap=True)


def _lines(result: dict[str, Any], several: bool) -> Iterator[str]:
    entries = result["results"]
    scenario = result["scenario"]
    if scenario == "server":
        yield f"Latency in ms from when a request was meant to come, {result['qps']:g} a second."
    elif scenario == "closed":
        clients = entries[0]["load"]["concurrency"]
        yield f"Latency in ms a request, {clients} of them in flight at any time."
    elif scenario != "offline" or not all(entry["load"].get("in_flight") for entry in entries):
        yield HOW[scenario]
    if result["with_preprocess"]:
        yield "From encoded bytes: decoding, cropping and normalizing included."
    for entry in entries:
        yield from _facts(entry)
    if several:
        turn = (
            ", one after the other." if scenario in ("server", "closed") else ", measured in turn."
        )
        yield f"Speed against the first file{turn}"
        yield from (_verdict(entry) for entry in entries if entry["comparison"])
    yield from where_lines(entries)
    if any(entry["untrained"] for entry in entries):
        yield "Untrained weights: latency is meaningful, accuracy is not."
    if not all(entry["steady"] for entry in entries):
        yield "Not steady after 2 s of warm-up: another load on this machine?"


def _facts(entry: dict[str, Any]) -> Iterator[str]:
    """What one result has to say beside its row."""
    load, parts = entry["load"], entry["parts"]
    if load.get("md1_p99_ms") is not None:
        yield (
            f"{_name(entry)}: chance alone makes a p99 of {load['md1_p99_ms']:.3g} ms of its "
            f"{load['service_ms']:.3g} ms (M/D/1)."
        )
    elif load.get("service_ms") is not None:
        yield f"{_name(entry)}: overloaded, it takes {load['service_ms']:.3g} ms a request."
    if load.get("in_flight"):
        yield (
            f"{_name(entry)}: {load['in_flight']} batches in flight; ms from one finished batch to "
            "the next, throughput is the figure."
        )
    if load.get("unanswered"):
        arrived = entry["latency"]["n"] + load["unanswered"]
        yield (
            f"{_name(entry)}: {load['unanswered']:,} of {arrived:,} requests had no answer when it "
            "was stopped; all latencies are lower bounds."
        )
    if (load.get("late_ms") or 0) > 1:
        yield f"{_name(entry)}: requests were sent up to {load['late_ms']:.2g} ms late (p99)."
    if load.get("refused"):
        yield f"{_name(entry)}: {load['refused']} requests were refused, the queue was full."
    if parts:
        medians = ", ".join(f"{name} {parts[name]['median']:.3g}" for name in parts)
        yield f"{_name(entry)}: medians by events, in ms: {medians}"
        enqueue, compute = parts.get("enqueue"), parts.get("compute")
        if enqueue and compute and enqueue["median"] > 0.8 * compute["median"]:
            yield f"{_name(entry)}: enqueueing takes as long as computing; the host sets the pace."


def _verdict(entry: dict[str, Any]) -> str:
    found = entry["comparison"]
    pairs = "rounds" if found["paired"] else "samples, not paired"
    return (
        f"{_name(entry)}: {found['verdict']} ({found['low']:.2f} to {found['high']:.2f} times as "
        f"fast, {100 * found['level']:.0f} %, {found['n']} {pairs})"
    )


def _intervals(entries: list[dict[str, Any]]) -> None:
    from rtresnet.reporting import tables

    def cell(bounds: tuple[float, float] | None) -> str | None:
        return None if bounds is None else " to ".join(tables.number(bound) for bound in bounds)

    names = ("median", "p99", "p999", "images_per_second")
    rows = [
        (
            Path(entry["measured"]).name,
            entry["batch"],
            *(cell(entry["latency"]["intervals"][name]) for name in names),
        )
        for entry in entries
    ]
    headings = ["file", "batch", "median", "p99", "p99.9", "img/s"]
    tables.show(common.out_console(), headings, rows, title="95 % intervals")


def _name(entry: dict[str, Any]) -> str:
    return f"{Path(entry['measured']).name}, batch {entry['batch']}"


def where(entry: dict[str, Any]) -> str:
    """Device, provider, threads, contexts, CUDA graphs and versions on one line."""
    threads = f", {entry['threads']} threads" if entry["threads"] else ""
    if entry.get("contexts"):
        plural = "s" if entry["contexts"] > 1 else ""
        threads += f", {entry['contexts']} context{plural}, CUDA graphs: {entry['graphs']}"
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    return f"{entry['device']}; {entry['provider']}{threads}; {versions}"


def where_lines(entries: Iterable[dict[str, Any]]) -> list[str]:
    """Each device with its provider and versions once, then notes on how they ran."""
    entries = list(entries)
    return [*sorted({where(entry) for entry in entries}), *common.run_notes(entries)]
