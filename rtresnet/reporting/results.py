"""Collect measurements from the commands' JSON files and from artifacts' sidecars.

The content of a file is declared in `result_files`; tables are in `report_tables`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from rtresnet.core import artifacts, atomic_io, serialization
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.sidecar import Sidecar, same_data
from rtresnet.workflows import result_files
from rtresnet.workflows.result_files import (
    AccuracyRecord,
    Compare,
    Entry,
    Estimate,
    GateLoss,
    PrecisionCurve,
    ProfileRecord,
    Search,
    Trained,
    Where,
)

Timing = tuple["Artifact", Entry]


@dataclass(kw_only=True)
class Artifact:
    """One artifact and its results.

    Attributes:
        name: The file's name, unique in a report.
        accuracies: One for each data set.
        accuracy: The one on the data set that most artifacts of the report have; empty if it
            was not measured there.
        agreement: With a reference.
        chain: (path, sidecar, state), from the artifact to its origin.
        trained: Accuracy that training measured on the checkpoint of the weights.
        gate: Result of the accuracy gate when the weights were quantized.
    """

    path: Path
    name: str
    precision: str | None = None
    model: str | None = None
    bytes: int | None = None
    untrained: bool = False
    accuracies: list[AccuracyRecord] = field(default_factory=list)
    accuracy: AccuracyRecord = field(default_factory=AccuracyRecord)
    assumed: tuple[str, ...] = ()
    agreement: Compare | None = None
    chain: list[tuple[Path, Sidecar | None, str]] = field(default_factory=list)
    trained: Trained | None = None
    gate: GateLoss | None = None

    def add_accuracy(self, record: AccuracyRecord) -> None:
        """Add a record; replaces an older one of the same images."""
        others = [other for other in self.accuracies if not same_data(other, record)]
        self.accuracies = [*others, record]

    @property
    def score(self) -> float | None:
        """Top-1, or AP of a detector, in percent; None if unknown or the weights are untrained."""
        if self.untrained:
            return None
        record = self.accuracy
        return record.get("ap") if self.measure == "AP" else record.get("top1_percent")

    @property
    def measure(self) -> str:
        """Name of `score`: "top-1", or "AP" for a detector."""
        return "AP" if "objects" in self.accuracy else "top-1"


@dataclass(kw_only=True)
class Results:
    """All measurements of a report.

    Attributes:
        timings: Artifacts at one batch under one load, as `bench` measured them.
        calls: The entries of `timings`, by the call of `bench` that measured them.
        curves: Precision-recall curves of detectors.
        searches: Results of `bench --find-batch` and `--find-qps`.
        bounds: Results of `estimate`: lower bounds, not measurements.
        advice: Expected results of each precision, from the bounds.
        environments: (kind of measurement, its environment).
        commands: Command lines that the files say they came from.
        notes: Warnings: generated data, untrained weights, busy machines.
    """

    artifacts: list[Artifact] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    calls: list[list[Entry]] = field(default_factory=list)
    profiles: list[tuple[Artifact, ProfileRecord]] = field(default_factory=list)
    searches: list[tuple[Artifact, Search]] = field(default_factory=list)
    curves: list[tuple[Artifact, list[PrecisionCurve]]] = field(default_factory=list)
    bounds: list[tuple[Artifact, Estimate]] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    environments: list[tuple[str, Where]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def batches(self) -> list[int]:
        """Return the batch sizes with single-stream latencies, ascending."""
        return sorted({entry["batch"] for _, entry in self.streams()})

    def streams(self, batch: int | None = None) -> list[Timing]:
        """Return the latest single-stream timing of each artifact and batch."""
        return [
            (artifact, entry) for artifact, entry in latest(self.timings)
            if scenario(entry) == "single-stream" and batch in (None, entry["batch"])
        ]  # fmt: skip

    def throughputs(self, artifact: Artifact) -> list[float]:
        """Return the images/s of an artifact by batch and load."""
        rates = (e["latency"].get("images_per_second") for a, e in self.timings if a is artifact)
        return [rate for rate in rates if rate]

    @property
    def batch(self) -> int | None:
        """The smallest batch that most artifacts were measured at."""
        counts = {batch: len(self.streams(batch)) for batch in self.batches}
        return max(counts, key=lambda b: (counts[b], -b)) if counts else None

    @property
    def baseline(self) -> Artifact | None:
        """The reference for comparisons: the first FP32 artifact that was measured."""
        measured = [artifact for artifact, _ in self.streams(self.batch)]
        plain = [artifact for artifact in measured if artifact.precision == "fp32"]
        return next(iter(plain or measured), None)

    def reference(self, timing: Timing) -> Timing:
        """Return the timing to compare one with, or itself if there is none.

        This is the timing of the baseline; for another net, that of the net's own first FP32
        artifact. Nets are comparable only if one call measured both.
        """
        streams = self.streams(timing[1]["batch"])
        streams.sort(
            key=lambda other: (other[0] is not self.baseline, other[0].precision != "fp32")
        )
        comparable = (t for t in streams if t is timing or self._comparable(t[1], timing[1]))
        return next(comparable, timing)

    def _comparable(self, one: Entry, other: Entry) -> bool:
        """Return whether one call measured both, or both are the same net as far as is known."""
        if any(_contains(call, one) and _contains(call, other) for call in self.calls):
            return True
        pairs = ((one.get("size"), other.get("size")), (_origin(one), _origin(other)))
        return all(a is None or b is None or a == b for a, b in pairs)

    def paired(self, entry: Entry, reference: Entry) -> bool:
        """Return whether the speed of an entry is relative to `reference`.

        It is relative to the first artifact of its call, so to no entry of another call.
        """
        load = (reference["batch"], scenario(reference))
        return bool(entry.get("speed")) and any(
            _contains(call, entry)
            and next(e for e in call if (e["batch"], scenario(e)) == load) is reference
            for call in self.calls
            if _contains(call, reference)
        )

    @property
    def title(self) -> str:
        """The nets' names."""
        names = dict.fromkeys(a.model for a in self.artifacts if a.model)
        return ", ".join(names) or "Measured artifacts"


def latest(timings: Iterable[Timing]) -> list[Timing]:
    """Return one for each artifact, batch and scenario: the last one."""
    return list({(t[0].name, t[1]["batch"], scenario(t[1])): t for t in timings}.values())


def scenario(entry: Entry) -> str:
    """Return the load; results of earlier versions do not name the only one they had."""
    return entry.get("scenario") or "single-stream"


def _contains(call: Iterable[Entry], entry: Entry) -> bool:
    """Compare by identity: entries of two calls can be equal."""
    return any(other is entry for other in call)


def _origin(entry: Entry) -> str | None:
    """Return the hash of the oldest ancestor of an artifact; None if it is unknown."""
    chain = entry.get("chain")
    return chain[-1].get("sha256") if chain else None


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return indices of the points (cost, gain) that no other point dominates, by cost."""
    front = [
        index
        for index, (cost, gain) in enumerate(points)
        if not any((c <= cost and g >= gain) and (c < cost or g > gain) for c, g in points)
    ]
    return sorted(front, key=lambda index: points[index])


def gather(paths: Iterable[str | Path]) -> Results:
    """Read files and folders.

    Args:
        paths: JSON files that commands wrote with `--json`, artifacts or their sidecars, or folders
            of these.

    Raises:
        InputError: A file that is none of these, an artifact without measurements, or nothing
            to report in any of them.
        ArtifactError: A broken sidecar.
    """
    paths = list(paths)
    collector = _Collector()
    for path in _files(paths):
        if path.suffix.lower() in artifacts.SUFFIXES:
            collector.artifact(str(path), required=True)
        else:
            collector.read(path)
    if not collector.results.artifacts:
        raise InputError(
            "nothing to report: no artifact and no result in " + ", ".join(map(str, paths)),
            fix="create one with: rtresnet bench engines/*.onnx --json bench.json",
        )
    collector.require_measured([Path(path) for path in paths])
    return collector.finish()


def _files(paths: Iterable[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if not path.is_dir():
            yield atomic_io.require_file(path, fix="write results with: rtresnet bench --json FILE")
            continue
        for file in sorted(p for p in path.iterdir() if p.is_file()):
            if file.suffix.lower() in artifacts.SUFFIXES or _is_result(file):
                yield file


def _is_result(file: Path) -> bool:
    """Return whether it is a result that reports show; a folder may have other JSON files too."""
    if file.suffix != ".json":
        return False
    with contextlib.suppress(InputError):
        data = serialization.load(file)
        return isinstance(data, dict) and data.get("verb") in tuple(result_files.RESULTS)
    return False


class _Collector:
    def __init__(self) -> None:
        self.results = Results()
        self.artifact_by_path: dict[Path, Artifact] = {}

    def artifact(
        self, path: str, precision: str | None = None, *, required: bool = False
    ) -> Artifact:
        absolute = Path(path).absolute()
        artifact = self.artifact_by_path.get(absolute)
        if artifact is None:
            artifact = self.artifact_by_path[absolute] = Artifact(
                path=Path(path), name=Path(path).name
            )
            self.results.artifacts.append(artifact)
            try:
                _read_sidecars(artifact)
            except ArtifactError:
                if required:  # a result stays true after its artifact is gone
                    raise
        artifact.precision = artifact.precision or precision
        return artifact

    def read(self, path: Path) -> None:
        data = serialization.load(path, fix="write the file again, or leave it out")
        if isinstance(data, dict) and data.get("kind") in artifacts.KINDS and "sha256" in data:
            self.artifact(str(path.with_suffix("")), required=True)
            return
        file = result_files.check(path, data)
        if file.command and file.command not in self.results.commands:
            self.results.commands.append(file.command)
        getattr(self, f"_{file.verb.replace('-', '_')}")(file.result)

    def _bench(self, result: result_files.Bench) -> None:
        self.results.notes += result.get("notes") or ()
        self.results.calls.append(result["results"])
        for entry in result["results"]:
            artifact = self._measured(entry, "latency")
            self.results.timings.append((artifact, entry))
            if entry.get("steady") is False:
                self.results.notes.append(f"{artifact.name}, batch {entry['batch']}: not steady.")
            self.results.notes += _remarks(entry.get("environment"))

    def _bench_find(self, result: result_files.BenchFind) -> None:
        for entry in result["searches"]:
            self.results.searches.append((self._measured(entry, "search"), entry["search"]))
            if note := entry.get("note"):
                self.results.notes.append(note)
        self.results.notes += _remarks(result.get("environment"))

    def _measured(self, entry: Entry | result_files.SearchRecord, label: str) -> Artifact:
        artifact = self.artifact(entry["measured"], entry.get("precision"))
        artifact.untrained |= bool(entry.get("untrained"))
        self.results.environments.append((label, entry))
        return artifact

    def _eval(self, result: result_files.Eval) -> None:
        for entry in result.get("members") or [result]:
            artifact = self.artifact(entry["artifact"], entry.get("precision"))
            artifact.add_accuracy(msgspec.convert(entry, AccuracyRecord))
            self.results.environments.append(("accuracy", entry))
        if curves := (result.get("report") or {}).get("curves"):
            self.results.curves.append((self.artifact(result["artifact"]), curves))

    def _compare(self, result: Compare) -> None:
        candidate = result["candidate"]
        self.artifact(candidate["artifact"], candidate.get("precision")).agreement = result

    def _profile(self, result: ProfileRecord) -> None:
        artifact = self.artifact(result["artifact"], result.get("precision"))
        self.results.profiles.append((artifact, result))
        self.results.environments.append(("profile", result))
        remarks = _remarks(result.get("environment"))
        self.results.notes += [f"Profile of {artifact.name}: {remark}." for remark in remarks]

    def _estimate(self, result: Estimate) -> None:
        artifact = self.artifact(result["model"], result.get("precision"))
        self.results.bounds.append((artifact, result))

    def _advise(self, result: result_files.Advice) -> None:
        for plan in result["plans"]:
            self._estimate(plan)
        self.results.advice += result.get("advice") or ()

    def _quickstart(self, result: result_files.Quickstart) -> None:
        self._bench(result["bench"])
        for entry in result["eval"].values():
            self._eval(entry)
        for compared in result["compare"].values():
            self._compare(compared)

    def require_measured(self, paths: Sequence[Path]) -> None:
        """Raise InputError for an artifact in `paths` without any measurement."""
        results = self.results
        measured = {id(a) for a, _ in (*results.profiles, *results.searches, *results.timings)}
        measured |= {id(artifact) for artifact, _ in results.bounds}
        for path in paths:
            artifact = self.artifact_by_path.get(path.absolute())
            if (
                artifact is None
                or id(artifact) in measured
                or artifact.accuracies
                or artifact.agreement
            ):
                continue
            if artifacts.read_sidecar(path) is None:
                raise InputError(
                    f"{path}: has no sidecar and no result, so there is nothing to report",
                    fix=f"rtresnet bench {path} --json FILE, then: rtresnet report FILE",
                )

    def finish(self) -> Results:
        """Order artifacts, measured ones first, and make names and notes unique."""
        results = self.results
        order = {id(a): n for n, (a, _) in reversed([*enumerate(results.timings)])}
        results.artifacts.sort(key=lambda a: order.get(id(a), len(order)))
        names = [artifact.name for artifact in results.artifacts]
        for artifact in results.artifacts:
            if names.count(artifact.name) > 1:
                artifact.name = str(artifact.path)
        _choose_accuracies(results.artifacts)
        for artifact in results.artifacts:
            results.notes += [
                f"{artifact.name} on {record['data']}: {note}."
                for record in artifact.accuracies
                if record.get("data")
                for note in _label_notes(record)
            ]
            results.notes += [f"{artifact.name}: assumed {note}." for note in artifact.assumed]
        results.notes = list(dict.fromkeys(results.notes))
        return results


def _read_sidecars(artifact: Artifact) -> None:
    """Add the content of the sidecars of an artifact and of its chain."""
    if not artifact.path.exists():
        return
    artifact.bytes = artifact.path.stat().st_size
    artifact.chain = list(artifacts.chain(artifact.path))
    for path, sidecar, state in artifact.chain:
        if sidecar is None or state != "ok":
            continue
        artifact.gate = artifact.gate or _gate(sidecar.measured)
        if sidecar.kind == "checkpoint" and artifact.trained is None:
            with contextlib.suppress(msgspec.ValidationError):
                artifact.trained = msgspec.convert({**sidecar.measured, "name": path.name}, Trained)
    sidecar = artifacts.read_sidecar(artifact.path)
    if sidecar is not None:
        artifact.precision, artifact.model = sidecar.precision, sidecar.model.architecture
        artifact.untrained = sidecar.weights.origin == "untrained"
        artifact.assumed = sidecar.assumed
        if artifact.chain[0][2] == "ok":
            artifact.accuracies = [
                record
                for name in ("accuracy", "average_precision")
                for record in _recorded(artifact.path, name, sidecar.measured.get(name))
            ]


def _gate(measured: Mapping[str, Any]) -> GateLoss | None:
    """Return a sidecar's accuracy gate; None if it has no valid one."""
    drop, gate = measured.get("drop"), measured.get("gate")
    if not isinstance(drop, dict):
        return None
    judged = (
        {name: gate.get(name) for name in ("bound", "verdict")} if isinstance(gate, dict) else {}
    )
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(drop | judged, GateLoss)
    return None


def _recorded(path: Path, name: str, recorded: Any) -> list[AccuracyRecord]:
    """Return the accuracies under a name in a sidecar's `measured`, of any version.

    Raises:
        ArtifactError: They are not valid.
    """
    listed = recorded if isinstance(recorded, list) else [] if recorded is None else [recorded]
    return [
        serialization.convert(
            record, AccuracyRecord, error=ArtifactError,
            at=f"measured.{name}" + (f"[{index}]" if listed is recorded else ""),
            where=str(artifacts.sidecar_path(path)), fix="measure it again with: rtresnet eval",
        )
        for index, record in enumerate(listed)
    ]  # fmt: skip


def _choose_accuracies(measured: Sequence[Artifact]) -> None:
    """Compare artifacts on one data set: the one that most of them were evaluated on."""
    sets: list[list[tuple[Artifact, AccuracyRecord]]] = []
    for artifact in measured:
        for record in artifact.accuracies:
            group = next((g for g in sets if same_data(g[0][1], record)), None)
            if group is None:
                sets.append(group := [])
            group.append((artifact, record))
    for artifact, record in max(reversed(sets), key=len, default=[]):
        artifact.accuracy = record


def _label_notes(record: AccuracyRecord) -> list[str]:
    """Return the assumptions on the labels of an accuracy, and further remarks."""
    remarks = (record.get("labels") or {}).get("remarks") or []
    assumed = record.get("assumed") or []
    return [*remarks, *(line for line in assumed if not line.startswith("input"))]


def _remarks(environment: result_files.Environment | None) -> list[str]:
    return (environment or {}).get("remarks") or []
