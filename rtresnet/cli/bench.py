"""`rtresnet bench`: latency and throughput of ONNX files and plans."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from rtresnet.cli import common
from rtresnet.cli.options import click_option, config_options
from rtresnet.core.config import options_of
from rtresnet.core.errors import InputError
from rtresnet.reporting import benchmark
from rtresnet.workflows.benchmark import Baseline, BenchmarkConfig, benchmark_until_error
from rtresnet.workflows.benchmark_search import SearchConfig, search_benchmark
from rtresnet.workflows.loading import RuntimeConfig
from rtresnet.workflows.workload import MeasurementConfig

SHARED = [field.name for field, _, _ in options_of(MeasurementConfig)]
P99 = next(entry for entry in options_of(SearchConfig) if entry[0].name == "p99_ms")


@click.command("bench")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@config_options(BenchmarkConfig, leave_out=SHARED)
@config_options(MeasurementConfig, argument="shared")
@click.option(
    "--find-batch",
    is_flag=True,
    help="Find the largest batch whose p99 is within --p99.  [default: off]",
)
@click.option(
    "--find-qps",
    is_flag=True,
    help="Find the highest arrival rate whose p99 is within --p99.  [default: off]",
)
@click_option("p99_ms", P99[1], None, P99[2])
@click.option(
    "--plot", metavar="FILE", type=common.PATH,
    help="Draw the measurements of a search as .svg or .png.  [default: none]",
)  # fmt: skip
@click.option(
    "--baseline",
    metavar="FILE",
    help="Exit with 1 if slower than the results in this --json file.  [default: none]",
)
@click.option(
    "--tolerance", metavar="N%", callback=lambda context, option, text: _percent(text),
    help="Slowdown that --baseline allows.  [default: 3%]",
)  # fmt: skip
@click.option(
    "--force",
    is_flag=True,
    help="Compare also with a baseline of another device or version.  [default: refuse]",
)
@click.option(
    "--intervals", is_flag=True, help="Also print 95 % confidence intervals.  [default: off]"
)
@click.option(
    "--trtexec", is_flag=True, help="Also print the results in trtexec's format.  [default: off]"
)
@config_options(RuntimeConfig, argument="runtime")
@common.json_option
def command(
    paths: tuple[str, ...],
    config: BenchmarkConfig,
    shared: MeasurementConfig,
    runtime: RuntimeConfig,
    find_batch: bool,
    find_qps: bool,
    p99_ms: float | None,
    plot: Path | None,
    baseline: str | None,
    tolerance: float | None,
    force: bool,
    intervals: bool,
    trtexec: bool,
) -> None:
    """Measure latency (median, p90, p95, p99) and throughput.

    Several files are measured in alternating slices and compared. A plan needs a GPU. Without one,
    `--device auto` measures its ONNX file on the CPU instead and prints a note; `--device cuda`
    exits with 3.
    """
    if find_batch or find_qps:
        if find_batch and find_qps:
            raise InputError("--find-batch and --find-qps cannot be combined", fix="choose one")
        quantity = "batch" if find_batch else "qps"
        refused = {
            "intervals": intervals, "trtexec": trtexec, "tolerance": tolerance, "force": force,
            "baseline": baseline, "scenario": config.scenario, "qps": config.qps,
            "concurrency": config.concurrency, "batch": config.batch,
        }  # fmt: skip
        for name, value in refused.items():
            if value not in (None, False):
                raise InputError(f"--{name} and --find-{quantity} cannot be combined")
        searched = SearchConfig(what=quantity, p99_ms=p99_ms, **_values(shared))  # type: ignore[arg-type]
        if plot is not None and plot.suffix.lower() not in (".svg", ".png"):
            raise InputError(f"--plot {plot}: must end in .svg or .png")
        searches = search_benchmark(paths, searched, runtime=runtime, reporter=common.REPORTER)
        common.show(benchmark.search_lines(searches))
        if plot is not None:
            benchmark.write_plot(plot, searches)
        common.write_json("bench-find", searches)
        searches.require_success()
        return
    if p99_ms is not None or plot is not None:
        name = "plot" if p99_ms is None else "p99"
        raise InputError(f"--{name} applies only to --find-batch and --find-qps")
    if tolerance is not None and baseline is None:
        raise InputError("--tolerance has no effect without --baseline")
    result, error = benchmark_until_error(
        paths,
        dataclasses.replace(config, **_values(shared)),
        runtime=runtime,
        baseline=_read_baseline(baseline, tolerance, force) if baseline is not None else None,
        reporter=common.REPORTER,
    )
    common.show(benchmark.lines(result, intervals=intervals, trtexec=trtexec))
    common.write_json("bench", result)
    if error is not None:
        raise error
    result.require_no_regression()


def _values(shared: MeasurementConfig) -> dict[str, Any]:
    return {name: getattr(shared, name) for name in SHARED}


def _percent(text: str | None) -> float | None:
    """Read `3%` or `3` as 0.03.

    Raises:
        InputError: Not a percentage of at least 0.
    """
    if text is None:
        return None
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < 1000:
        raise InputError(
            f"--tolerance {text}: not a percentage of at least 0", fix="as in --tolerance 3%"
        )
    return value / 100


def _read_baseline(path: str, tolerance: float | None, force: bool) -> Baseline:
    """Read a file that `bench --json` wrote.

    Raises:
        InputError: The file is not a valid result of `bench`.
    """
    from rtresnet.core import atomic_io
    from rtresnet.reporting import result_files

    fix = f"create one with: rtresnet bench ARTIFACT --json {path}"
    atomic_io.require_file(path, fix=fix)
    file = result_files.read(path)
    if file.verb != "bench":
        raise InputError(f"{path}: a result of {file.verb}, expected one of bench", fix=fix)
    tolerance = 0.03 if tolerance is None else tolerance
    return Baseline(path=path, results=file.result["results"], tolerance=tolerance, force=force)
