"""Results of `rtresnet estimate` and `rtresnet profile` as tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core.precisions import CALIBRATED
from rtresnet.reporting.tables import DataTable, Row, number

if TYPE_CHECKING:
    from rtresnet.bench.profile import Part
    from rtresnet.workflows.advisor import AdviceResult, PlanAccuracy
    from rtresnet.workflows.estimate import EstimateResult, GpuEstimate, StageEstimate
    from rtresnet.workflows.profile import ProfileResult

FROM_MEMORY = (
    "Rates of GPUs were entered from memory of NVIDIA's documents, not compared with them."
)


def estimate_lines(result: EstimateResult) -> Iterator[str | DataTable]:
    """Return bounds by GPU, or by stage for a single GPU."""
    how = "quantized" if result.precision in CALIBRATED else "converted"
    as_if = f" as if {how}" if result.as_if else ""
    fused = f"kernels that {result.builder} fused" if result.builder else "fused kernels"
    yield (
        f"{result.model}, {result.size} px, {result.precision}{as_if}, batch {result.batch}: "
        "a lower bound from published peak rates, not a measurement."
    )
    if len(result.results) == 1:
        (gpu,) = result.results
        parts: list[tuple[str, StageEstimate | GpuEstimate]] = [
            *((stage.name, stage) for stage in gpu.stages), ("all", gpu)
        ]  # fmt: skip
        rows: list[Row] = [
            (name, part.compute_ms, part.memory_ms, part.no_faster_than_ms, part.through_memory_ms)
            for name, part in parts
        ]
        headings = (
            "stage", "arithmetic ms", "memory ms", "minimum ms (L2)", "minimum ms (memory)"
        )  # fmt: skip
        yield DataTable(headings=headings, rows=rows)
        yield (
            f"{gpu.gpu}: at least {number(gpu.no_faster_than_ms)} ms per batch, at most "
            f"{gpu.no_more_images_per_second:,.0f} images/s, if all tensors that fit the "
            f"{gpu.l2 / 2**20:.0f} MB L2 cache stay there; at least "
            f"{number(gpu.through_memory_ms)} ms if every kernel writes its output to memory."
        )
        yield f"Rates: {gpu.source}."
    else:
        yield DataTable(
            headings=("GPU", "minimum ms (L2)", "maximum img/s", "minimum ms (memory)"),
            rows=[
                (
                    gpu.gpu, gpu.no_faster_than_ms,
                    f"{gpu.no_more_images_per_second:,.0f}", gpu.through_memory_ms,
                )
                for gpu in result.results
            ],
        )  # fmt: skip
        yield FROM_MEMORY
    yield (
        f"{result.kernels} {fused}, run in sequence: {result.multiply_adds / 1e9:.2f} G "
        "multiply-adds per image at the peak rate of dense products, and "
        f"{result.bytes / 1e6:,.1f} MB read and written per batch. Launches and copies are not "
        "included; real engines reach a fraction of these rates."
    )
    if result.unknown_types:
        yield (
            f"NOTE: the data type of {result.unknown_types} of {result.kernels} kernels is "
            "unknown; the bound assumes the GPU's fastest rate, that of 4-bit types."
        )
    for gpu in result.results:
        yield from _measured(gpu)


def _measured(gpu: GpuEstimate) -> Iterator[str]:
    for entry in gpu.measured:
        ms = entry.compute_ms if entry.compute_ms is not None else entry.median_ms
        quantity = "computation" if entry.compute_ms is not None else "latency"
        yield (
            f"Measured on {gpu.gpu}: {number(ms)} ms {quantity} (median, n {entry.n}, "
            f"{entry.file}), {ms / gpu.no_faster_than_ms:.1f} times the bound."
        )


def advice_lines(result: AdviceResult) -> Iterator[str | DataTable]:
    """Return a comparison of plans, and expected results."""
    precisions = [entry.estimate.precision for entry in result.plans]
    longest = max(gpu.through_memory_ms for e in result.plans for gpu in e.estimate.results)
    unit, scale = ("ms", 1.0) if longest >= 0.1 else ("us", 1e3)
    rows: list[Row] = []
    labels, lines = [], []
    bounds: dict[str, dict[int, str]] = {}  # by GPU and position of the plan
    for position, entry in enumerate(result.plans):
        estimate, name = entry.estimate, Path(entry.estimate.model).name
        label = estimate.precision if precisions.count(estimate.precision) == 1 else name
        labels.append(label)
        rows.append((label, _accuracy(entry.accuracy), estimate.bytes / 1e6, estimate.kernels))
        for gpu in estimate.results:
            bounds.setdefault(gpu.gpu, {})[position] = _bounds(gpu, scale)
            lines += [f"{name}: {line}" for line in _measured(gpu)]
    yield DataTable(headings=("precision", "accuracy", "MB moved", "kernels"), rows=rows)
    if any(entry.accuracy.snr_db is not None for entry in result.plans):
        yield "dB: signal-to-noise ratio of the logits against FP32, measured by calibration."
    yield (
        f"Lower bounds at batch {result.batch} in {unit}, from published peak rates; not "
        "measurements. The first figure applies if all tensors that fit the L2 cache stay there, "
        f"the second if every kernel's output goes through memory. {FROM_MEMORY}"
    )
    yield DataTable(
        headings=("GPU", *labels),
        rows=[(gpu, *map(of_plan.get, range(len(labels)))) for gpu, of_plan in bounds.items()],
    )
    yield from lines
    yield from result.advice


def _bounds(gpu: GpuEstimate, scale: float) -> str:
    """Format the bounds with two digits, because they are coarse and the table is narrow."""
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


def profile_lines(result: ProfileResult, layers: int = 5) -> Iterator[str | DataTable]:
    """Return the table, the limits of the slowest blocks, and the device."""
    headings = ["block", "ms", "share %", "GFLOP/s", "GB/s", "of roof %", "bound by"]
    rows = [
        (
            part.name, part.ms, f"{100 * part.share:.1f}", part.flops_per_second / 1e9,
            part.bytes_per_second / 1e9, _reached(part), part.bound,
        )
        for part in result.profile.blocks
    ]  # fmt: skip
    yield DataTable(headings=headings, rows=rows)
    yield from _profile_facts(result)
    threads = f", {result.threads} threads" if result.threads else ""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    yield f"{result.device}; {result.provider}{threads}; {versions}"
    if layers:
        slowest = sorted(result.profile.layers, key=lambda layer: -layer.ms)[:layers]
        times = ", ".join(f"{layer.name} {number(layer.ms)} ms" for layer in slowest)
        yield f"Slowest layers: {times}."


def _reached(part: Part) -> str | None:
    """Return the share of the roof that a part reaches, in percent; None without a roof."""
    if part.compute is None or part.memory is None or not part.ms:
        return None
    return f"{100 * max(part.compute, part.memory) / part.ms:.0f}"


def _profile_facts(result: ProfileResult) -> Iterator[str]:
    """Return sentences on the figures and their reliability."""
    profile, roof = result.profile, result.roof
    yield (
        f"{result.path}, batch {result.batch}: layers add up to {profile.total:.3f} ms, the net "
        f"takes {profile.whole:.3f} ms (medians of {profile.runs} runs)."
    )
    if result.fixed_batch:
        yield f"The batch is fixed at {result.fixed_batch}."
    if not profile.agrees:
        why = (
            "the profiler's overhead"
            if profile.total > profile.whole
            else "time between the layers"
        )
        yield (
            f"NOTE: these differ by more than 10 %, because of {why} or another load on this "
            "machine. Each block's share of the time is more reliable than its time."
        )
    for part in sorted(profile.blocks, key=lambda part: -part.ms)[:3]:
        if part.bound:
            yield f"{part.name} ({100 * part.share:.0f} %): {_why(part)}"
    if profile.int8_products:
        ran, total = profile.int8_products
        if ran < total:
            yield (
                f"{ran} of {total} INT8 convolutions and GEMMs ran in INT8; {result.provider} "
                "computes the others in float."
            )
    if remarks := result.environment.remarks:
        yield (
            f"NOTE: {'; '.join(remarks)}: times are overestimated, rates and the share of the roof "
            "underestimated."
        )
    if roof is None:
        return
    rates = [("FLOP/s fp32", roof.fp32), ("FLOP/s fp16", roof.fp16), ("OP/s int8", roof.int8)]
    parts = ", ".join(f"{rate / 1e9:,.0f} G{unit}" for unit, rate in rates if rate is not None)
    yield f"Roof: {parts}, {roof.bandwidth / 1e9:,.1f} GB/s; {roof.source}."
    if above := [
        part.name
        for part in profile.blocks
        if max(part.compute or 0, part.memory or 0) > 1.05 * part.ms
    ]:
        yield (
            f"NOTE: {', '.join(above)} exceeded the roof, because of caches or because the roof "
            "was measured on a busy machine (measure it again with --remeasure-peak)."
        )


def _why(part: Part) -> str:
    if part.bound == "overhead" and part.other > 0.5:
        return (
            f"overhead: {100 * part.other:.0f} % of its time is spent in conversions and reorders."
        )
    if part.bound == "overhead":
        return (
            f"overhead: {_reached(part)} % of the roof; neither arithmetic nor memory explains it."
        )
    if part.bound == "memory":
        return f"memory: {_reached(part)} % of the peak bandwidth."
    return f"compute: {_reached(part)} % of the peak rate."
