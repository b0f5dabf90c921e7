"""`rtresnet profile`: where a net's time goes, block by block, and what bounds it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from rtresnet.cli import common
from rtresnet.core.errors import InputError


@click.command("profile", short_help="Show where the time goes, block by block.")
@click.argument("path")
@click.option("--batch", type=click.IntRange(min=1),
              help="Images a batch [default: 1, or the file's fixed batch].")  # fmt: skip
@click.option("--seconds", type=float, default=5.0, show_default=True, help="Of running it.")
@click.option("--layers", type=click.IntRange(min=0), default=5, show_default=True,
              help="How many of the slowest layers to show.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [every core].")
@click.option("--new-roof", is_flag=True, help="Measure this machine's peak rates anew.")
@common.json_option
def command(
    path: str,
    batch: int | None,
    seconds: float,
    layers: int,
    threads: int | None,
    new_roof: bool,
    json_file: str | None,
) -> None:
    """Show where the time goes, and whether arithmetic, memory or overhead bounds it.

    An ONNX file runs in ONNX Runtime's CPU provider, a plan on the GPU. Rates are held against
    peak rates of this machine, measured once, or those published of the GPU.
    """
    result = run(path, batch=batch, seconds=seconds, threads=threads, new_roof=new_roof)
    show(result, layers)
    common.write_json(json_file, "profile", result)


def run(
    path: str,
    *,
    batch: int | None = None,
    seconds: float = 5.0,
    threads: int | None = None,
    new_roof: bool = False,
) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes.

    Raises:
        InputError: Not an ONNX file or a plan, or one without the ONNX file it came from.
        UnavailableError: A plan, and no GPU.
    """
    import numpy as np

    from rtresnet.bench import environment, kernels, profile
    from rtresnet.core import artifacts, atomic_io, hardware

    if not 0 < seconds < float("inf"):
        raise InputError(f"--seconds {seconds:g}: must be above 0")
    atomic_io.require_file(path, fix="make one with: rtresnet export")
    kind = artifacts.kind_of(path)
    if kind == "checkpoint":
        raise InputError(f"{path}: a profile is of an ONNX file or a plan", fix="rtresnet export")
    sidecar = artifacts.verify(path)
    if kind == "plan" and not hardware.gpus():
        from rtresnet.runtime.compatibility import plan_needs_gpu

        raise plan_needs_gpu(path)
    counted = kernels.count(_graph_of(path, sidecar))
    if batch is not None and counted.batch not in (None, batch):
        raise InputError(
            f"{path}: takes batches of {counted.batch}, not of {batch}",
            fix=f"--batch {counted.batch}",
        )
    batch = batch or counted.batch or 1
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, 3, counted.size, counted.size)).astype(np.float32)
    gpu = hardware.gpus()[0] if kind == "plan" else None
    with (
        environment.Watch(gpu) as watch,
        common.progress(f"profiling {path} at batch {batch}", total=seconds) as update,
    ):
        from rtresnet.runtime import profilers

        if kind == "plan":
            recorded = profilers.record_plan(path, images, seconds=seconds, on_progress=update)
        else:
            recorded = profilers.record_onnx(
                path, images, seconds=seconds, threads=threads, on_progress=update
            )
    roof, rates, bandwidth = _roof(recorded, new_roof)
    blocks = counted.blocks
    if kind == "plan":
        blocks = blocks | profile.engine_blocks(_nodes_of_layers(path, sidecar), blocks)
    found = profile.profile(
        recorded.runs, recorded.whole, counted.kernels, blocks,
        batch=batch, rates=rates, bandwidth=bandwidth,
    )  # fmt: skip
    return {
        "artifact": path,
        "precision": sidecar.precision if sidecar else kernels.precision_of(counted.kernels),
        "batch": batch,
        "fixed_batch": counted.batch,
        "size": counted.size,
        **dataclasses.asdict(found),
        "roof": roof,
        "environment": watch.report,
        "chain": environment.chain_of(path),
        "device": hardware.cpu() if recorded.device == "cpu" else recorded.device,
        "provider": recorded.provider,
        "threads": recorded.threads,
        "versions": hardware.versions(("rtresnet", "numpy")) | dict(recorded.versions),
    }


def _graph_of(path: str, sidecar: Any) -> Path:
    """The ONNX file that says what a plan computes; an ONNX file is its own."""
    from rtresnet.core import artifacts

    if artifacts.kind_of(path) == "onnx":
        return Path(path)
    parent = artifacts.parent_path(path, sidecar) if sidecar else None
    if parent is None or not parent.exists():
        raise InputError(
            f"{path}: the ONNX file it was built from is not here, which says what its layers do",
            fix="bring it along",
        )
    return parent


def _nodes_of_layers(path: str, sidecar: Any) -> dict[str, tuple[str, ...]]:
    """The ONNX nodes of each layer of a plan; empty where the build recorded no layers."""
    from rtresnet.builder import layers

    if sidecar is None or sidecar.plan.layers is None:
        return {}
    return {layer.name: layer.nodes for layer in layers.load(path, sidecar).layers}


def _roof(recorded: Any, anew: bool) -> tuple[dict[str, Any] | None, Any, float | None]:
    """For the JSON; the rates; the bandwidth. Nothing for a GPU of which nothing is known."""
    if recorded.device == "cpu":
        from rtresnet.bench import roofline

        assert recorded.threads is not None
        with common.progress("measuring this machine's peak rates") if anew else _silence():
            roof, fresh = roofline.of_this_machine(recorded.threads, anew=anew)
        source = "measured just now" if fresh else f"measured earlier, {roofline.cache_file()}"
        return dataclasses.asdict(roof) | {"source": source}, roof, roof.bandwidth
    from rtresnet.bench import gpus
    from rtresnet.core.errors import UnknownNameError

    try:
        gpu = gpus.find(recorded.device)
    except UnknownNameError:
        return None, None, None
    rates = {"fp32": gpu.rate("fp32"), "fp16": gpu.rate("fp16"), "int8": gpu.rate("int8")}
    known = rates | {"bandwidth": gpu.bandwidth * 1e9, "source": f"published: {gpu.source}"}
    return known, gpu, gpu.bandwidth * 1e9


def _silence() -> Any:
    import contextlib

    return contextlib.nullcontext()


def show(result: dict[str, Any], layers: int = 5) -> None:
    """The table, with what bounds the slowest blocks and what it was taken on under it."""
    from rtresnet.cli.bench import where
    from rtresnet.reporting import tables

    console = common.out_console()
    headings = ["block", "ms", "share %", "GFLOP/s", "GB/s", "of roof %", "bound by"]
    rows = [
        (
            part["name"], part["ms"], f"{100 * part['share']:.1f}",
            part["flops_per_second"] / 1e9, part["bytes_per_second"] / 1e9, reached(part),
            part["bound"],
        )
        for part in result["blocks"]
    ]  # fmt: skip
    tables.show(console, headings, rows)
    for line in (*sentences(result), where(result)):
        console.print(line, soft_wrap=True, markup=False)
    if layers:
        slowest = sorted(result["layers"], key=lambda layer: -layer["ms"])[:layers]
        console.print("Slowest layers: " + ", ".join(
            f"{layer['name']} {tables.number(layer['ms'])} ms" for layer in slowest
        ) + ".", soft_wrap=True, markup=False)  # fmt: skip


def reached(part: dict[str, Any]) -> str | None:
    """How much of the roof a part reaches, in percent; None without a roof."""
    if part["compute"] is None or not part["ms"]:
        return None
    return f"{100 * max(part['compute'], part['memory']) / part['ms']:.0f}"


def sentences(result: dict[str, Any]) -> list[str]:
    """What the figures say, and how far they can be trusted."""
    lines = [
        f"{result['artifact']}, batch {result['batch']}: layers add up to "
        f"{result['total']:.3f} ms, the whole takes {result['whole']:.3f} ms "
        f"(medians of {result['runs']} runs)."
    ]
    if result.get("fixed_batch"):
        lines.append(f"The file takes batches of {result['fixed_batch']}.")
    if not result["agrees"]:
        lines.append(
            "NOTE: these differ by more than 10 %: the profiler's own cost, or another load on "
            "this machine. Trust shares, not times."
        )
    for part in sorted(result["blocks"], key=lambda part: -part["ms"])[:3]:
        if part["bound"]:
            lines.append(f"{part['name']} ({100 * part['share']:.0f} %): {_why(part)}")
    if result["int8_products"]:
        ran, of = result["int8_products"]
        if ran < of:
            lines.append(
                f"{ran} of {of} INT8 products ran in INT8; {result['provider']} computes the "
                "others in float."
            )
    if remarks := result["environment"]["remarks"]:
        lines.append(f"NOTE: {'; '.join(remarks)}: times are too long, and roofs look far away.")
    roof = result["roof"]
    if roof:
        parts = [
            f"{roof[name] / 1e9:,.0f} G{'FLOP' if name != 'int8' else 'OP'}/s {name}"
            for name in ("fp32", "fp16", "int8")
            if name in roof
        ]
        lines.append(
            f"Roof: {', '.join(parts)}, {roof['bandwidth'] / 1e9:,.1f} GB/s; {roof['source']}."
        )
        over = [
            p["name"] for p in result["blocks"] if max(p["compute"], p["memory"]) > 1.05 * p["ms"]
        ]
        if over:
            lines.append(
                f"NOTE: {', '.join(over)} came out faster than the roof: caches, or a roof that "
                "was measured while the machine was busy (--new-roof)."
            )
    return lines


def _why(part: dict[str, Any]) -> str:
    if part["bound"] == "overhead" and part["other"] > 0.5:
        return f"overhead: {100 * part['other']:.0f} % of it in conversions and reorders."
    if part["bound"] == "overhead":
        return (
            f"overhead: {reached(part)} % of the roof; neither arithmetic nor memory explains it."
        )
    if part["bound"] == "memory":
        return f"memory: {reached(part)} % of what the memory can move."
    return f"compute: {reached(part)} % of the peak rate."
