"""Measure latency and throughput of checkpoints, ONNX files and plans.

Several artifacts are measured under the same workload and compared. A result can also be compared
with an earlier one, its baseline. `workload.py` defines the requests to the sessions, and
`benchmark_search.py` finds the largest load within a latency bound.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core import artifacts, hardware, reporter
from rtresnet.core.config import option
from rtresnet.core.errors import CheckFailedError, InputError, RtresnetError
from rtresnet.core.precisions import PRECISIONS
from rtresnet.core.reporter import Reporter
from rtresnet.core.serialization import flattened, to_builtins
from rtresnet.runtime.session import RuntimeInfo
from rtresnet.workflows import workload as workloads
from rtresnet.workflows.loading import RuntimeConfig, load_artifact
from rtresnet.workflows.plan_fallback import with_fallbacks
from rtresnet.workflows.workload import BATCHES, MeasurementConfig, Scenario, Workload

if TYPE_CHECKING:
    from rtresnet.bench.environment import ChainLink, EnvironmentReport, Watch
    from rtresnet.bench.verdict import Judgement
    from rtresnet.bench.workload import Measurement
    from rtresnet.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(MeasurementConfig):
    """The workload of a benchmark.

    Attributes:
        batch: Images per request, one measurement each; None for those of the scenario.
        scenario: MLPerf's scenarios; "closed" keeps `concurrency` requests in flight. None is
            single-stream, or server with `qps`, or closed with `concurrency`.
        qps: Poisson arrivals per second, for server.
        concurrency: Number of clients, for closed.
    """

    batch: tuple[int, ...] | None = option(
        None,
        "Batch sizes to measure.",
        metavar="N,...",
        minimum=1,
        parse=workloads.parse_batches,
        default_text="1,8; offline 8",
    )
    scenario: Scenario | None = option(
        None,
        "Scenario as MLPerf defines it; closed keeps --concurrency requests in flight.",
        default_text="single-stream",
    )
    qps: float | None = option(
        None,
        "Send single images as Poisson arrivals at this rate per second, without waiting for "
        "responses (server). Latency is counted from the scheduled arrival.",
    )
    concurrency: int | None = option(
        None, "Number of requests in flight (closed).", metavar="N", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        scenario = self.resolved_scenario
        for name, value, owner in (
            ("qps", self.qps, "server"), ("concurrency", self.concurrency, "closed"),
        ):  # fmt: skip
            if value is not None and scenario != owner:
                raise InputError(f"--{name} applies to --scenario {owner}, not to {scenario}")
            if value is None and scenario == owner:
                raise InputError(f"--scenario {owner} needs --{name}", fix=f"as in --{name} 50")
        if self.qps is not None and not 0 < self.qps < float("inf"):
            raise InputError(f"--qps {self.qps:g}: must be above 0")
        if self.batch is not None and scenario in ("multi-stream", "server"):
            raise InputError(f"--batch: {scenario} has a fixed number of images per request")
        if self.batched == 1:
            return
        if scenario not in ("server", "closed"):
            raise InputError(f"--max-batch forms batches under server and closed, not {scenario}")
        if self.with_preprocess is not None:
            raise InputError(
                "--with-preprocess measures without a batcher", fix="leave --max-batch out"
            )
        if self.batch not in (None, (1,)):
            raise InputError("--max-batch needs requests of one image", fix="leave --batch out")

    @property
    def resolved_scenario(self) -> Scenario:
        """The scenario, also if it follows from other options."""
        if self.scenario is not None:
            return self.scenario
        if self.qps is not None:
            return "server"
        return "single-stream" if self.concurrency is None else "closed"

    def workload(self) -> Workload:
        """Return the workload; read the images of `with_preprocess`."""
        scenario = self.resolved_scenario
        return Workload(
            scenario=scenario, batches=self.batch or BATCHES[scenario], seconds=self.seconds,
            queries=self.queries, seed=self.seed, qps=self.qps, concurrency=self.concurrency,
            max_batch=self.batched, max_wait_ms=self.wait_ms,
            images=workloads.read_images(self.with_preprocess),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BenchmarkedArtifact:
    """An artifact and how it runs.

    Attributes:
        asked: The requested path.
        measured: The measured path: without a GPU, the ONNX file of a plan.
        instead_of_plan: Whether the two differ.
        note: A sentence on that, or that FP8 or BF16 is not computed as such.
        precision: From the sidecar; None without one.
        untrained: Whether the weights are random.
        size: Side of the input, in pixels.
        chain: The artifact and its ancestors.
        run: Device, provider, threads and versions.
    """

    asked: str
    measured: str
    instead_of_plan: bool
    note: str | None
    precision: str | None
    untrained: bool
    size: int
    chain: tuple[ChainLink, ...]
    run: RuntimeInfo = flattened()


@dataclass(frozen=True, kw_only=True)
class BenchmarkEntry:
    """One artifact at one batch size."""

    artifact: BenchmarkedArtifact = flattened()
    scenario: str
    with_preprocess: bool
    measurement: Measurement = flattened()

    @property
    def name(self) -> str:
        """The file's name and the batch size."""
        return f"{Path(self.artifact.measured).name}, batch {self.measurement.batch}"


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Latencies and throughput of all artifacts.

    Attributes:
        notes: Differences from the requested measurements.
        switch_interval_s: Python's thread switch interval during the measurement, in seconds.
        environment: State of the machine during the measurement.
        results: By batch size, then in the order of the artifacts.
        regressions: Each result compared with the baseline; None without one.
    """

    notes: tuple[str, ...]
    scenario: str
    qps: float | None
    seed: int
    with_preprocess: bool
    switch_interval_s: float
    environment: EnvironmentReport
    results: tuple[BenchmarkEntry, ...]
    regressions: tuple[Judgement, ...] | None = None

    def require_no_regression(self) -> None:
        """Check the comparison with the baseline.

        Raises:
            CheckFailedError: A result is slower than the baseline.
            InputError: There were too few samples to compare.
        """
        judged = list(zip(self.results, self.regressions or (), strict=bool(self.regressions)))
        slower = [
            f"{Path(entry.artifact.measured).name} at batch {entry.measurement.batch}"
            for entry, judgement in judged
            if judgement.regression
        ]
        if slower:
            raise CheckFailedError(f"slower than {judged[0][1].baseline}: {', '.join(slower)}")
        if lacking := sorted({j.figure for _, j in judged if j.comparison is None}):
            raise InputError(
                f"{judged[0][1].baseline}: too few samples for a {', '.join(lacking)}; nothing "
                "was compared",
                fix="measure both for longer: --seconds, --queries",
            )


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """An earlier result to compare with.

    Attributes:
        path: The file it was read from, for messages.
        results: Its entries, as `to_builtins` writes them.
        tolerance: Allowed slowdown: 0.03 is 3 %.
        force: Whether to compare results of different devices or versions.

    Raises:
        InputError: A result has no samples.
    """

    path: str
    results: Sequence[Mapping[str, Any]]
    tolerance: float = 0.03
    force: bool = False

    def __post_init__(self) -> None:
        if not self.results or not all(entry.get("samples") for entry in self.results):
            raise InputError(
                f"{self.path}: contains no samples to compare with",
                fix=f"create one with: rtresnet bench ARTIFACT --json {self.path}",
            )

    def require_alike(self, planned: Sequence[Mapping[str, Any]]) -> None:
        """Raise InputError if the planned measurements cannot be compared with the baseline."""
        from rtresnet.bench import verdict

        if len(self.results) != len(planned):
            raise InputError(
                f"{self.path}: has {len(self.results)} results, but {len(planned)} will be "
                "measured",
                fix="name the same files and batches",
            )
        for now, then in zip(planned, self.results, strict=True):
            differences = verdict.config_diff(now, then)
            if verdict.scenario(now) != verdict.scenario(then):
                raise InputError(f"{self.path}: {'; '.join(differences)}")
            if differences and not self.force:
                raise InputError(
                    f"{self.path}: {'; '.join(differences)}",
                    fix="add --force to compare them anyway",
                )

    def judge(self, entries: Sequence[BenchmarkEntry]) -> tuple[Judgement, ...]:
        """Compare each result with its counterpart."""
        from rtresnet.bench import verdict

        return tuple(
            verdict.judge(to_builtins(now), then, tolerance=self.tolerance, baseline=self.path)
            for now, then in zip(entries, self.results, strict=True)
        )


def benchmark(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    config: BenchmarkConfig | None = None,
    *,
    runtime: RuntimeConfig | None = None,
    baseline: Baseline | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> BenchmarkResult:
    """Measure artifacts under one workload and compare them with the first.

    Without a GPU, and with `device="auto"`, the ONNX file that a plan was built from is measured
    on the CPU instead of the plan; the result has a note.

    Args:
        paths: Checkpoints, ONNX files and plans that take images of the same size.
        config: The workload.
        runtime: Where the artifacts run.
        baseline: An earlier result to compare with; see `BenchmarkResult.regressions`.
        reporter: Receives progress and notes.

    Returns:
        Latency and throughput of each artifact at each batch size, with the environment.

    Raises:
        InputError: No such file, options that do not go together, or an incomparable baseline.
        ArtifactError: A file does not match its sidecar.
        UnavailableError: The device, the provider or a package is not available.
    """
    result, error = benchmark_until_error(
        paths, config, runtime=runtime, baseline=baseline, reporter=reporter
    )
    if error is not None:
        raise error
    return result


def benchmark_until_error(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    config: BenchmarkConfig | None = None,
    *,
    runtime: RuntimeConfig | None = None,
    baseline: Baseline | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> tuple[BenchmarkResult, RtresnetError | None]:
    """Run `benchmark`, but keep finished measurements if a later batch size fails.

    Returns:
        The result, and the error that ended the benchmark before its last batch size.
    """
    from rtresnet.runtime.batcher import SWITCH_SECONDS

    config = config or BenchmarkConfig()
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not paths:
        raise InputError("nothing to measure", fix="name an artifact")
    workload = config.workload()
    entries: list[BenchmarkEntry] = []
    error: RtresnetError | None = None
    with opened(paths, runtime, config.batched, reporter) as (sessions, measured, watch):
        workload, omitted = workloads.for_fixed_batch(
            workload, sessions, explicit=config.batch is not None
        )
        if omitted:
            reporter.note(f"NOTE: {omitted}")
        if baseline is not None:
            baseline.require_alike(_planned(workload, sessions, measured))
        for batch in workload.batches:
            total = workload.seconds * len(sessions)
            try:
                with reporter.progress(f"measuring at batch {batch}", total=total) as update:
                    measurements = workloads.measure(sessions, workload, batch, update)
            except RtresnetError as stopped:
                if not entries:
                    raise
                error = stopped
                break
            for session, artifact, measurement in zip(
                sessions, measured, measurements, strict=True
            ):
                entries.append(
                    BenchmarkEntry(
                        artifact=artifact,
                        scenario=workload.scenario,
                        with_preprocess=bool(workload.images),
                        measurement=_with_facts(measurement, workload, session),
                    )
                )
    judged = baseline.judge(entries) if baseline is not None and error is None else None
    result = BenchmarkResult(
        notes=tuple(filter(None, [*(artifact.note for artifact in measured), omitted])),
        scenario=workload.scenario,
        qps=workload.qps,
        seed=workload.seed,
        with_preprocess=bool(workload.images),
        switch_interval_s=SWITCH_SECONDS,
        environment=watch.report,
        results=tuple(entries),
        regressions=judged,
    )
    return result, error


def _with_facts(measurement: Measurement, workload: Workload, session: Session) -> Measurement:
    """Add the planned load to the load that was measured."""
    facts = dataclasses.asdict(workload.facts(session))
    stated_facts = {name: value for name, value in facts.items() if value is not None}
    return dataclasses.replace(
        measurement, load=dataclasses.replace(measurement.load, **stated_facts)
    )


def _planned(
    workload: Workload, sessions: Sequence[Session], measured: Sequence[BenchmarkedArtifact]
) -> list[dict[str, Any]]:
    """Return the planned measurements, described as in the result."""
    return [
        to_builtins(artifact)
        | {"batch": batch, "scenario": workload.scenario}
        | {"load": to_builtins(workload.facts(session)), "with_preprocess": bool(workload.images)}
        for batch in workload.batches
        for artifact, session in zip(measured, sessions, strict=True)
    ]


@contextlib.contextmanager
def opened(
    paths: Sequence[str | os.PathLike[str]],
    runtime: RuntimeConfig | None,
    max_batch: int,
    reporter: Reporter,
) -> Iterator[tuple[list[Session], list[BenchmarkedArtifact], Watch]]:
    """Load artifacts for measuring, and monitor the machine.

    Args:
        paths: Checkpoints, ONNX files and plans.
        runtime: Where they run.
        max_batch: Above 1, batches are formed: plans get two contexts, and no timings are recorded.
        reporter: Receives a note for each plan whose ONNX file is measured.

    Yields:
        Sessions, their records, and the watch, whose report is complete after the block.

    Raises:
        InputError: Inputs of different sizes.
    """
    from rtresnet.bench import environment
    from rtresnet.runtime.batcher import short_switch_interval

    runtime = runtime or RuntimeConfig()
    names = [os.fspath(path) for path in paths]
    names, chosen = with_fallbacks(names, runtime.device, reporter)
    targets = [target for target, _ in chosen]
    with contextlib.ExitStack() as stack:
        stack.enter_context(short_switch_interval())
        sessions = []
        for target, note in chosen:
            settings = runtime.for_artifact(target, targets, batches=max_batch > 1)
            if note:
                settings = dataclasses.replace(settings, device="cpu")
            session = load_artifact(target, settings, input_needed=False, timings=max_batch == 1)
            sessions.append(stack.enter_context(session))
        sizes = {session.size for session in sessions}
        if len(sizes) > 1:
            raise InputError(f"the files have different input sizes: {sorted(sizes)}")
        measured = [
            BenchmarkedArtifact(
                asked=name,
                measured=target,
                instead_of_plan=note is not None,
                note=" ".join(filter(None, [note, _emulated(session)])) or None,
                precision=session.sidecar.precision if session.sidecar else None,
                untrained=bool(session.sidecar and session.sidecar.weights.origin == "untrained"),
                size=session.size,
                chain=environment.chain_of(target),
                run=session.info,
            )
            for name, (target, note), session in zip(names, chosen, sessions, strict=True)
        ]
        for session in sessions:
            if emulated := _emulated(session):
                reporter.note(f"NOTE: {emulated}")
        on_gpu = any(session.backend.device != "cpu" for session in sessions)
        with environment.Watch(next(iter(hardware.gpus()), None) if on_gpu else None) as watch:
            yield sessions, measured, watch


def _emulated(session: Session) -> str | None:
    """Return a sentence on a file whose precision is not computed as such."""
    spec, name = PRECISIONS.get(session.precision), session.precision.upper()
    if spec is None or spec.targets is None or artifacts.kind_of(session.path) == "plan":
        return None
    return (
        f"{session.path}: ONNX Runtime converts {name} to FP32 and computes in FP32; these times "
        f"do not indicate the speed of {name} on a GPU"
    )
