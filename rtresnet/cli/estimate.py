"""`rtresnet estimate`: the minimum time that a net can take on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.workflows.estimate import EstimateConfig, EstimateResult, GpuEstimate

if TYPE_CHECKING:
    from rtresnet.workflows.advisor import AdviceResult, PlanAccuracy


@click.command("estimate")
@click.argument("models", metavar="MODEL|PATH...", nargs=-1, required=True)
@config_options(EstimateConfig)
@common.json_option
def command(models: tuple[str, ...], config: EstimateConfig, json_file: str | None) -> None:
    """Print the minimum time that a net can take on a GPU, from published peak rates.

    It is a lower bound, never a measurement: no implementation is faster, and real ones are slower.
    For a plan, the kernels are those that the builder fused. Several plans are compared.
    """
    if len(models) > 1:
        from rtresnet.workflows.advisor import advise

        advice = advise(models, config)
        show_advice(advice)
        common.write_json(json_file, "advise", advice)
        return
    from rtresnet.workflows.estimate import estimate

    result = estimate(models[0], config)
    show(result)
    common.write_json(json_file, "estimate", result)


def show(result: EstimateResult) -> None:
    """Print bounds by GPU, or by stage for a single GPU."""
    from rtresnet.reporting import tables

    console = common.out_console()
    as_if = " as if quantized" if result.as_if and result.precision == "int8" else ""
    fused = f"kernels that {result.builder} fused" if result.builder else "fused kernels"
    lines = [
        f"{result.kernels} {fused}, one after another: {result.multiply_adds / 1e9:.2f} G "
        f"multiply-adds an image at the peak of dense products, and {result.bytes / 1e6:,.1f} MB "
        "read and written for the batch. Launches and copies are not included; real engines reach "
        "a part of this."
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
    for gpu in result.results:
        lines += _measured(gpu)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _measured(gpu: GpuEstimate) -> list[str]:
    from rtresnet.reporting import tables

    lines = []
    for entry in gpu.measured:
        ms = entry.compute_ms if entry.compute_ms is not None else entry.median_ms
        what = "computation" if entry.compute_ms is not None else "latency"
        lines.append(
            f"Measured on {gpu.gpu}: {tables.number(ms)} ms {what} (median, n {entry.n}, "
            f"{entry.file}), {ms / gpu.no_faster_than_ms:.1f} times the bound."
        )
    return lines


def show_advice(result: AdviceResult) -> None:
    """Print plans next to each other, and what to expect."""
    from rtresnet.reporting import tables

    console = common.out_console()
    gpus = list(dict.fromkeys(gpu.gpu for e in result.plans for gpu in e.estimate.results))
    precisions = [entry.estimate.precision for entry in result.plans]
    longest = max(gpu.through_memory_ms for e in result.plans for gpu in e.estimate.results)
    unit, scale = ("ms", 1.0) if longest >= 0.1 else ("us", 1e3)
    rows: list[tables.Row] = []
    lines = []
    for entry in result.plans:
        estimate, by_gpu = entry.estimate, {gpu.gpu: gpu for gpu in entry.estimate.results}
        name = Path(estimate.model).name
        bounds = [_bounds(by_gpu[gpu], scale) if gpu in by_gpu else None for gpu in gpus]
        rows.append(
            (
                estimate.precision if precisions.count(estimate.precision) == 1 else name,
                _accuracy(entry.accuracy), estimate.bytes / 1e6, estimate.kernels, *bounds,
            )
        )  # fmt: skip
        lines += [f"{name}: {line}" for gpu in estimate.results for line in _measured(gpu)]
    console.print(
        f"Bounds at batch {result.batch} in {unit}, from published peak rates; not measurements. "
        "No faster than the first figure if everything that fits the L2 cache stays there, than "
        "the second if every kernel's output goes through memory.",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    tables.show(console, ("precision", "accuracy", "MB moved", "kernels", *gpus), rows)
    if any(entry.accuracy.snr_db is not None for entry in result.plans):
        lines.append("dB: signal to noise at the logits against FP32, measured by calibration.")
    for line in (*lines, *result.advice):
        console.print(line, soft_wrap=True, markup=False)


def _bounds(gpu: GpuEstimate, scale: float) -> str:
    """Two digits each: a bound is coarse, and the table is narrow."""
    both = (scale * gpu.no_faster_than_ms, scale * gpu.through_memory_ms)
    return "\u2013".join(f"{time:.0f}" if time >= 10 else f"{time:.2g}" for time in both)


def _accuracy(accuracy: PlanAccuracy) -> str | None:
    parts = []
    if accuracy.top1_percent is not None:
        parts.append(f"top-1 {accuracy.top1_percent:.2f} % (n {accuracy.n})")
    if accuracy.drop_points is not None:
        parts.append(f"drop {accuracy.drop_points:.2f} points (n {accuracy.drop_n})")
    if accuracy.snr_db is not None and not parts:
        parts.append(f"{accuracy.snr_db:.1f} dB")
    return ", ".join(parts) or None
