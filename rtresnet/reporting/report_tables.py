"""The tables and sentences of a report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import Literal

from rtresnet.bench.verdict import NO_DIFFERENCE
from rtresnet.core.errors import UnknownNameError
from rtresnet.reporting.results import Artifact, Results, latest, scenario
from rtresnet.reporting.tables import DataTable, number
from rtresnet.workflows.result_files import Entry, Estimate

PERCENTILES: tuple[Literal["p90", "p95", "p99", "p999"], ...] = ("p90", "p95", "p99", "p999")

# Average precision of a detector: field and heading.
PRECISIONS = {
    "ap50": "AP50 %", "ap": "AP %", "ap75": "AP75 %", "voc07": "VOC07 %", "small": "small",
    "medium": "medium", "large": "large",
}  # fmt: skip


def summary(results: Results) -> list[str]:
    """Return a sentence for each artifact: speed and accuracy against the baseline."""
    if results.batch is None:
        return []
    lines = []
    for artifact, entry in results.streams(results.batch):
        base, reference = results.reference((artifact, entry))
        if artifact is results.baseline:
            continue
        line = (
            f"{artifact.name} takes {number(entry['latency']['median'])} ms for a batch of "
            f"{results.batch}"
        )
        if base is not artifact:
            line += f", {_compared(results, entry, reference, base.name)}"
        if base is not artifact and artifact.score is not None and base.score is not None:
            points, measure = artifact.score - base.score, base.measure
            change = f"the same {measure}" if points == 0 else f"{points:+.2f} points of {measure}"
            line += f", with {change}"
        lines.append(line + ".")
    return lines


def remarks(results: Results) -> list[str]:
    """Return the notes of the results, and those that follow from the data."""
    lines = list(results.notes)
    if any(artifact.untrained for artifact in results.artifacts):
        lines.append("Untrained weights: latency is meaningful, accuracy is not shown.")
    elif results.timings and all(a.score is None for a in results.artifacts):
        lines.append(
            "Accuracy is unknown. Measure it with: rtresnet eval ARTIFACT --data DATA --json FILE."
        )
    return lines


def _compared(results: Results, entry: Entry, reference: Entry, name: str) -> str:
    """Compare speeds in words, with the verdict of `bench` if it compared these two."""
    comparison = entry.get("comparison") if results.paired(entry, reference) else None
    if comparison and comparison["verdict"] == NO_DIFFERENCE:
        return f"{NO_DIFFERENCE} from {name}"
    return f"{speed(results, entry, reference):.2f} times as fast as {name}"


def speed(results: Results, entry: Entry, reference: Entry) -> float:
    """Return the paired speed if one `bench` call compared these two, else the ratio of medians."""
    paired = entry.get("speed") if results.paired(entry, reference) else None
    if paired:
        return paired
    return reference["latency"]["median"] / entry["latency"]["median"]


def tables(results: Results) -> dict[str, DataTable]:
    """Return every table by a short name; those without rows are left out."""
    every = {
        "artifacts": _artifacts(results),
        "accuracy": _accuracy(results),
        "detections": _detections(results),
        "origin": _origin(results),
        "latency": _latency(results),
        "bounds": _bounds(results),
        "searches": _searches(results),
        "blocks": _blocks(results),
        "chain": _chain(results),
        "environment": _environment(results),
    }
    return {name: table for name, table in every.items() if table.rows}


def _artifacts(results: Results) -> DataTable:
    batch = results.batch
    streams = {artifact.name: entry for artifact, entry in results.streams(batch)} if batch else {}
    bases: dict[str, None] = {}
    rows = []
    for artifact in results.artifacts:
        entry, agreement = streams.get(artifact.name), artifact.agreement
        relative = None
        if entry:
            base, reference = results.reference((artifact, entry))
            relative = speed(results, entry, reference)
            bases[base.name] = None
        rows.append(
            (
                artifact.name,
                artifact.precision,
                artifact.bytes / 1e6 if artifact.bytes is not None else None,
                artifact.score if artifact.measure == "top-1" else None,
                artifact.score if artifact.measure == "AP" else None,
                artifact.accuracy.get("n"),
                100 * agreement["agreement"] if agreement else None,
                entry["latency"]["median"] if entry else None,
                entry["latency"].get("images_per_second") if entry else None,
                relative,
            )
        )
    data: dict[str, dict[str, None]] = {}
    references: dict[str, dict[str, None]] = {}
    for artifact in results.artifacts:
        if artifact.score is not None and artifact.accuracy.get("data"):
            data_split = (
                f"{_short(artifact.accuracy['data'])}, {artifact.accuracy.get('split') or 'all'}"
            )
            data.setdefault(artifact.measure, {})[data_split] = None
        if artifact.agreement:
            label = "top-1" if artifact.agreement.get("both") is None else "detections"
            name = PurePath(artifact.agreement["reference"]["artifact"]).name
            references.setdefault(label, {})[name] = None
    about = [
        *(f"{measure[0].upper()}{measure[1:]} on {'; '.join(on)}." for measure, on in data.items()),
        *(f"Agreement: same {label} as {', '.join(on)}." for label, on in references.items()),
        *([f"Speed against {_alternatives(bases)}."] if bases else []),
    ]
    return DataTable(
        title="Artifacts",
        headings=("artifact", "precision", "MB", "top-1 %", "AP %", "images", "agree %",
                  f"ms, batch {batch}", "images/s", "speed"),
        rows=rows,
        about=" ".join(about),
    ).without_empty_columns()  # fmt: skip


def _alternatives(bases: Iterable[str]) -> str:
    """Return the names of the references: with several, each is that of its own net."""
    first, *others = bases
    return f"the reference of the same net: {', '.join([first, *others])}" if others else first


def _accuracy(results: Results) -> DataTable:
    """Return every accuracy, if there are some that the first table has no room for."""
    rows = [
        (
            artifact.name, _short(record.get("data")), record.get("split") or "all",
            None if "objects" in record else record.get("protocol") or "center",
            *(record.get(name) for name in ("top1_percent", "top5_percent", *PRECISIONS)),
            record.get("objects"), record.get("n"),
        )
        for artifact in results.artifacts if not artifact.untrained
        for record in artifact.accuracies
    ]  # fmt: skip
    more = any(record is not a.accuracy for a in results.artifacts for record in a.accuracies)
    detectors = any("objects" in record for a in results.artifacts for record in a.accuracies)
    return DataTable(
        title="Accuracy on each data set",
        headings=("artifact", "data", "split", "protocol", "top-1 %", "top-5 %",
                  *PRECISIONS.values(), "objects", "images"),
        rows=rows if more or detectors else [],
        about="AP: COCO's rules, the mean over ten overlaps; small to large: AP of objects of that "
        "size; VOC07: 11 recalls." if detectors else "",
    ).without_empty_columns()  # fmt: skip


def _detections(results: Results) -> DataTable:
    """Return the comparisons of detectors."""
    rows = [
        (
            artifact.name, PurePath(entry["reference"]["artifact"]).name,
            *(entry.get(name) for name in ("both", "only_reference", "only_candidate")),
            entry.get("ap_change"), entry.get("changed"), entry["n"],
        )
        for artifact in results.artifacts
        if (entry := artifact.agreement) and entry.get("both") is not None
    ]  # fmt: skip
    return DataTable(
        title="Detections compared",
        headings=("artifact", "reference", "in both", "only in the reference",
                  "only in the artifact", "AP change", "images that differ", "images"),
        rows=rows,
        about="Detections with a score of 0.5 or more; the same: one class and an IoU of 0.5.",
    ).without_empty_columns()  # fmt: skip


def _origin(results: Results) -> DataTable:
    """Return the accuracy of the checkpoint in training, and the loss through quantization."""
    rows = []
    for artifact in results.artifacts:
        trained, gate = artifact.trained, artifact.gate
        if trained or gate:
            checkpoint = (
                (trained["name"], trained["test_top1"], trained.get("test_n"))
                if trained
                else (None,) * 3
            )
            loss = (
                (gate["points"], f"{gate['low']:.2f} to {gate['high']:.2f}", gate["n"],
                 gate.get("bound"), gate.get("verdict"))
                if gate
                else (None,) * 5
            )  # fmt: skip
            rows.append((artifact.name, *checkpoint, *loss))
    data = dict.fromkeys(_short(a.gate.get("data")) for a in results.artifacts if a.gate)
    return DataTable(
        title="Training and quantization",
        headings=("artifact", "checkpoint", "test top-1 %", "test images", "INT8 loss, points",
                  "95 % interval", "images", "bound", "verdict"),
        rows=rows,
        about=f"INT8 loss: top-1 of FP32 minus top-1 of INT8 on the same images of "
        f"{', '.join(data)}."
        if data
        else "",
    ).without_empty_columns()  # fmt: skip


def _short(data: str | None) -> str:
    """Return a data set's name without the folders of the machine that measured."""
    kind, colon, location = (data or "unknown").partition(":")
    return f"{kind}{colon}{PurePath(location).name}" if colon else PurePath(kind).name


def _latency(results: Results) -> DataTable:
    timings = latest(results.timings)
    scenarios = len({scenario(entry) for _, entry in timings}) > 1
    summaries = [entry["latency"] for _, entry in timings]
    shares = [p for p in PERCENTILES if any(latency.get(p) is not None for latency in summaries)]
    rows = [
        (
            artifact.name, *((scenario(entry),) if scenarios else ()), entry["batch"],
            latency["median"], *(latency.get(p) for p in shares), latency.get("std"),
            latency.get("images_per_second"), latency.get("n"),
        )
        for (artifact, entry), latency in zip(timings, summaries, strict=True)
    ]  # fmt: skip
    return DataTable(
        title="Latency",
        headings=("artifact", *(("scenario",) if scenarios else ()), "batch", "median ms",
                  *(p.replace("p999", "p99.9") for p in shares), "std", "images/s", "n"),
        rows=rows,
        about="Milliseconds per batch, wall time, all samples kept. A dash means too few samples.",
    )  # fmt: skip


def _searches(results: Results) -> DataTable:
    rows = []
    for artifact, search in results.searches:
        # The median of the repeats: where most of them are within the bound, it is.
        repeats = sorted(
            (p for p in search["points"] if p["load"] == search["best"]),
            key=lambda p: float("inf") if p["p99"] is None else p["p99"],
        )
        middle = repeats[(len(repeats) - 1) // 2] if repeats else None
        label = "images per batch" if search["what"] == "batch" else "requests/s"
        at_best = (
            (middle["p99"], middle.get("images_per_second"), middle.get("n"))
            if middle
            else (None,) * 3
        )
        rows.append((artifact.name, label, search["p99_ms"], search["best"], *at_best))
    about = (
        "The largest load whose p99 is within the bound in most repeats; a dash if there is none."
    )
    if any(search["limit"] for _, search in results.searches):
        about += " If it is the largest load tried, a larger one may also be within the bound."
    return DataTable(
        title="Largest load within a latency bound",
        headings=("artifact", "load", "p99 bound, ms", "largest", "p99, ms", "images/s", "n"),
        rows=rows,
        about=about,
    )


def _bounds(results: Results) -> DataTable:
    rows = [
        (
            artifact.name, bound["gpu"], estimate["batch"], _megabytes(estimate),
            estimate.get("kernels"), bound["no_faster_than_ms"], bound["through_memory_ms"],
            _measured_ms(results, artifact, estimate["batch"], bound["gpu"]),
        )
        for artifact, estimate in results.bounds
        for bound in estimate["results"]
    ]  # fmt: skip
    about = (
        "From published peak rates. Minimum (L2): if all tensors that fit the L2 cache stay "
        "there. Minimum (memory): if every kernel writes its output to memory. Measured: median of "
        "the computation, or of the latency if that is unknown, on the same GPU and batch."
    )
    return DataTable(
        title="Lower bounds, not measurements",
        headings=("artifact", "GPU", "batch", "MB moved", "kernels", "minimum (L2), ms",
                  "minimum (memory), ms", "measured, ms"),
        rows=list(dict.fromkeys(rows)),
        about=" ".join([about, *dict.fromkeys(results.advice)]),
    ).without_empty_columns()  # fmt: skip


def _megabytes(estimate: Estimate) -> float | None:
    moved = estimate.get("bytes")
    return None if moved is None else moved / 1e6


def _measured_ms(results: Results, artifact: Artifact, batch: int, gpu: str) -> float | None:
    """Return the latest single-stream figure of an artifact at a batch on a GPU."""
    for measured, entry in results.streams(batch):
        if measured is artifact and _names_gpu(entry.get("device"), gpu):
            computed = (entry.get("parts") or {}).get("compute")
            return (computed or entry["latency"])["median"]
    return None


def _names_gpu(device: str | None, gpu: str) -> bool:
    from rtresnet.bench import roofline

    try:
        return roofline.find_gpu(device or "").name == gpu
    except UnknownNameError:
        return False


def _blocks(results: Results) -> DataTable:
    rows = [
        (
            artifact.name, result.get("batch"), part["name"], part["ms"], 100 * part["share"],
            (part.get("flops_per_second") or 0) / 1e9, (part.get("bytes_per_second") or 0) / 1e9,
            part.get("bound"),
        )
        for artifact, result in results.profiles
        for part in result["blocks"]
    ]  # fmt: skip
    off = [a.name for a, result in results.profiles if result.get("agrees") is False]
    about = "Sums of the nodes' medians. Bound by: the limit in the roofline model."
    if off:
        about += f" Sums of {', '.join(off)} differ from the net's time by more than 10 %."
    return DataTable(
        title="Time of each block",
        headings=("artifact", "batch", "block", "ms", "share %", "GFLOP/s", "GB/s", "bound by"),
        rows=rows,
        about=about,
    )


def _chain(results: Results) -> DataTable:
    rows = [
        (f"{'← ' * depth}{path}", sidecar and sidecar.kind, sidecar and sidecar.precision,
         sidecar and sidecar.sha256[:16], state)
        for artifact in results.artifacts
        for depth, (path, sidecar, state) in enumerate(artifact.chain)
    ]  # fmt: skip
    return DataTable(
        title="Origin of the artifacts",
        headings=("artifact", "kind", "precision", "sha256", "state"),
        rows=rows,
        about="Arrows point to the source file. Hashes were checked when this report was made.",
    )


def _environment(results: Results) -> DataTable:
    rows = [
        (
            label, where.get("device"), where.get("provider"), where.get("threads"),
            ", ".join(map(" ".join, (where.get("versions") or {}).items())),
        )
        for label, where in results.environments
    ]  # fmt: skip
    return DataTable(
        title="Environment",
        headings=("measured", "device", "provider", "threads", "versions"),
        rows=list(dict.fromkeys(rows)),
    )
