"""`rtresnet bench`: latency and throughput of ONNX files and plans."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import bench_baseline, bench_find, bench_load, common, opening
from rtresnet.cli.bench_show import show, where, where_lines
from rtresnet.core.errors import InputError, RtresnetError, UnavailableError

if TYPE_CHECKING:
    from rtresnet.runtime.session import Session

__all__ = ["command", "run", "where"]


@click.command("bench", short_help="Measure latency and throughput.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--batch", metavar="N,...", help="Batches to measure [1,8; offline 8].")
@click.option(
    "--seconds", type=float, default=3.0, show_default=True, help="For each, after warm-up."
)
@click.option("--queries", type=click.IntRange(min=1), help="So many requests, not --seconds.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of input, order, arrivals.")
@click.option(
    "--scenario",
    type=click.Choice(bench_load.SCENARIOS),
    help="As MLPerf defines them; closed keeps --concurrency requests in flight. [single-stream]",
)
@click.option(
    "--qps",
    type=float,
    help="Server: Poisson arrivals at this rate, one image each, however late the answers are; "
    "latency counts from the moment a request was meant to come.",
)
@click.option("--concurrency", type=click.IntRange(min=1), help="Closed: requests in flight.")
@click.option(
    "--max-batch", type=click.IntRange(min=1), default=1, show_default=True,
    help="Server and closed: form batches of so many images. --find-batch: the largest to try "
    "[1024].",
)  # fmt: skip
@click.option(
    "--max-wait", default="2ms", show_default=True, help="How long an image waits for a batch."
)
@click.option(
    "--contexts", type=click.IntRange(min=1), metavar="N",
    help="Run up to N requests at the same time in a plan; offline keeps 2 N batches in flight. "
    "[default: 1; 2 with --max-batch]",
)  # fmt: skip
@click.option(
    "--graphs/--no-graphs", default=None,
    help="Require CUDA graphs for a plan, or run without. [default: where they are possible]",
)  # fmt: skip
@click.option(
    "--with-preprocess", metavar="PATH", help="From encoded bytes: an image or a folder of them."
)
@click.option("--find-batch", is_flag=True, help="The largest batch that holds --p99.")
@click.option("--find-qps", is_flag=True, help="The highest rate of arrivals that holds --p99.")
@click.option("--p99", metavar="TIME", help="The bound, as in 10ms.")
@click.option("--plot", metavar="FILE", help="The curve of a search: .svg or .png.")
@click.option("--baseline", metavar="FILE", help="Exit 1 if slower than in this --json file.")
@click.option("--tolerance", default="3%", show_default=True, help="Of --baseline.")
@click.option("--force", is_flag=True, help="Compare with a baseline of another device or version.")
@click.option("--intervals", is_flag=True, help="Print 95 % confidence intervals too.")
@click.option("--trtexec", is_flag=True, help="Print what trtexec would have printed too.")
@common.device_options
@common.json_option
def command(
    paths: tuple[str, ...],
    json_file: str | None,
    find_batch: bool,
    find_qps: bool,
    p99: str | None,
    plot: str | None,
    tolerance: str,
    intervals: bool,
    trtexec: bool,
    **options: Any,
) -> None:
    """Measure latency: median, p90, p95, p99, images/s, one request after another.

    Several files are measured in turn and compared. A plan needs a GPU. Without one, `--device
    auto` measures the ONNX file it was built from on the CPU and says so; `--device cuda` exits 3.
    """
    named = common.given()
    if "max_wait" in named and options["max_batch"] == 1:
        raise InputError("--max-wait is of the batches that --max-batch forms", fix="add it")
    if find_batch or find_qps:
        what = "qps" if find_qps else "batch"
        for name in ("intervals", "trtexec", "tolerance"):
            if name in named:
                raise InputError(f"--{name} and --find-{what} do not go together")
        if find_batch and find_qps:
            raise InputError("--find-batch and --find-qps are two searches", fix="choose one")
        _find(paths, what, p99, plot, json_file, options)
        return
    for name, given in (("p99", p99), ("plot", plot)):
        if given is not None:
            raise InputError(f"--{name} belongs to --find-batch or --find-qps")
    allowed = bench_baseline.percent(tolerance)
    if "tolerance" in named and options["baseline"] is None:
        raise InputError("--tolerance holds nothing without --baseline")
    result, stopped = _run(paths, **options)
    show(result, intervals=intervals, trtexec=trtexec)
    recorded = result.pop("recorded", None)
    if recorded is not None and stopped is None:
        result["regressions"] = bench_baseline.gate(
            options["baseline"], recorded, result["results"], allowed
        )
    common.write_json(json_file, "bench", result)
    if stopped is not None:
        raise stopped
    if judged := result.get("regressions"):
        bench_baseline.refuse_regressions(judged, result["results"])


def run(paths: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes; with a baseline, its results as `recorded`."""
    result, stopped = _run(paths, **options)
    if stopped is not None:
        raise stopped
    return result


def _run(
    paths: tuple[str, ...],
    *,
    batch: str | None = None,
    seconds: float = 3.0,
    queries: int | None = None,
    seed: int = 0,
    scenario: str | None = None,
    qps: float | None = None,
    concurrency: int | None = None,
    max_batch: int = 1,
    max_wait: str = "2ms",
    with_preprocess: str | None = None,
    baseline: str | None = None,
    force: bool = False,
    device: str = "auto",
    **options: Any,
) -> tuple[dict[str, Any], RtresnetError | None]:
    """As `run`; and the error that ended it after at least one batch was measured."""
    from rtresnet.runtime.batcher import SWITCH_SECONDS

    load = bench_load.choose(
        scenario=scenario, batch=batch, qps=qps, concurrency=concurrency, max_batch=max_batch,
        with_preprocess=with_preprocess, seconds=seconds, queries=queries, seed=seed,
        max_wait_ms=bench_load.milliseconds(max_wait, "max-wait"),
    )  # fmt: skip
    recorded = bench_baseline.read(baseline) if baseline is not None else None
    results: list[dict[str, Any]] = []
    stopped: RtresnetError | None = None
    with _opened(paths, device, options, max_batch) as (sessions, facts, watch):
        load, left_out = bench_load.for_fixed_batch(load, sessions, asked=batch is not None)
        if left_out:
            _say_first(left_out)
        planned = [
            fact
            | {"batch": count, "scenario": load.scenario, "load": load.facts(session)}
            | {"with_preprocess": bool(load.images)}
            for count in load.batches
            for fact, session in zip(facts, sessions, strict=True)
        ]
        if recorded is not None and baseline is not None:
            bench_baseline.require_alike(baseline, recorded, planned, force)
        for place, count in enumerate(load.batches):
            total = seconds * len(paths)
            try:
                with common.progress(f"measuring at batch {count}", total=total) as update:
                    measured = bench_load.measure(sessions, load, count, update)
            except RtresnetError as error:
                if not results:
                    raise
                stopped = error
                break
            about = planned[place * len(paths) :]
            for fact, taken in zip(about, measured, strict=False):
                entry = fact | dataclasses.asdict(taken)
                results.append(entry | {"load": taken.load | fact["load"]})
    notes = [fact["note"] for fact in facts if fact["note"]]
    result = {
        "notes": [*notes, *([left_out] if left_out else [])],
        "scenario": load.scenario,
        "qps": qps,
        "seed": seed,
        "with_preprocess": bool(load.images),
        "switch_interval_s": SWITCH_SECONDS,
        "environment": watch.report,
        "results": results,
    } | ({"recorded": recorded} if recorded is not None else {})
    return result, stopped


def _say_first(note: str) -> None:
    """What is measured otherwise than asked, before the wait and not after it."""
    common.out_console().print(f"NOTE: {note}", style="bold yellow", markup=False, soft_wrap=True)


@contextlib.contextmanager
def _opened(
    paths: Sequence[str], device: str, options: dict[str, Any], max_batch: int
) -> Iterator[tuple[list[Session], list[dict[str, Any]], Any]]:
    """Sessions, what is known of each before it is measured, and a watch on the machine."""
    from rtresnet.bench import environment
    from rtresnet.core import hardware
    from rtresnet.runtime.batcher import short_switch_interval

    chosen = [stand_in_for(path, device) for path in paths]
    for _, stand_in in chosen:
        if stand_in:
            _say_first(stand_in)
    targets = [target for target, _ in chosen]
    formed = max_batch > 1
    with contextlib.ExitStack() as stack:
        stack.enter_context(short_switch_interval())
        sessions = [
            stack.enter_context(
                opening.open_session(
                    target,
                    targets,
                    "cpu" if stand_in else device,
                    options,
                    contexts=2 if formed else 1,
                    timings=not formed,
                )
            )
            for target, stand_in in chosen
        ]
        sizes = {session.size for session in sessions}
        if len(sizes) > 1:
            raise InputError(f"the files take inputs of different sizes: {sorted(sizes)}")
        facts = []
        for path, (target, stand_in), session in zip(paths, chosen, sessions, strict=True):
            sidecar = session.sidecar
            facts.append(
                {
                    "asked": path,
                    "measured": target,
                    "instead_of_plan": stand_in is not None,
                    "note": stand_in,
                    "precision": sidecar.precision if sidecar else None,
                    "untrained": bool(sidecar and sidecar.weights.origin == "untrained"),
                    "size": session.size,
                    "chain": environment.chain_of(target),
                }
                | session.describe()
            )
        on_gpu = any(session.backend.device != "cpu" for session in sessions)
        with environment.Watch(next(iter(hardware.gpus()), None) if on_gpu else None) as watch:
            yield sessions, facts, watch


def _find(
    paths: tuple[str, ...],
    what: str,
    p99: str | None,
    plot: str | None,
    json_file: str | None,
    options: dict[str, Any],
) -> None:
    if p99 is None:
        raise InputError(f"--find-{what} needs a bound", fix="as in --p99 10ms")
    for name in ("scenario", "qps", "concurrency", "batch", "baseline"):
        if options.pop(name) is not None:
            raise InputError(f"--{name} and --find-{what} do not go together")
    if options.pop("force"):
        raise InputError("--force belongs to --baseline")
    bound = bench_load.milliseconds(p99, "p99")
    if plot is not None:
        bench_find.check_plot(plot)
    if what == "batch" and (options["queries"] or bench_find.FEWEST) < bench_find.FEWEST:
        raise InputError(f"--queries {options['queries']}: a p99 takes {bench_find.FEWEST}")
    names = ("seconds", "queries", "seed", "max_batch", "with_preprocess")
    asked = {name: options.pop(name) for name in names}
    max_wait = bench_load.milliseconds(options.pop("max_wait"), "max-wait")
    images = asked.pop("with_preprocess")
    load = bench_load.Load(
        **asked, max_wait_ms=max_wait, images=bench_load.read_images(images) if images else ()
    )
    device, searches = options.pop("device"), []
    with _opened(paths, device, options, load.max_batch) as (sessions, facts, watch):
        for session in sessions:
            if what == "batch" and session.batch is not None:
                raise InputError(
                    f"{session.path}: takes batches of {session.batch}, so there is none to search",
                    fix=f"rtresnet bench {session.path} --batch {session.batch}",
                )
            if what == "qps":
                server = dataclasses.replace(load, scenario="server", batches=(1,))
                bench_load.for_fixed_batch(server, [session], asked=True)
        for session, fact in zip(sessions, facts, strict=True):
            found = bench_find.search(session, load, what=what, bound=bound)
            searches.append((fact, bench_find.as_json(found, what, bound)))
    for fact, search in searches:
        bench_find.show(fact["measured"], search, bound)
    console = common.out_console()
    for line in where_lines(facts):
        console.print(line, soft_wrap=True, markup=False)
    for remark in watch.report["remarks"]:
        console.print(f"NOTE: {remark}", style="bold yellow", markup=False, soft_wrap=True)
    if plot is not None:
        bench_find.write_plot(plot, [(fact["measured"], found) for fact, found in searches])
    common.write_json(
        json_file,
        "bench-find",
        {
            "environment": watch.report,
            "searches": [fact | {"search": found} for fact, found in searches],
        },
    )
    for fact, search in searches:
        bench_find.require_best(fact["measured"], search, bound)


def stand_in_for(path: str, device: str) -> tuple[str, str | None]:
    """What to measure for `path`, and the sentence that says so where it is not `path` itself."""
    from rtresnet.core import artifacts, atomic_io, hardware

    atomic_io.require_file(path, fix="make one with: rtresnet export")
    if artifacts.kind_of(path) != "plan" or hardware.gpus() or device == "cuda":
        return path, None
    sidecar = artifacts.verify(path)
    parent = artifacts.parent_path(path, sidecar) if sidecar else None
    if sidecar is None or parent is None:
        raise UnavailableError(
            f"{path}: a plan without sidecar and no GPU to run it", fix="name its ONNX file instead"
        )
    atomic_io.require_file(parent, fix="bring the ONNX file along, or run on a GPU")
    if sidecar.parent is not None and atomic_io.sha256(parent) != sidecar.parent.sha256:
        raise InputError(
            f"{parent}: no longer the file {path} was built from", fix=f"rtresnet build {parent}"
        )
    return str(parent), (
        f"no GPU here: measured is {parent} on the CPU, which {path} was built from"
    )
