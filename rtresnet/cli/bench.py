"""`rtresnet bench`: latency and throughput of ONNX files and plans."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import click

from rtresnet.cli import common
from rtresnet.errors import InputError


@click.command("bench", short_help="Measure latency and throughput.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--batch", default="1,8", show_default=True, metavar="N,...", help="Batches to measure."
)
@click.option(
    "--seconds", type=float, default=3.0, show_default=True, help="For each, after warm-up."
)
@click.option(
    "--qps",
    type=float,
    help="Poisson arrivals at this rate, one image each, however late the answers are; latency "
    "counts from the moment a request was meant to come.",
)
@common.device_options
@common.json_option
def command(
    paths: tuple[str, ...],
    batch: str,
    seconds: float,
    qps: float | None,
    json_file: str | None,
    **options: Any,
) -> None:
    """Measure latency: median, p90, p95, p99, images/s, one request after another.

    A plan needs a GPU. Without one, `--device auto` measures the ONNX file it was built from on
    the CPU and says so; `--device cuda` exits 3.
    """
    result = run(paths, batch=batch, seconds=seconds, qps=qps, **options)
    show(result)
    common.write_json(json_file, "bench", result)


def run(
    paths: tuple[str, ...],
    *,
    batch: str,
    seconds: float,
    qps: float | None = None,
    device: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes."""
    from rtresnet.bench import load, scenarios
    from rtresnet.bench.environment import Watch
    from rtresnet.runtime.session import load as load_session

    batches = parse_batches(batch) if qps is None else [1]
    chosen = [stand_in_for(path, device) for path in paths]
    for _, stand_in in chosen:
        if stand_in:  # before the wait, not after it
            common.out_console().print(
                f"NOTE: {stand_in}", style="bold yellow", markup=False, soft_wrap=True
            )
    results: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        sessions = [
            stack.enter_context(
                load_session(target, device="cpu" if stand_in else device, **options)
            )
            for target, stand_in in chosen
        ]
        sizes = {session.size for session in sessions}
        if len(sizes) > 1:
            raise InputError(f"the files take inputs of different sizes: {sorted(sizes)}")
        (size,) = sizes
        gpus = [s.backend.device for s in sessions if s.backend.device != "cpu"]
        watch = stack.enter_context(Watch(next(iter(gpus), None)))
        for count in batches:
            total = seconds * len(paths)
            with common.progress(f"measuring at batch {count}", total=total) as update:
                candidates = [
                    load.Candidate(
                        serve=session,
                        requests=[session.example(count)],
                        timings=session.backend.timings,
                    )
                    for session in sessions
                ]
                if qps is None:
                    measured = load.measure(
                        candidates, batch=count, seconds=seconds, on_progress=update
                    )
                else:
                    measured = [scenarios.server(c, qps=qps, seconds=seconds) for c in candidates]
            for path, (target, stand_in), session, taken in zip(
                paths, chosen, sessions, measured, strict=True
            ):
                sidecar = session.sidecar
                results.append(
                    {
                        "asked": path,
                        "measured": target,
                        "instead_of_plan": stand_in is not None,
                        "precision": sidecar.precision if sidecar else None,
                        "untrained": bool(sidecar and sidecar.weights.origin == "untrained"),
                        "size": size,
                    }
                    | dataclasses.asdict(taken)
                    | session.describe()
                )
    notes = [stand_in for _, stand_in in chosen if stand_in]
    return {"notes": notes, "qps": qps, "environment": watch.report, "results": results}


def parse_batches(given: str) -> list[int]:
    """`1,8` to [1, 8].

    Raises:
        InputError: Not whole numbers from 1.
    """
    try:
        batches = [int(part) for part in given.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise InputError(
            f"--batch {given}: whole numbers from 1 are needed", fix="as in --batch 1,8"
        )
    return batches


def stand_in_for(path: str, device: str) -> tuple[str, str | None]:
    """What to measure for `path`, and the sentence that says so where it is not `path` itself."""
    from rtresnet import artifacts, machine

    artifacts.require_file(path, fix="make one with: rtresnet export")
    if artifacts.kind_of(path) != "plan" or machine.gpus() or device == "cuda":
        return path, None
    sidecar = artifacts.verify(path)
    parent = artifacts.parent_path(path, sidecar) if sidecar else None
    if sidecar is None or parent is None:
        raise InputError(
            f"{path}: a plan without sidecar and no GPU to run it", fix="name its ONNX file instead"
        )
    artifacts.require_file(parent, fix="bring the ONNX file along, or run on a GPU")
    if sidecar.parent is not None and artifacts.sha256(parent) != sidecar.parent.sha256:
        raise InputError(
            f"{parent}: no longer the file {path} was built from", fix=f"rtresnet build {parent}"
        )
    return str(parent), (
        f"no GPU here: measured is {parent} on the CPU, which {path} was built from"
    )


def show(result: dict[str, Any]) -> None:
    """The table, with what it was taken on under it."""
    from rtresnet.report import tables

    console = common.out_console()
    several = len({entry["measured"] for entry in result["results"]}) > 1
    rows = []
    for entry in result["results"]:
        latency = entry["latency"]
        rows.append(
            (
                Path(entry["measured"]).name,
                entry["batch"],
                *(latency[name] for name in ("median", "p90", "p95", "p99", "images_per_second")),
                latency["n"],
                *((f"{entry['speed']:.2f}",) if several else ()),
            )
        )
    headings = ["file", "batch", "median", "p90", "p95", "p99", "img/s", "n"]
    if several:
        headings.append("speed")
    tables.show(console, headings, rows)
    if result["qps"] is None:
        console.print("Latency in ms a batch, wall time, one request after another.")
    else:
        console.print(
            f"Latency in ms from when a request was meant to come, {result['qps']:g} a second."
        )
    for remark in result["environment"]["remarks"]:
        console.print(f"NOTE: {remark}", style="bold yellow", markup=False, soft_wrap=True)
    if several and result["qps"] is None:
        console.print("Speed against the first file, measured in turn.")
        for entry in result["results"]:
            if found := entry["comparison"]:
                console.print(
                    f"{Path(entry['measured']).name}, batch {entry['batch']}: {found['verdict']} "
                    f"({found['low']:.2f} to {found['high']:.2f} times as fast, "
                    f"{100 * found['level']:.0f} %, {found['n']} rounds)",
                    soft_wrap=True, markup=False,
                )  # fmt: skip
    for line in sorted({where(entry) for entry in result["results"]}):
        console.print(line, soft_wrap=True, markup=False)
    if any(entry["untrained"] for entry in result["results"]):
        console.print("Untrained weights: latency is meaningful, accuracy is not.")
    if not all(entry["steady"] for entry in result["results"]):
        console.print("Not steady after 2 s of warm-up: another load on this machine?")


def where(entry: dict[str, Any]) -> str:
    """Device, provider, threads and versions on one line."""
    threads = f", {entry['threads']} threads" if entry["threads"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    return f"{entry['device']}; {entry['provider']}{threads}; {versions}"
