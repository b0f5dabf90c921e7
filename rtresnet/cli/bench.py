"""`rtresnet bench`: latency and throughput of ONNX files and plans."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.config import Config, option, options_of, parse_percentage
from rtresnet.core.errors import InputError
from rtresnet.reporting import benchmark
from rtresnet.workflows.benchmark import Baseline, BenchmarkConfig, benchmark_until_error
from rtresnet.workflows.benchmark_search import SearchConfig, search_benchmark
from rtresnet.workflows.loading import RuntimeConfig
from rtresnet.workflows.workload import MeasurementConfig

SHARED = [field.name for field, _, _ in options_of(MeasurementConfig)]
P99 = next(field for field, _, _ in options_of(SearchConfig) if field.name == "p99_ms")


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Config):
    """Options of a search, next to those of the workload."""

    find_batch: bool = option(False, "Find the largest batch whose p99 is within --p99.")
    find_qps: bool = option(False, "Find the highest arrival rate whose p99 is within --p99.")
    p99_ms: float | None = dataclasses.field(default=None, metadata=P99.metadata)
    plot: Path | None = option(
        None, "Draw the measurements of a search as .svg or .png.", metavar="FILE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.find_batch and self.find_qps:
            raise InputError("--find-batch and --find-qps cannot be combined", fix="choose one")
        if self.quantity is None and (self.p99_ms is not None or self.plot is not None):
            name = "plot" if self.p99_ms is None else "p99"
            raise InputError(f"--{name} applies only to --find-batch and --find-qps")

    @property
    def quantity(self) -> Literal["batch", "qps"] | None:
        """What is searched for; None without a search."""
        if self.find_batch:
            return "batch"
        return "qps" if self.find_qps else None


@dataclass(frozen=True, kw_only=True)
class BaselineOptions(Config):
    """Options of the comparison with an earlier result."""

    baseline: str | None = option(
        None, "Exit with 1 if slower than the results in this --json file.", metavar="FILE"
    )
    tolerance: float | None = option(
        None,
        "Slowdown that --baseline allows.",
        metavar="N%",
        parse=functools.partial(parse_percentage, largest=10),
        default_text="3%",
    )
    force: bool = option(
        False,
        "Compare also with a baseline of another device or version.",
        default_text="error",
    )

    def read(self) -> Baseline | None:
        """Read the file that `bench --json` wrote; None without one.

        Raises:
            InputError: The file is not a valid result of `bench`, or an option without --baseline.
        """
        from rtresnet.core import atomic_io
        from rtresnet.workflows import result_files

        path = self.baseline
        if path is None:
            if self.tolerance is not None or self.force:
                name = "force" if self.force else "tolerance"
                raise InputError(f"--{name} has no effect without --baseline")
            return None
        fix = f"create one with: rtresnet bench ARTIFACT --json {path}"
        atomic_io.require_file(path, fix=fix)
        file = result_files.read(path)
        if file.verb != "bench":
            raise InputError(f"{path}: a result of {file.verb}, expected one of bench", fix=fix)
        tolerance = 0.03 if self.tolerance is None else self.tolerance
        results = file.result["results"]
        return Baseline(path=path, results=results, tolerance=tolerance, force=self.force)


@dataclass(frozen=True, kw_only=True)
class PrintOptions(Config):
    """What is printed besides the table."""

    intervals: bool = option(False, "Also print 95 % confidence intervals.")
    trtexec: bool = option(False, "Also print the results in trtexec's format.")


@click.command("bench")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@config_options(BenchmarkConfig, leave_out=SHARED)
@config_options(MeasurementConfig, argument="shared")
@config_options(SearchOptions, argument="search")
@config_options(BaselineOptions, argument="comparison")
@config_options(PrintOptions, argument="printed")
@config_options(RuntimeConfig, argument="runtime")
@common.json_option
def command(
    paths: tuple[str, ...],
    config: BenchmarkConfig,
    shared: MeasurementConfig,
    search: SearchOptions,
    comparison: BaselineOptions,
    printed: PrintOptions,
    runtime: RuntimeConfig,
) -> None:
    """Measure latency (median, p90, p95, p99) and throughput.

    Several files are measured in alternating slices and compared. A plan needs a GPU. Without one,
    `--device auto` measures its ONNX file on the CPU instead and prints a note; `--device cuda`
    exits with 3.
    """
    if search.quantity is not None:
        others = (config, comparison, printed)
        refused = {name: value for part in others for name, value in vars(part).items()}
        for name in ("intervals", "trtexec", "tolerance", "force", "baseline", "scenario", "qps",
                     "concurrency", "batch"):  # fmt: skip
            if refused[name] not in (None, False):
                raise InputError(f"--{name} and --find-{search.quantity} cannot be combined")
        _search(paths, search, shared, runtime)
        return
    result, error = benchmark_until_error(
        paths,
        dataclasses.replace(config, **_values(shared)),
        runtime=runtime,
        baseline=comparison.read(),
        reporter=common.REPORTER,
    )
    intervals, trtexec = printed.intervals, printed.trtexec
    common.show(benchmark.lines(result, intervals=intervals, trtexec=trtexec))
    common.write_json("bench", result)
    if error is not None:
        raise error
    result.require_no_regression()


def _search(
    paths: tuple[str, ...],
    search: SearchOptions,
    shared: MeasurementConfig,
    runtime: RuntimeConfig,
) -> None:
    """Search for the highest load, and print and draw its measurements."""
    assert search.quantity is not None
    config = SearchConfig(what=search.quantity, p99_ms=search.p99_ms, **_values(shared))
    plot = search.plot
    if plot is not None and plot.suffix.lower() not in (".svg", ".png"):
        raise InputError(f"--plot {plot}: must end in .svg or .png")
    searches = search_benchmark(paths, config, runtime=runtime, reporter=common.REPORTER)
    common.show(benchmark.search_lines(searches))
    if plot is not None:
        benchmark.write_plot(plot, searches)
    common.write_json("bench-find", searches)
    searches.require_success()


def _values(shared: MeasurementConfig) -> dict[str, Any]:
    return {name: getattr(shared, name) for name in SHARED}
