"""`rtresnet profile`: where a net's time goes, block by block, and what bounds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.workflows.profile import ProfileConfig, ProfileResult

if TYPE_CHECKING:
    from rtresnet.bench.profile import Part


@click.command("profile")
@click.argument("path")
@config_options(ProfileConfig)
@click.option(
    "--layers", type=click.IntRange(min=0), default=5, show_default=True,
    help="Number of the slowest layers to show.",
)  # fmt: skip
@common.json_option
def command(path: str, config: ProfileConfig, layers: int, json_file: str | None) -> None:
    """Show where the time goes, and whether arithmetic, memory or overhead bounds it.

    An ONNX file runs in ONNX Runtime's CPU provider, a plan on the GPU. Rates are compared with
    peak rates of this machine, which are measured once, or published ones of the GPU.
    """
    from rtresnet.cli.console import REPORTER
    from rtresnet.workflows.profile import profile

    result = profile(path, config, reporter=REPORTER)
    show(result, layers)
    common.write_json(json_file, "profile", result)


def show(result: ProfileResult, layers: int = 5) -> None:
    """Print the table, what bounds the slowest blocks, and what it was measured on."""
    from rtresnet.reporting import tables

    console = common.out_console()
    headings = ["block", "ms", "share %", "GFLOP/s", "GB/s", "of roof %", "bound by"]
    rows = [
        (
            part.name, part.ms, f"{100 * part.share:.1f}", part.flops_per_second / 1e9,
            part.bytes_per_second / 1e9, reached(part), part.bound,
        )
        for part in result.profile.blocks
    ]  # fmt: skip
    tables.show(console, headings, rows)
    threads = f", {result.threads} threads" if result.threads else ""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    where = f"{result.device}; {result.provider}{threads}; {versions}"
    for line in (*sentences(result), where):
        console.print(line, soft_wrap=True, markup=False)
    if layers:
        slowest = sorted(result.profile.layers, key=lambda layer: -layer.ms)[:layers]
        times = ", ".join(f"{layer.name} {tables.number(layer.ms)} ms" for layer in slowest)
        console.print(f"Slowest layers: {times}.", soft_wrap=True, markup=False)


def reached(part: Part) -> str | None:
    """Return the share of the roof that a part reaches, in percent; None without a roof."""
    if part.compute is None or part.memory is None or not part.ms:
        return None
    return f"{100 * max(part.compute, part.memory) / part.ms:.0f}"


def sentences(result: ProfileResult) -> list[str]:
    """Return sentences on the figures and their reliability."""
    profile, roof = result.profile, result.roof
    lines = [
        f"{result.path}, batch {result.batch}: layers add up to {profile.total:.3f} ms, the whole "
        f"takes {profile.whole:.3f} ms (medians of {profile.runs} runs)."
    ]
    if result.fixed_batch:
        lines.append(f"The file takes batches of {result.fixed_batch}.")
    if not profile.agrees:
        lines.append(
            "NOTE: these differ by more than 10 %: the profiler's own cost, or another load on "
            "this machine. Trust shares, not times."
        )
    for part in sorted(profile.blocks, key=lambda part: -part.ms)[:3]:
        if part.bound:
            lines.append(f"{part.name} ({100 * part.share:.0f} %): {_why(part)}")
    if profile.int8_products:
        ran, total = profile.int8_products
        if ran < total:
            lines.append(
                f"{ran} of {total} INT8 products ran in INT8; {result.provider} computes the "
                "others in float."
            )
    if remarks := result.environment.remarks:
        lines.append(
            f"NOTE: {'; '.join(remarks)}: times are too long, and shares of the roof too small."
        )
    if roof is None:
        return lines
    rates = [("FLOP/s fp32", roof.fp32), ("FLOP/s fp16", roof.fp16), ("OP/s int8", roof.int8)]
    parts = ", ".join(f"{rate / 1e9:,.0f} G{unit}" for unit, rate in rates if rate is not None)
    lines.append(f"Roof: {parts}, {roof.bandwidth / 1e9:,.1f} GB/s; {roof.source}.")
    if above := [
        part.name
        for part in profile.blocks
        if max(part.compute or 0, part.memory or 0) > 1.05 * part.ms
    ]:
        lines.append(
            f"NOTE: {', '.join(above)} came out faster than the roof: because of caches, or a roof "
            "that was measured while the machine was busy (--new-roof)."
        )
    return lines


def _why(part: Part) -> str:
    if part.bound == "overhead" and part.other > 0.5:
        return f"overhead: {100 * part.other:.0f} % of it in conversions and reorders."
    if part.bound == "overhead":
        return (
            f"overhead: {reached(part)} % of the roof; neither arithmetic nor memory explains it."
        )
    if part.bound == "memory":
        return f"memory: {reached(part)} % of the peak bandwidth."
    return f"compute: {reached(part)} % of the peak rate."
