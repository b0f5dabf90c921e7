"""`rtresnet estimate`: the least time a net can take on a GPU that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rtresnet.cli import common
from rtresnet.core.errors import InputError

PRECISIONS = ("fp32", "fp16", "int8")


@click.command("estimate", short_help="Bound the latency on a GPU that is not here.")
@click.argument("model", metavar="MODEL|PATH")
@click.option("--gpu", "gpu_names", multiple=True, metavar="NAME",
              help="As in 'RTX 4090'; may be repeated [every GPU known].")  # fmt: skip
@click.option("--precision", type=click.Choice(PRECISIONS),
              help="As if quantized so [the file's; fp16 for a MODEL].")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--size", type=click.IntRange(min=1), help="Side of a MODEL's input, in pixels.")
@common.json_option
def command(
    model: str,
    gpu_names: tuple[str, ...],
    precision: str | None,
    batch: int,
    size: int | None,
    json_file: str | None,
) -> None:
    """Print the least time that a net can take on a GPU, from published peak rates.

    A bound: no implementation is faster, and real ones are slower. Never a measurement.
    """
    result = run(model, gpu_names=gpu_names, precision=precision, batch=batch, size=size)
    show(result)
    common.write_json(json_file, "estimate", result)


def run(
    model: str,
    *,
    gpu_names: tuple[str, ...] = (),
    precision: str | None = None,
    batch: int = 1,
    size: int | None = None,
) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes.

    Raises:
        UnknownNameError: No such net or GPU.
        InputError: A file in another precision than asked for.
    """
    from rtresnet.bench import gpus

    chosen = [gpus.find(name) for name in gpu_names] or list(gpus.GPUS)  # before anything slow
    counted, precision, about = _counted(model, precision, size)
    results = []
    for gpu in chosen:
        bounds = gpus.estimate(counted, gpu, batch)
        least, through = sum(b.least for b in bounds), sum(b.through_memory for b in bounds)
        results.append(
            {
                "gpu": gpu.name,
                "no_faster_than_ms": least,
                "no_more_images_per_second": 1e3 * batch / least,
                "through_memory_ms": through,
                "compute_ms": sum(b.compute for b in bounds),
                "memory_ms": sum(b.memory for b in bounds),
                "rates": {name: gpu.rate(name) for name in PRECISIONS},
                "bandwidth": gpu.bandwidth * 1e9,
                "l2": gpu.l2 * 2**20,
                "source": gpu.source,
                "stages": _stages(bounds),
            }
        )
    return {
        "what": "bound",
        "model": model,
        "precision": precision,
        "batch": batch,
        **about,
        "multiply_adds": sum(kernel.multiply_adds for kernel in counted),
        "kernels": len(counted),
        "results": results,
    }


def _counted(
    model: str, precision: str | None, size: int | None
) -> tuple[list[Any], str, dict[str, Any]]:
    """The kernels of a file or of a named net, in the precision asked for."""
    from rtresnet.bench import kernels
    from rtresnet.core import artifacts, atomic_io

    if Path(model).suffix.lower() in artifacts.SUFFIXES:
        atomic_io.require_file(model)
        if artifacts.kind_of(model) != "onnx":
            raise InputError(f"{model}: takes an ONNX file or a net's name", fix="rtresnet export")
        artifacts.verify(model)
        if size is not None:
            raise InputError(f"--size {size}: {model} has its own", fix="leave it out")
        counted = kernels.count(model)
        own = kernels.precision_of(counted.kernels)
        if precision not in (None, own) and own != "fp32":
            raise InputError(
                f"--precision {precision}: {model} is {own}", fix="name its FP32 file instead"
            )
    else:
        counted, own = _named(model, size), "fp32"
        precision = precision or "fp16"
    found = counted.kernels
    if precision not in (None, own):
        found = kernels.at(found, precision)
    return found, precision or own, {"size": counted.size, "as_if": precision not in (None, own)}


def _named(model: str, size: int | None) -> Any:
    """Counts a net of the zoo: its weights do not matter."""
    from rtresnet.models import zoo

    spec = zoo.spec(model)
    common.require_torch("making a net by its name")
    from rtresnet.bench import kernels
    from rtresnet.exporter.fold import fold
    from rtresnet.exporter.writer import to_onnx

    net = zoo.build(spec).eval()
    return kernels.count(to_onnx(fold(net), size=size or spec.size, name=model))


def _stages(bounds: list[Any]) -> list[dict[str, Any]]:
    stages: dict[str, list[Any]] = {}
    for bound in bounds:
        stages.setdefault(bound.kernel.stage, []).append(bound)
    return [
        {
            "name": name,
            "no_faster_than_ms": sum(b.least for b in members),
            "through_memory_ms": sum(b.through_memory for b in members),
            "compute_ms": sum(b.compute for b in members),
            "memory_ms": sum(b.memory for b in members),
        }
        for name, members in stages.items()
    ]


def show(result: dict[str, Any]) -> None:
    """Bounds by GPU, or by stage where there is one GPU."""
    from rtresnet.reporting import tables

    console = common.out_console()
    as_if = " as if quantized" if result["as_if"] and result["precision"] == "int8" else ""
    console.print(
        f"{result['model']}, {result['size']} px, {result['precision']}{as_if}, batch "
        f"{result['batch']}: a bound from published peak rates, not a measurement.",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    results = result["results"]
    if len(results) == 1:
        (only,) = results
        rows = [
            (s["name"], s["compute_ms"], s["memory_ms"], s["no_faster_than_ms"])
            for s in only["stages"]
        ]
        total = (only["compute_ms"], only["memory_ms"], only["no_faster_than_ms"])
        tables.show(
            console, ("stage", "arithmetic ms", "memory ms", "no faster than ms"),
            [*rows, ("all", *total)],
        )  # fmt: skip
    else:
        tables.show(
            console, ("GPU", "no faster than ms", "no more img/s", "through memory ms"),
            [(r["gpu"], r["no_faster_than_ms"], f"{r['no_more_images_per_second']:,.0f}",
              r["through_memory_ms"]) for r in results],
        )  # fmt: skip
    for entry in results if len(results) == 1 else ():
        console.print(
            f"{entry['gpu']}: no faster than {tables.number(entry['no_faster_than_ms'])} ms a "
            f"batch, no more than {entry['no_more_images_per_second']:,.0f} images/s, where all "
            f"that fits the {entry['l2'] / 2**20:.0f} MB L2 cache stays there; no faster than "
            f"{tables.number(entry['through_memory_ms'])} ms where every kernel's output goes "
            "through memory.",
            soft_wrap=True, markup=False,
        )  # fmt: skip
        console.print(f"Rates: {entry['source']}.", soft_wrap=True, markup=False)
    console.print(
        f"{result['kernels']} fused kernels, one after another, "
        f"{result['multiply_adds'] / 1e9:.2f} G multiply-adds an "
        "image, at the peak of dense products. Launches and copies are not in it; real engines "
        "reach a part of this.",
        soft_wrap=True, markup=False,
    )  # fmt: skip
