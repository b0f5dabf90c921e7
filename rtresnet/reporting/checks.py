"""Results of `rtresnet check`, `lint` and `doctor` as tables and sentences."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rtresnet.core.isolated import StepResult
from rtresnet.core.reporter import plural
from rtresnet.reporting.tables import DataTable, assumed, number
from rtresnet.workflows.doctor import ON_GPU, DoctorResult, replacement

if TYPE_CHECKING:
    from rtresnet.quantization.lint_rules import Finding
    from rtresnet.workflows.check import CheckResult
    from rtresnet.workflows.detect_check import CheckDetectorResult
    from rtresnet.workflows.lint import LintResult

WIDTH = 80
NAMED = 3  # number of nodes to name for each problem


def check_lines(result: CheckResult | CheckDetectorResult) -> Iterator[str | DataTable]:
    """Return the table, and the devices that were compared."""
    from rtresnet.workflows.check import CheckResult

    yield DataTable(
        headings=("check", "compared", "n", "difference", "tolerance", "verdict"),
        rows=[
            (entry.name, entry.compared, entry.n, entry.largest, entry.tolerance,
             "ok" if entry.ok else "FAILED")
            for entry in result.checks
        ],
    )  # fmt: skip
    if isinstance(result, CheckResult):
        yield from _classifier_lines(result)
    else:
        yield from _detector_lines(result)
    yield from (str(result.runtime), *result.runtime.notes)
    yield from assumed(result.assumed)


def _classifier_lines(result: CheckResult) -> Iterator[str]:
    unknown = ", as its precision is unknown" if result.precision == "unknown" else ""
    yield (
        f"{result.n} images ({result.images}), compared within the tolerance of {result.bound}"
        f"{unknown}; logits range over {number(result.range)}."
    )
    if result.parent is None:
        yield f"Not compared with an FP32 file: {result.no_parent}."
    if result.discriminability < 0.5:
        yield (
            f"WEAK: {100 * (1 - result.discriminability):.0f} % of the image pairs have the "
            "same output within the tolerance, so swapped rows would go undetected. Use "
            "other images: --data SPEC"
        )


def _detector_lines(result: CheckDetectorResult) -> Iterator[str]:
    yield f"{result.n} images ({result.images}), {result.detections} detections."
    yield from (f"{line[0].upper()}{line[1:]}." for line in result.missing)
    if any(entry.name == "parity" and not entry.n for entry in result.checks):
        yield (
            "WEAK: no detection has a score of 50 % or more, and none was compared. Use images "
            "with its objects (--data SPEC), or train the net longer."
        )


def lint_lines(result: LintResult) -> Iterator[str]:
    """Return the findings, the repairs, and the remaining findings."""
    yield from _listed(result.before)
    if result.fixed is not None:
        repairs = Counter((entry.rule, entry.change) for entry in result.repaired)
        for (rule, change), count in repairs.items():
            yield f"repaired  {rule}, {plural(count, 'node')}: {change}"
        same = "same outputs, bit for bit" if repairs else "nothing was repaired"
        yield f"{result.fixed}: {same}"
        if repairs and result.findings:
            yield "left:"
            yield from _listed(result.findings)
    if result.passed:
        notes = len(result.findings)
        also = f", {plural(notes, 'note')}" if notes else ""
        yield f"{result.fixed or result.file}: no problems{also}"


def _listed(findings: Iterable[Finding]) -> Iterator[str]:
    """Return about three lines for each kind of problem, with the names of the first nodes."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for entry in findings:
        key = (entry.severity, entry.rule, entry.consequence, entry.fix)
        groups.setdefault(key, []).append(entry.node)
    for (severity, rule, consequence, fix), nodes in groups.items():
        yield f"{severity:<8} {rule}, {plural(len(nodes), 'node')}"
        more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
        yield from _wrapped("nodes   ", ", ".join(nodes[:NAMED]) + more)
        yield from _wrapped("problem ", consequence)
        yield from _wrapped("fix     ", fix)


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {head}", subsequent_indent=" " * 10, break_on_hyphens=False
    )


def doctor_lines(result: DoctorResult) -> Iterator[str | DataTable]:
    """Return the devices, the packages, and the command for each thing missing."""
    yield f"{result.cpu}; Python {result.python}"
    for gpu in result.gpus:
        yield f"GPU: {gpu.name}, {gpu.target}, {gpu.memory / 2**30:.0f} GiB"
    if not result.gpus:
        yield "GPU: none, or no driver. Plans can be built here and run on a machine with a GPU."
    rows = [(p.package, p.version or "missing", p.purpose) for p in result.packages]
    yield DataTable(headings=("package", "version", "for"), rows=rows)
    missing = result.missing
    if "onnxruntime-gpu" in missing:
        missing.remove("onnxruntime-gpu")
        yield f"To {ON_GPU}: {replacement('onnxruntime-gpu')}"
    if missing:
        yield "Missing packages (pip install NAME): " + ", ".join(missing)
    for conflict in result.conflicts:
        yield f"WARNING: {conflict}"
    if result.int8_sums_saturate:
        yield (
            "INT8: this CPU has no VNNI. Its 16-bit integer sums can saturate, so INT8 files "
            "are rewritten to prevent that. They gain less speed than with VNNI."
        )
    for name, state in result.runs.items():
        yield f"{name}: {state}"


def gpu_lines(results: Sequence[StepResult]) -> Iterator[str | DataTable]:
    """Return the devices, versions, and the status of each step."""
    driver = results[0].data
    for gpu in driver.get("devices", ()):
        memory = f"{gpu['memory'] / 2**30:.0f} GiB"
        yield (f"GPU: {gpu['name']}, {gpu['target']}, {memory}, UUID {gpu['uuid'] or 'unknown'}")
    if driver:
        yield f"driver: CUDA {driver['cuda']}; {driver['kernel_driver'] or 'unknown version'}"
        yield ", ".join(f"{name} {version}" for name, version in driver["versions"].items())
    rows = []
    for result in results:
        detail = result.reason
        if "relative_error" in result.data:
            provider = result.data["described"]["provider"]
            detail = f"{provider} and the CPU differ by {result.data['relative_error']:.1g}"
        rows.append((result.name, result.status, f"{result.seconds:.1f}", detail))
    yield DataTable(headings=("step", "status", "s", "detail"), rows=rows)
