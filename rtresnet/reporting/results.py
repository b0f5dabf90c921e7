"""What was measured, gathered from the commands' JSON files and from artifacts' sidecars.

What a file may hold stands in `result_files.py`. Knows no page; see `result_tables.py` and those
that use it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtresnet.core import artifacts, atomic_io, serialization
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.sidecar import same_data
from rtresnet.reporting import result_files

# Fields of an accuracy that a report uses.
ACCURACY = tuple(result_files.Accuracy.__annotations__)


@dataclass(kw_only=True)
class Artifact:
    """One artifact, and what is known of it.

    Attributes:
        name: The file's name, unique in a report.
        accuracies: Of each data set: top1_percent, top5_percent, n, data, split and the like.
        accuracy: The one on the data set that most artifacts of the report have; empty where it
            was not measured there.
        agreement: Share of images with the reference's top-1, and of how many; or None.
        chain: (file, kind, precision, sha256, state), from the artifact to its origin.
        trained: What training measured of the checkpoint that the weights came from: name,
            test_top1 and val_top1 in percent, test_n, val_n; empty where it is not known.
        gate: What the accuracy gate measured when the weights were quantized: points, low, high, n,
            data, bound, verdict; empty where it did not run.
    """

    path: Path
    name: str
    precision: str | None = None
    model: str | None = None
    bytes: int | None = None
    untrained: bool = False
    accuracies: list[dict[str, Any]] = field(default_factory=list)
    accuracy: dict[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    agreement: tuple[float, int, str] | None = None
    chain: list[tuple[str, str | None, str | None, str | None, str]] = field(default_factory=list)
    trained: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)

    def add_accuracy(self, record: dict[str, Any]) -> None:
        """Adds one, in place of what is known of the same images."""
        others = [other for other in self.accuracies if not same_data(other, record)]
        self.accuracies = [*others, record]

    @property
    def top1(self) -> float | None:
        """In percent; None where it is not known or the weights are untrained."""
        return None if self.untrained else self.accuracy.get("top1_percent")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One artifact at one batch, as `bench` measured it."""

    artifact: Artifact
    batch: int
    scenario: str | None
    latency: Mapping[str, Any]
    samples: Sequence[float]
    speed: float | None
    entry: Mapping[str, Any]


@dataclass(kw_only=True)
class Gathered:
    """Everything a report is made of.

    Attributes:
        searches: What `bench --find-batch` and `--find-qps` found of an artifact.
        environments: (what, where it ran: device, provider, threads, versions), without repeats.
        commands: Command lines that the files say they came from.
        notes: What a reader must be told: stand-ins, untrained weights, busy machines.
    """

    artifacts: list[Artifact] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    profiles: list[tuple[Artifact, Mapping[str, Any]]] = field(default_factory=list)
    searches: list[tuple[Artifact, Mapping[str, Any]]] = field(default_factory=list)
    environments: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def batches(self) -> list[int]:
        """Those of single-stream latency, smallest first."""
        return sorted({t.batch for t in self.streams()})

    def streams(self, batch: int | None = None) -> list[Timing]:
        """One request after another: what latencies may be compared by."""
        return [
            t for t in self.timings
            if t.scenario in (None, "single-stream") and batch in (None, t.batch)
        ]  # fmt: skip

    @property
    def batch(self) -> int | None:
        """The smallest batch that most artifacts were measured at."""
        counts = {b: len({t.artifact.name for t in self.streams(b)}) for b in self.batches}
        return max(counts, key=lambda b: (counts[b], -b)) if counts else None

    @property
    def baseline(self) -> Artifact | None:
        """What others are compared with: the first FP32 artifact that was measured."""
        measured = [t.artifact for t in self.streams(self.batch)]
        plain = [artifact for artifact in measured if artifact.precision == "fp32"]
        return next(iter(plain or measured), None)

    @property
    def title(self) -> str:
        """The nets' names."""
        names = dict.fromkeys(a.model for a in self.artifacts if a.model)
        return ", ".join(names) or "Measured artifacts"


def gather(paths: Iterable[str | Path]) -> Gathered:
    """Reads files and folders.

    Args:
        paths: JSON files that commands wrote with `--json`, artifacts or their sidecars, or folders
            of these.

    Raises:
        InputError: A file that is none of these, an artifact of which nothing is known, or nothing
            to report in any of them.
        ArtifactError: A broken sidecar.
    """
    paths = list(paths)
    collector = _Collector()
    for path in _files(paths):
        if path.suffix.lower() in artifacts.SUFFIXES:
            collector.artifact(str(path), given=True)
        else:
            collector.read(path)
    if not collector.found.artifacts:
        raise InputError(
            "nothing to report: no artifact and no result in " + ", ".join(map(str, paths)),
            fix="write one with: rtresnet bench engines/*.onnx --json bench.json",
        )
    collector.require_known([Path(path) for path in paths])
    return collector.finish()


def _files(paths: Iterable[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if not path.is_dir():
            yield atomic_io.require_file(path, fix="write results with: rtresnet bench --json FILE")
            continue
        inside = sorted(p for p in path.iterdir() if p.is_file())
        for file in inside:
            if file.suffix.lower() in artifacts.SUFFIXES or _is_result(file):
                yield file


def _is_result(file: Path) -> bool:
    """Whether it is a result that reports show; a folder holds other JSON files too."""
    if file.suffix != ".json":
        return False
    with contextlib.suppress(InputError):
        data = serialization.load(file)
        return isinstance(data, dict) and data.get("verb") in tuple(result_files.RESULTS)
    return False


def _numbers(record: Any, names: Sequence[str]) -> dict[str, float]:
    """The fields of a record that are finite numbers."""
    fields = record if isinstance(record, Mapping) else {}
    return {
        name: value
        for name in names
        if isinstance(value := fields.get(name), int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def _trained(name: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's sidecar says of its accuracy; empty where it says nothing."""
    numbers = _numbers(measured, ("test_top1", "test_n", "val_top1", "val_n"))
    return {"name": name} | numbers if "test_top1" in numbers else {}


def _gate(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a sidecar says of the accuracy gate; empty where it says nothing."""
    drop = measured.get("drop")
    numbers = _numbers(drop, ("points", "low", "high", "n"))
    if not isinstance(drop, Mapping) or len(numbers) < 4:
        return {}
    judged = measured.get("gate")
    bound = _numbers(judged, ("bound",))
    verdict = judged.get("verdict") if isinstance(judged, Mapping) else None
    return numbers | bound | {"data": str(drop.get("data")), "verdict": verdict and str(verdict)}


class _Collector:
    def __init__(self) -> None:
        self.found = Gathered()
        self.known: dict[Path, Artifact] = {}

    def artifact(self, path: str, precision: str | None = None, *, given: bool = False) -> Artifact:
        place = Path(path).absolute()
        known = self.known.get(place)
        if known is None:
            known = self.known[place] = Artifact(path=Path(path), name=Path(path).name)
            self.found.artifacts.append(known)
            try:
                self._sidecar(known)
            except ArtifactError:
                if given:  # one that a result mentions may have gone, and the result stays true
                    raise
        known.precision = known.precision or precision
        return known

    def _sidecar(self, known: Artifact) -> None:
        if not known.path.exists():
            return
        known.bytes = known.path.stat().st_size
        links = list(artifacts.chain(known.path))
        known.chain = [
            (str(path), s.kind if s else None, s.precision if s else None,
             s.sha256 if s else None, state)
            for path, s, state in links
        ]  # fmt: skip
        for path, link, state in links:
            if link is None or state != "ok":
                continue
            if not known.gate:
                known.gate = _gate(link.measured)
            if link.kind == "checkpoint" and not known.trained:
                known.trained = _trained(path.name, link.measured)
        sidecar = artifacts.read_sidecar(known.path)
        if sidecar is not None:
            known.precision, known.model = sidecar.precision, sidecar.model.architecture
            known.untrained = sidecar.weights.origin == "untrained"
            known.assumed = sidecar.assumed
            recorded = sidecar.measured.get("accuracy")
            if recorded is not None and known.chain[0][4] == "ok":
                known.accuracies = _recorded(known.path, recorded)

    def read(self, path: Path) -> None:
        data = serialization.load(path, fix="write it again, or leave it out")
        if isinstance(data, dict) and data.get("kind") in artifacts.KINDS and "sha256" in data:
            self.artifact(str(path.with_suffix("")), given=True)
            return
        file = result_files.check(path, data)
        if file.command and file.command not in self.found.commands:
            self.found.commands.append(file.command)
        getattr(self, f"_{file.verb.replace('-', '_')}")(file.result)

    def _bench(self, result: result_files.Bench) -> None:
        self.found.notes += result.get("notes") or ()
        for entry in result["results"]:
            artifact = self.artifact(entry["measured"], entry.get("precision"))
            artifact.untrained |= bool(entry.get("untrained"))
            self.found.timings.append(
                Timing(
                    artifact=artifact,
                    batch=entry["batch"],
                    scenario=entry.get("scenario"),
                    latency=entry["latency"],
                    samples=entry.get("samples") or (),
                    speed=entry.get("speed"),
                    entry=entry,
                )
            )
            self._where("latency", entry)
            if entry.get("steady") is False:
                self.found.notes.append(f"{artifact.name}, batch {entry['batch']}: not steady.")
            self.found.notes += _remarks(entry)

    def _bench_find(self, result: result_files.BenchFind) -> None:
        for entry in result["searches"]:
            artifact = self.artifact(entry["measured"], entry.get("precision"))
            artifact.untrained |= bool(entry.get("untrained"))
            self.found.searches.append((artifact, entry["search"]))
            if note := entry.get("note"):
                self.found.notes.append(note)
            self._where("search", entry)
        self.found.notes += _remarks(result)

    def _eval(self, result: result_files.Eval) -> None:
        for entry in result.get("members") or [result]:
            artifact = self.artifact(entry["artifact"], entry.get("precision"))
            fields: dict[str, Any] = {**entry}
            artifact.add_accuracy({name: fields[name] for name in ACCURACY if name in fields})
            self._where("accuracy", entry)

    def _compare(self, result: result_files.Compare) -> None:
        candidate, reference = result["candidate"], result["reference"]
        artifact = self.artifact(candidate["artifact"], candidate.get("precision"))
        artifact.agreement = (
            result["agreement"], result["n"], Path(reference["artifact"]).name
        )  # fmt: skip

    def _profile(self, result: result_files.Profile) -> None:
        artifact = self.artifact(result["artifact"], result.get("precision"))
        self.found.profiles.append((artifact, result))
        self._where("profile", result)
        self.found.notes += [f"Profile of {artifact.name}: {r}." for r in _remarks(result)]

    def _quickstart(self, result: result_files.Quickstart) -> None:
        self._bench(result["bench"])
        for entry in result["eval"].values():
            self._eval(entry)
        for compared in result["compare"].values():
            self._compare(compared)

    def _where(self, what: str, entry: Mapping[str, Any]) -> None:
        where = {name: entry.get(name) for name in ("device", "provider", "threads", "versions")}
        if (what, where) not in self.found.environments:
            self.found.environments.append((what, where))

    def require_known(self, given: Sequence[Path]) -> None:
        """Raises InputError for an artifact given by name of which nothing can be told."""
        measured = {id(a) for a, _ in (*self.found.profiles, *self.found.searches)}
        measured |= {id(timing.artifact) for timing in self.found.timings}
        for path in given:
            known = self.known.get(path.absolute())
            if known is None or id(known) in measured or known.accuracies or known.agreement:
                continue
            if artifacts.read_sidecar(path) is None:
                raise InputError(
                    f"{path}: has no sidecar, and no result here tells of it: nothing to report",
                    fix=f"rtresnet bench {path} --json FILE, and report FILE",
                )

    def finish(self) -> Gathered:
        """What was measured first; names made unique by their folders; notes once each."""
        measured = list(dict.fromkeys(t.artifact.name for t in self.found.timings))
        order = {name: index for index, name in enumerate(measured)}
        self.found.artifacts.sort(key=lambda a: order.get(a.name, len(order)))
        names = [artifact.name for artifact in self.found.artifacts]
        for artifact in self.found.artifacts:
            if names.count(artifact.name) > 1:
                artifact.name = str(artifact.path)
        self._choose_accuracies()
        self.found.notes = list(dict.fromkeys(self.found.notes))
        return self.found

    def _choose_accuracies(self) -> None:
        """Compares artifacts on one data set: the one that most of them were evaluated on."""
        sets: list[list[tuple[Artifact, dict[str, Any]]]] = []
        for artifact in self.found.artifacts:
            for record in artifact.accuracies:
                group = next((g for g in sets if same_data(g[0][1], record)), None)
                if group is None:
                    sets.append([(artifact, record)])
                else:
                    group.append((artifact, record))
        for artifact, record in max(reversed(sets), key=len, default=[]):
            artifact.accuracy = record
        for artifact in self.found.artifacts:
            told = [(record["data"], note) for record in artifact.accuracies if record.get("data")
                    for note in _label_notes(record)]  # fmt: skip
            self.found.notes += [f"{artifact.name} on {data}: {note}." for data, note in told]
            self.found.notes += [f"{artifact.name}: assumed {note}." for note in artifact.assumed]


def _recorded(path: Path, recorded: Any) -> list[dict[str, Any]]:
    """The accuracies in a sidecar's `measured`, of any version.

    Raises:
        ArtifactError: They are not valid.
    """
    listed = recorded if isinstance(recorded, list) else [recorded]
    return [
        {**serialization.convert(
            record, result_files.Accuracy, error=ArtifactError,
            at="measured.accuracy" + (f"[{index}]" if listed is recorded else ""),
            where=str(artifacts.sidecar_path(path)), fix="measure it again with: rtresnet eval",
        )}
        for index, record in enumerate(listed)
    ]  # fmt: skip


def _label_notes(record: Mapping[str, Any]) -> list[str]:
    """What an accuracy assumes of its labels, and what else a reader must know of them."""
    remarks = (record.get("labels") or {}).get("remarks") or []
    assumed = record.get("assumed") or []
    return [*remarks, *(line for line in assumed if not line.startswith("input"))]


def _remarks(entry: Mapping[str, Any]) -> list[str]:
    return (entry.get("environment") or {}).get("remarks") or []


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of those that no other beats, by time: a lower first and a higher second value."""
    front = []
    for index, (cost, gain) in enumerate(points):
        better = any(
            (c <= cost and g >= gain) and (c < cost or g > gain) for c, g in points
        )  # fmt: skip
        if not better:
            front.append(index)
    return sorted(front, key=lambda index: points[index])
