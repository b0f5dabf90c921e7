"""Find the largest batch, or the highest rate of arrivals, whose p99 latency is within a bound."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rtresnet.core import reporter
from rtresnet.core.config import option, parse_milliseconds
from rtresnet.core.errors import CheckFailedError, InputError
from rtresnet.core.reporter import Reporter
from rtresnet.core.serialization import flattened
from rtresnet.workflows import benchmark
from rtresnet.workflows import workload as workloads
from rtresnet.workflows.benchmark import BenchmarkedArtifact
from rtresnet.workflows.loading import RuntimeConfig
from rtresnet.workflows.workload import MeasurementConfig, Workload

if TYPE_CHECKING:
    from rtresnet.bench.environment import EnvironmentReport
    from rtresnet.bench.search import Point, SearchResult
    from rtresnet.bench.workload import Measurement
    from rtresnet.runtime.session import Session

LARGEST_BATCH = 1024  # default of max_batch
FEWEST = 100
"""Requests that a p99 needs."""
FEWEST_ARRIVALS = 200
UNQUEUED = 3
"""Measurements without a queue: if most of them miss the bound, every rate does."""
STEP = 1.02
"""Ratio of successive rates: the p99 of a few seconds does not resolve smaller steps."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(MeasurementConfig):
    """Options of the search for the highest load.

    Attributes:
        what: "batch": images per call, sequential calls. "qps": Poisson arrivals of single
            images per second, through a batcher if `max_batch` is above 1.
        p99_ms: Bound of the p99 latency, in milliseconds.
    """

    what: Literal["batch", "qps"]
    p99_ms: float | None = option(
        None,
        "Limit of the p99 latency for --find-batch and --find-qps, as in 10ms.",
        names=("--p99",),
        metavar="TIME",
        parse=parse_milliseconds,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in ("batch", "qps"):
            raise InputError(f"what={self.what!r}: must be batch or qps")
        if self.p99_ms is None:
            raise InputError(f"--find-{self.what} needs a limit", fix="as in --p99 10ms")
        if not 0 < self.p99_ms < float("inf"):
            raise InputError(f"--p99 {self.p99_ms:g}: must be above 0")
        if self.what == "batch" and (self.queries or FEWEST) < FEWEST:
            raise InputError(f"--queries {self.queries}: a p99 needs at least {FEWEST} queries")
        if self.formed > 1 and self.with_preprocess is not None:
            raise InputError(
                "--with-preprocess measures without a batcher", fix="leave --max-batch out"
            )

    @property
    def formed(self) -> int:
        """Largest batch that a batcher forms; 1 for none."""
        return self.batched if self.what == "qps" else 1

    @property
    def bound(self) -> float:
        """`p99_ms`, which is never None."""
        assert self.p99_ms is not None
        return self.p99_ms


@dataclass(frozen=True, kw_only=True)
class SearchEntry:
    """The search with one artifact."""

    artifact: BenchmarkedArtifact = flattened()
    search: SearchResult


@dataclass(frozen=True, kw_only=True)
class BenchmarkSearchResult:
    """The searches, in the order of the artifacts.

    Attributes:
        environment: State of the machine during the measurement.
        searches: One for each artifact.
    """

    environment: EnvironmentReport
    searches: tuple[SearchEntry, ...]

    def require_success(self) -> None:
        """Raise CheckFailedError if no load is within the bound."""
        for entry in self.searches:
            quantity, bound = entry.search.what, entry.search.p99_ms
            if entry.search.best is not None:
                continue
            smallest = entry.search.points[0]
            load = f"{quantity} {smallest.load:g}" if smallest.load else "without a queue"
            p99 = (
                "most requests are later" if smallest.p99 is None else f"p99 {smallest.p99:.3g} ms"
            )
            raise CheckFailedError(
                f"{entry.artifact.measured}: no {quantity} has a p99 within {bound:g} ms; "
                f"{load}: {p99}"
            )


def search_benchmark(
    paths: Sequence[str | os.PathLike[str]],
    config: SearchConfig,
    *,
    runtime: RuntimeConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> BenchmarkSearchResult:
    """Search for the largest load within a latency bound, for each artifact.

    Args:
        paths: Checkpoints, ONNX files and plans that take images of the same size.
        config: What is searched for.
        runtime: Where the artifacts run.
        reporter: Receives a note for each measurement.

    Returns:
        The largest load of each artifact within the bound, with all measurements.

    Raises:
        InputError: No such file, or a file whose fixed batch leaves nothing to search.
        ArtifactError: A file does not match its sidecar.
        UnavailableError: The device, the provider or a package is not available.
    """
    workload = Workload(
        scenario="server" if config.what == "qps" else "closed", seconds=config.seconds,
        queries=config.queries, seed=config.seed, max_batch=config.formed,
        max_wait_ms=config.wait_ms,
        images=workloads.read_images(config.with_preprocess),
    )  # fmt: skip
    searches = []
    with benchmark.opened(paths, runtime, config.formed, reporter) as (sessions, measured, watch):
        for session in sessions:
            if config.what == "batch" and session.batch is not None:
                raise InputError(
                    f"{session.path}: its batch is fixed at {session.batch}, so --find-batch "
                    "cannot search",
                    fix=f"rtresnet bench {session.path} --batch {session.batch}",
                )
            if config.what == "qps":
                workloads.for_fixed_batch(workload, [session], explicit=True)
        for session, artifact in zip(sessions, measured, strict=True):
            one = _Searcher(session, workload, config.bound, reporter)
            result = one.rate() if config.what == "qps" else one.batch(config.max_batch)
            searches.append(SearchEntry(artifact=artifact, search=result))
    return BenchmarkSearchResult(environment=watch.report, searches=tuple(searches))


class _Searcher:
    """Measures one session under several loads, each with a different seed."""

    def __init__(
        self, session: Session, workload: Workload, bound: float, reporter: Reporter
    ) -> None:
        self._session, self._workload = session, workload
        self._bound, self._reporter = bound, reporter
        self._seeds = iter(range(workload.seed, workload.seed + 10_000))

    def batch(self, largest: int | None) -> SearchResult:
        """Search for the largest batch, up to `largest`."""
        from rtresnet.bench import search

        largest = largest if largest is not None and largest > 1 else LARGEST_BATCH
        largest = min(largest, getattr(self._session.backend, "largest", largest))
        return search.largest(
            range(1, largest + 1),
            lambda batch: self._calls(int(batch)),
            what="batch",
            bound=self._bound,
            gallop=True,
            on_point=lambda point: self._note(point, "images per batch"),
        )

    def rate(self) -> SearchResult:
        """Search for the highest rate, if the bound can be met without a queue at all."""
        from rtresnet.bench import search

        # A single client would wait in vain for others to share its batch; at a high rate the
        # batch is full before.
        unqueued = [self._calls(1, wait=False) for _ in range(UNQUEUED)]
        late = sum((entry.latency.p99 or self._bound + 1) > self._bound for entry in unqueued)
        if late > UNQUEUED / 2:
            point = search.point(0.0, unqueued[0], self._bound)
            return search.SearchResult(
                what="qps", p99_ms=self._bound, best=None, limit=False, points=(point,)
            )
        requests = workloads.candidate(self._session, self._workload, 1)

        def at_rate(rate: float) -> Measurement:
            arrivals = max(FEWEST_ARRIVALS, round(self._workload.seconds * rate))
            workload = dataclasses.replace(
                self._workload, scenario="server", qps=rate, seed=next(self._seeds),
                queries=self._workload.queries or arrivals,
            )  # fmt: skip
            return workloads.measure_queued(
                self._session, requests, workload, early_stop=search.early_stop(self._bound)
            )

        result = search.largest(
            rates_below(1.1 * self._capacity()),
            at_rate,
            what="qps",
            bound=self._bound,
            gallop=False,
            on_point=lambda point: self._note(point, "requests/s"),
        )
        if result.best is None and self._workload.max_batch > 1 and self._workload.max_wait_ms:
            self._reporter.note(
                f"each request waits up to {self._workload.max_wait_ms:g} ms for others to share "
                "its batch; a smaller --max-wait may meet the bound"
            )
        return result

    def _calls(self, batch: int, *, wait: bool = True) -> Measurement:
        """Measure sequential requests; without `wait`, a batch does not wait to fill."""
        from rtresnet.bench import search

        workload = dataclasses.replace(
            self._workload,
            scenario="closed",
            concurrency=1,
            seed=next(self._seeds),
            max_wait_ms=self._workload.max_wait_ms if wait else 0.0,
        )
        return workloads.measure_queued(
            self._session, workloads.candidate(self._session, workload, batch), workload, batch,
            fewest=FEWEST, early_stop=search.early_stop(self._bound),
        )  # fmt: skip

    def _capacity(self) -> float:
        """Return images/s with more clients than fit into one batch."""
        workload = dataclasses.replace(
            self._workload, scenario="closed", concurrency=2 * self._workload.max_batch,
            queries=None, seconds=min(self._workload.seconds, 1.0),
        )  # fmt: skip
        requests = workloads.candidate(self._session, self._workload, 1)
        measurement = workloads.measure_queued(self._session, requests, workload, fewest=10)
        assert measurement.latency.images_per_second is not None
        return measurement.latency.images_per_second

    def _note(self, point: Point, unit: str) -> None:
        p99 = "too many late requests" if point.p99 is None else f"p99 {point.p99:.3g} ms"
        self._reporter.note(f"{point.load:.6g} {unit}: {p99}, n {point.n}")


def rates_below(highest: float) -> list[float]:
    """Return rates from a fiftieth of `highest` up to it, 2 % apart, with three digits."""
    rates: list[float] = []
    rate = highest / 50
    while rate < highest:
        rates.append(float(f"{rate:.3g}"))
        rate *= STEP
    return [*dict.fromkeys(rates)]
