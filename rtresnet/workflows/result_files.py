"""Format of the files that `--json` writes, as far as `report` and `bench --baseline` read them.

Fields that older versions did not write are optional; fields that are not declared are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta
from typing_extensions import NotRequired, TypedDict  # in typing from Python 3.11

from rtresnet.core import serialization
from rtresnet.core.errors import InputError

# Bounds keep arithmetic and plots finite; no figure of a machine comes near them.
Positive = Annotated[float, Meta(ge=1e-12, le=1e15)]
Figure = Annotated[float, Meta(ge=0, le=1e15)]
Share = Annotated[float, Meta(ge=0, le=1)]
Percent = Annotated[float, Meta(ge=0, le=100)]
Points = Annotated[float, Meta(ge=-1e15, le=1e15)]
Count = Annotated[int, Meta(ge=0, le=10**15)]
Batch = Annotated[int, Meta(ge=1, le=10**9)]


class Where(TypedDict):
    """Device and library versions of a measurement."""

    device: NotRequired[str | None]
    provider: NotRequired[str | None]
    threads: NotRequired[Count | None]
    contexts: NotRequired[Count | None]
    graphs: NotRequired[str | None]
    versions: NotRequired[dict[str, str] | None]


class Environment(TypedDict):
    """Load and clocks of the machine during a measurement."""

    remarks: NotRequired[list[str] | None]


class LatencyRecord(TypedDict):
    """A summary in milliseconds; None: too few samples."""

    n: NotRequired[Count | None]
    median: Positive
    std: NotRequired[Figure | None]
    p90: NotRequired[Positive | None]
    p95: NotRequired[Positive | None]
    p99: NotRequired[Positive | None]
    p999: NotRequired[Positive | None]
    images_per_second: NotRequired[Figure | None]


class Load(TypedDict):
    """Parameters of a scenario."""

    qps: NotRequired[Positive | None]
    concurrency: NotRequired[Count | None]
    max_batch: NotRequired[Count | None]
    max_wait_ms: NotRequired[Figure | None]
    in_flight: NotRequired[Count | None]


class ComparisonRecord(TypedDict):
    """A speed compared with that of the first artifact of the same call; see `bench.verdict`."""

    verdict: Literal["faster", "slower", "no difference shown"]


class ChainRecord(TypedDict):
    """An artifact or one of its ancestors, the artifact first."""

    sha256: NotRequired[str | None]


class Entry(Where):
    """One artifact at one batch, under one load."""

    measured: str
    precision: NotRequired[str | None]
    untrained: NotRequired[bool | None]
    batch: Batch
    size: NotRequired[Count | None]
    scenario: NotRequired[
        Literal["single-stream", "multi-stream", "offline", "server", "closed"] | None
    ]
    with_preprocess: NotRequired[bool | None]
    load: NotRequired[Load | None]
    latency: LatencyRecord
    parts: NotRequired[dict[str, LatencyRecord] | None]
    speed: NotRequired[Positive | None]
    comparison: NotRequired[ComparisonRecord | None]
    steady: NotRequired[bool | None]
    samples: NotRequired[list[Positive] | None]
    environment: NotRequired[Environment | None]
    chain: NotRequired[list[ChainRecord] | None]


class Bench(TypedDict):
    """`bench --json`."""

    notes: NotRequired[list[str] | None]
    results: list[Entry]


class PointRecord(TypedDict):
    """One measurement of a search."""

    load: Figure
    n: NotRequired[Count | None]
    median: Positive
    p99: Positive | None
    images_per_second: NotRequired[Figure | None]


class Search(TypedDict):
    """A search for the largest load within a bound."""

    what: Literal["batch", "qps"]
    p99_ms: Positive
    best: Positive | None
    limit: bool
    points: list[PointRecord]


class SearchRecord(Where):
    """A search of one artifact."""

    measured: str
    precision: NotRequired[str | None]
    untrained: NotRequired[bool | None]
    note: NotRequired[str | None]
    search: Search


class BenchFind(TypedDict):
    """`bench --find-batch --json` and `bench --find-qps --json`."""

    environment: NotRequired[Environment | None]
    searches: list[SearchRecord]


class Labels(TypedDict):
    """Match of the labels with the model's classes."""

    remarks: NotRequired[list[str] | None]


class AccuracyRecord(TypedDict):
    """Accuracy, in a result of `eval` and in a sidecar; of a detector average precision."""

    ap: NotRequired[Percent | None]
    ap50: NotRequired[Percent | None]
    ap75: NotRequired[Percent | None]
    voc07: NotRequired[Percent | None]
    small: NotRequired[Percent | None]
    medium: NotRequired[Percent | None]
    large: NotRequired[Percent | None]
    objects: NotRequired[Count | None]
    top1: NotRequired[Count | None]
    top5: NotRequired[Count | None]
    top1_percent: NotRequired[Percent | None]
    top5_percent: NotRequired[Percent | None]
    n: NotRequired[Count | None]
    data: NotRequired[str | None]
    split: NotRequired[str | None]
    data_sha256: NotRequired[str | None]
    protocol: NotRequired[str | None]
    labels: NotRequired[Labels | None]
    assumed: NotRequired[list[str] | None]


class PrecisionCurve(TypedDict):
    """Precision of one class at recalls 0, 0.01, ... 1."""

    name: str
    precision: list[Share]


class Details(TypedDict):
    """Additional values of `eval` for a page: the curves of a detector."""

    curves: NotRequired[list[PrecisionCurve]]


class ArtifactRecord(TypedDict):
    """An artifact and its precision."""

    artifact: str
    precision: NotRequired[str | None]


class Member(ArtifactRecord, AccuracyRecord, Where):
    """One artifact's accuracy."""


class Eval(Member):
    """`eval --json`: the accuracy of the only member, or of the ensemble."""

    members: NotRequired[list[Member] | None]
    report: NotRequired[Details | None]


class Trained(TypedDict):
    """Measurements of training in a checkpoint's sidecar; accuracies in percent."""

    name: str
    test_top1: Percent
    test_n: NotRequired[Count | None]


class GateLoss(TypedDict):
    """Result of the accuracy gate in a sidecar: top-1 lost, in percentage points."""

    points: Points
    low: Points
    high: Points
    n: Count
    data: NotRequired[str | None]
    bound: NotRequired[Points | None]
    verdict: NotRequired[str | None]


class Compare(TypedDict):
    """`compare --json`."""

    reference: ArtifactRecord
    candidate: ArtifactRecord
    agreement: Share
    n: Count
    both: NotRequired[Count | None]
    only_reference: NotRequired[Count | None]
    only_candidate: NotRequired[Count | None]
    changed: NotRequired[Count | None]
    ap_change: NotRequired[Points | None]


class PartRecord(TypedDict):
    """A block or a stage."""

    name: str
    ms: Figure
    share: Share
    flops_per_second: NotRequired[Figure | None]
    bytes_per_second: NotRequired[Figure | None]
    bound: NotRequired[str | None]


class ProfileRecord(ArtifactRecord, Where):
    """`profile --json`."""

    batch: NotRequired[Batch]
    agrees: NotRequired[bool | None]
    stages: list[PartRecord]
    blocks: list[PartRecord]
    environment: NotRequired[Environment | None]


class Bound(TypedDict):
    """Minimum times on one GPU."""

    gpu: str
    no_faster_than_ms: Positive
    through_memory_ms: Positive


class Estimate(TypedDict):
    """`estimate --json`: lower bounds, never measurements."""

    model: str
    precision: NotRequired[str | None]
    batch: Batch
    kernels: NotRequired[Count | None]
    bytes: NotRequired[Count | None]
    results: list[Bound]


class Advice(TypedDict):
    """`estimate --json` of several plans."""

    plans: list[Estimate]
    advice: NotRequired[list[str] | None]


class Quickstart(TypedDict):
    """`quickstart --json`: accuracy and agreement by precision."""

    bench: Bench
    eval: dict[str, Eval]
    compare: dict[str, Compare]


class MadeBy(TypedDict):
    """Origin of a file."""

    command: NotRequired[str | None]


RESULTS: Mapping[str, Any] = {
    "bench": Bench,
    "bench-find": BenchFind,
    "eval": Eval,
    "compare": Compare,
    "profile": ProfileRecord,
    "estimate": Estimate,
    "advise": Advice,
    "quickstart": Quickstart,
}


@dataclass(frozen=True, kw_only=True)
class ResultFile:
    """A file that was read.

    Attributes:
        verb: The command that wrote it.
        command: Its command line, if the file contains it.
        result: Result of the type that `RESULTS` has for the verb.
    """

    verb: str
    command: str | None
    result: Any


def read(path: str | Path) -> ResultFile:
    """Read a file that a command wrote with `--json`.

    Raises:
        InputError: Not JSON, not the result of a command in `RESULTS`, or not valid.
    """
    return check(path, serialization.load(path, fix="write the file again, or leave it out"))


def check(path: str | Path, data: Any) -> ResultFile:
    """Check a file that is already parsed; see `read`."""
    verb = data.get("verb") if isinstance(data, dict) else None
    if not isinstance(verb, str) or verb not in RESULTS or "result" not in data:
        problem = f"a result of {verb}" if isinstance(verb, str) else "not a result of a command"
        raise InputError(
            f"{path}: {problem}; expected a result of {', '.join(RESULTS)}", fix="leave it out"
        )
    about: dict[str, Any] = {"where": str(path), "fix": f"write it again with rtresnet {verb}"}
    made_by = serialization.convert(data.get("made_by", {}), MadeBy, at="made_by", **about)
    return ResultFile(
        verb=verb,
        command=made_by.get("command"),
        result=serialization.convert(data["result"], RESULTS[verb], at="result", **about),
    )
