"""Files as text: results of `rtresnet export`, `quantize`, `build` and `inspect`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core import atomic_io
from rtresnet.core.preprocess import FLOAT
from rtresnet.core.reporter import plural
from rtresnet.core.serialization import to_builtins
from rtresnet.core.sidecar import Calibration, Plan
from rtresnet.reporting import tables
from rtresnet.reporting.performance import advice_lines
from rtresnet.reporting.tables import DataTable

if TYPE_CHECKING:
    from rtresnet.workflows.accuracy_gate import GateResult
    from rtresnet.workflows.build import BuildResult
    from rtresnet.workflows.export import ExportedFile, ExportResult
    from rtresnet.workflows.inspect import ChainEntry, FolderResult, InspectResult
    from rtresnet.workflows.quantize import QuantizeResult


def export_lines(result: ExportResult) -> Iterator[str | DataTable]:
    """Return a line for each file and plan, the expected results, and the assumptions."""
    for file in result.onnx:
        yield f"{file.path}: {file.precision}, {file.bytes / 1e6:.1f} MB{_parity(file)}"
    yield from map(build_line, result.plans)
    if result.advice is not None:
        yield from advice_lines(result.advice)
    yield from tables.assumed(result.assumed)


def _parity(file: ExportedFile) -> str:
    parity = file.measured.get("parity")
    if not parity:
        return ""
    return f", parity with torch {parity['relative']:.1e} relative on {parity['n']} images"


def quantize_lines(result: QuantizeResult) -> Iterator[str]:
    """Return the written files, their scales, and the assumptions."""
    sidecar = result.sidecar
    line = f"{result.path.as_posix()}: {sidecar.precision}, {sidecar.bytes / 1e6:.1f} MB"
    if calibration := sidecar.calibration:
        images = "batch norm statistics, without images"
        if calibration.n:
            images = f"{plural(calibration.n, 'image')} of {calibration.images}"
        line += f", scales by {calibration.method} from {images} in {calibration.scales}"
    yield line
    gate = result.gate
    yield from tables.assumed((*sidecar.assumed, *(gate.drop.assumed if gate else ())))
    yield from (f"Note: {entry}." for entry in (gate.remarks if gate else ()))


def block_table(gate: GateResult) -> DataTable:
    """Return each block's loss of accuracy and its precision."""
    rows: list[tuple[str, ...]] = [
        (block.name, f"{block.alone_db:.1f}", f"{block.gain_db:.2f}", f"{100 * block.weights:.1f}",
         "" if block.int8_gain_db is None else f"{block.int8_gain_db:.2f}", block.runs_in)
        for block in gate.blocks
    ]  # fmt: skip
    headings = ["block", "SNR alone, dB", "in float, dB gained", "% of weights",
                "in INT8, dB gained", "runs in"]  # fmt: skip
    if not any(block.int8_gain_db for block in gate.blocks):  # for an INT8 file
        rows = [(*row[:4], row[5]) for row in rows]
        del headings[4]
    about = "dB gained: rise of the logits' SNR if the block runs so; 0 or less: no gain."
    return DataTable(headings=headings, rows=rows, about=about)


def gate_summary(gate: GateResult) -> list[str]:
    """Return the verdict, and how many images get another class."""
    drop = gate.drop.drop
    return [
        *gate.summary,
        "The quantized net predicts a different class than FP32 for "
        f"{plural(gate.changed, 'image')} of {drop.n:,}: "
        f"only FP32 is correct on {drop.lost} of them, only the quantized net on {drop.won}.",
    ]


def build_line(result: BuildResult) -> str:
    """Return one line that describes a plan: targets, size, and attested precisions."""
    plan = result.plan
    proof = (
        describe_attested(plan) if plan.attested else "not attested: the build recorded no layers"
    )
    targets = ", ".join(plan.targets) or "the GPU it was built on"
    return (
        f"{result.path}: {result.bytes / 1e6:.1f} MB in {plan.seconds:.1f} s by "
        f"{plan.builder} {plan.version}, for {targets}; {proof}"
    )


def describe_attested(plan: Plan) -> str:
    """Summarize the record of the layers: data types, and operations that did not fuse."""
    attested = plan.attested
    assert attested is not None
    took = ", ".join(f"{count} {_dtype(dtype, plan)}" for dtype, count in attested.dtypes.items())
    parts = [f"of {attested.convolutions} convolutions {took}"]
    if len(attested.dtypes) > 1 and attested.stages:
        rare = min(attested.dtypes, key=attested.dtypes.__getitem__)
        where = [f"{n} in {stage}" for stage, t in attested.stages.items() if (n := t.get(rare))]
        parts[0] += f" ({rare}: {', '.join(where)})"
    if attested.adds:
        unfused = len(attested.unfused_adds or ())
        parts.append(
            f"{unfused} of {attested.adds} adds not fused"
            if unfused
            else f"{attested.adds} adds fused"
        )
    for count, word in ((attested.requantizes, "requantize"), (attested.reformats, "reformat")):
        if count:
            parts.append(f"{plural(count, 'layer')} {word}")
    if attested.rounds:
        parts.append(f"{len(attested.rounds)} Q/DQ pairs only round")
    return ", ".join(parts)


def _dtype(dtype: str, plan: Plan) -> str:
    """Return the arithmetic of a kernel type; the builders' own records say Float for TF32 too."""
    if dtype == "unknown":
        return "are not attested"
    has_tf32 = any(target != "sm_75" for target in plan.targets)
    allowed = " (TF32 allowed)" if dtype == "Float" and plan.tf32 and has_tf32 else ""
    return f"take {dtype}{allowed}"


def inspect_lines(result: InspectResult, layers: Iterable[str] = ()) -> Iterator[str | DataTable]:
    """Return an artifact's chain, its header, and the content of the file."""
    for index, entry in enumerate(result.chain):
        indent, record = "  " * index, entry.sidecar
        summary = ""
        if record:
            summary = f": {record.kind}, {record.model.architecture}, {record.precision}"
        yield f"{indent}{'<- ' if index else ''}{entry.path}{summary}  ({entry.state})"
        for line in _details(entry, first=index == 0):
            yield f"{indent}   {line}"
        yield from tables.measured_tables(record.measured if record else {})
    if head := result.header:
        yield (
            f"header: TensorRT-RTX {head.version}, {head.bytes:,} bytes, for "
            f"{', '.join(head.targets)}"
        )
    if result.manifest and result.chain[0].sidecar is None:
        facts = to_builtins(result.manifest).items()
        text = ", ".join(f"{key} {tables.one_line(value)}" for key, value in facts if value)
        yield f"name field: {text}"
    yield from layers
    if result.operations:
        counted = ", ".join(f"{count} {name}" for name, count in result.operations.items())
        yield f"graph: {counted}"


def folder_table(folder: Path, result: FolderResult) -> DataTable:
    """Return a row for each artifact in a folder."""
    return DataTable(
        headings=("file", "kind", "net", "precision", "MB", "state"),
        rows=[
            (entry.path.relative_to(folder), entry.kind, entry.architecture, entry.precision,
             f"{entry.bytes / 1e6:.2f}", entry.state)
            for entry in result.artifacts
        ],
    )  # fmt: skip


def _details(entry: ChainEntry, *, first: bool) -> list[str]:
    record = entry.sidecar
    if record is None:
        return []
    lines = []
    if record.sha256:
        lines.append(f"sha256 {record.sha256[:16]}..., {record.bytes / 1e6:.2f} MB")
    if first:
        i, d = record.input, record.detection
        size = f"{i.size}x{i.size} (resize {i.resize}, {i.interpolation})"
        if d is not None:
            canvas = f", on {d.canvas[0]}x{d.canvas[1]}" if d.canvas else ""
            size = f"{d.shorter} to {d.longer} pixels{canvas} ({i.interpolation})"
        lines.append(
            f"input {size}, mean {list(i.mean)}, std {list(i.std)}; "
            f"{plural(len(record.model.classes), 'class')}"
        )
        if record.assumed:
            lines.append(f"assumed: {'; '.join(record.assumed)}")
        if i.layout != FLOAT:
            lines.append(f"input {i.layout}: the file normalizes it with mean and std")
        if record.topk:
            lines.append(f"outputs the {record.topk} most probable classes, no logits")
        source = f" ({record.weights.source})" if record.weights.source else ""
        lines.append(f"weights {record.weights.origin}{source}")
    if c := record.calibration:
        lines.append(
            f"calibrated by {c.method} on {plural(c.n, 'image')} of {c.images}: {_scales(c)}"
        )
    if p := record.plan:
        batches = ", ".join(map(str, p.profiles))
        lines.append(f"{p.builder} {p.version}, batches {batches}, for {', '.join(p.targets)}")
        if p.attested:
            lines.append(f"{describe_attested(p)}; {plural(p.attested.layers, 'layer')}")
    lines += tables.measured_lines(record.measured)
    if record.made_by:
        lines.append(f"created by: {record.made_by.get('command')}")
    return lines


def _scales(calibration: Calibration) -> str:
    """Return where its scales are, and whether another calibration has been written there since."""
    path = Path(calibration.scales)
    readable = path.suffix == ".json" and path.is_file()  # learned ones are in their checkpoint
    changed = readable and atomic_io.sha256(path) != calibration.scales_sha256
    return f"{path.as_posix()}{' (changed since)' if changed else ''}"
