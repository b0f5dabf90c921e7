"""`rtresnet estimate`: the minimum time that a net can take on a GPU."""

from __future__ import annotations

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.workflows.estimate import EstimateConfig, EstimateResult


@click.command("estimate")
@click.argument("model", metavar="MODEL|PATH")
@config_options(EstimateConfig)
@common.json_option
def command(model: str, config: EstimateConfig, json_file: str | None) -> None:
    """Print the minimum time that a net can take on a GPU, from published peak rates.

    It is a lower bound, never a measurement: no implementation is faster, and real ones are slower.
    """
    from rtresnet.workflows.estimate import estimate

    result = estimate(model, config)
    show(result)
    common.write_json(json_file, "estimate", result)


def show(result: EstimateResult) -> None:
    """Prints bounds by GPU, or by stage for a single GPU."""
    from rtresnet.reporting import tables

    console = common.out_console()
    as_if = " as if quantized" if result.as_if and result.precision == "int8" else ""
    lines = [
        f"{result.kernels} fused kernels, one after another, {result.multiply_adds / 1e9:.2f} G "
        "multiply-adds an image, at the peak of dense products. Launches and copies are not "
        "included; real engines reach a part of this."
    ]
    console.print(
        f"{result.model}, {result.size} px, {result.precision}{as_if}, batch {result.batch}: "
        "a bound from published peak rates, not a measurement.",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    if len(result.results) == 1:
        (gpu,) = result.results
        rows = [
            (stage.name, stage.compute_ms, stage.memory_ms, stage.no_faster_than_ms)
            for stage in gpu.stages
        ]
        total = ("all", gpu.compute_ms, gpu.memory_ms, gpu.no_faster_than_ms)
        headings = ("stage", "arithmetic ms", "memory ms", "no faster than ms")
        tables.show(console, headings, [*rows, total])
        lines[:0] = [
            f"{gpu.gpu}: no faster than {tables.number(gpu.no_faster_than_ms)} ms a batch, no more "
            f"than {gpu.no_more_images_per_second:,.0f} images/s, if everything that fits the "
            f"{gpu.l2 / 2**20:.0f} MB L2 cache stays there; no faster than "
            f"{tables.number(gpu.through_memory_ms)} ms if every kernel's output goes through "
            "memory.",
            f"Rates: {gpu.source}.",
        ]
    else:
        tables.show(
            console, ("GPU", "no faster than ms", "no more img/s", "through memory ms"),
            [(gpu.gpu, gpu.no_faster_than_ms, f"{gpu.no_more_images_per_second:,.0f}",
              gpu.through_memory_ms) for gpu in result.results],
        )  # fmt: skip
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
