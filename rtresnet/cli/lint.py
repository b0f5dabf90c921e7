"""`rtresnet lint`: whether TensorRT will run quantized ONNX files as they say."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common
from rtresnet.core.errors import ArtifactError, CheckFailedError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rtresnet.core.sidecar import Sidecar
    from rtresnet.quantization.autofix import Repair
    from rtresnet.quantization.lint_rules import Finding

WIDTH = 80
NAMED = 3  # nodes that are named of all that break one rule in one way


@click.command("lint", short_help="Check quantized ONNX models for TensorRT problems.")
@click.argument(
    "paths",
    metavar="FILE.onnx...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
)
@click.option(
    "--fix",
    "out",
    metavar="OUT.onnx",
    type=click.Path(path_type=Path),
    help="Write a copy of one file with everything repaired that can be repaired without changing "
    "a bit of its outputs [nothing is written].",
)
@common.json_option
def command(paths: tuple[Path, ...], out: Path | None, json_file: str | None) -> None:
    """Say where TensorRT would refuse a Q/DQ file, compute other numbers, or be slow.

    For files made by any tool. Needs neither a GPU nor TensorRT; --fix needs ONNX Runtime. Exit
    code 0 means nothing worse than a note, 1 that there is.
    """
    from rtresnet.core import artifacts, hardware
    from rtresnet.core.errors import missing_package

    if out is not None and len(paths) > 1:
        raise InputError("--fix writes one file", fix="give the files to lint --fix one by one")
    for path in paths:  # what is no ONNX file is refused before another is checked
        artifacts.require_onnx(path, "lint")
    if not hardware.installed("onnx"):
        raise missing_package("onnx", "reading an ONNX file")
    results = []
    for path in paths:
        if len(paths) > 1:
            common.say(f"{path}:")
        results.append(_run(path, out))
    common.write_json(json_file, "lint", results[0] if len(paths) == 1 else {"files": results})
    worse = [(entry["fixed"] or entry["file"], entry["worse"]) for entry in results]
    worse = [(name, counted) for name, counted in worse if counted]
    if worse:
        mends = out is None and any(
            "--fix" in finding["mend"] for entry in results for finding in entry["findings"]
        )
        named = paths[0] if len(paths) == 1 else "FILE.onnx"
        raise CheckFailedError(
            "; ".join(f"{name}: {counted}" for name, counted in worse),
            fix=f"mend what can be: rtresnet lint {named} --fix OUT.onnx" if mends else None,
        )


def _run(path: Path, out: Path | None) -> dict[str, Any]:
    """Checks one file and prints what was found.

    Returns:
        For the JSON; "worse" counts what is worse than a note, as in "3 errors, 1 warning".
    """
    from rtresnet.core import artifacts
    from rtresnet.onnxlib import io
    from rtresnet.quantization.lint import lint

    sidecar = artifacts.verify(path)
    model = io.load(path, fix=None)  # not checked: why it is refused is for the rules to say
    try:
        findings, repaired = _meant(lint(model), sidecar), list["Repair"]()
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error.message}", fix=error.fix) from None
    for line in _listed(findings):
        common.say(line)
    if out is not None:
        findings, repaired = _repair(path, out, model, sidecar)
        findings = _meant(findings, sidecar)
    worse = _counted(findings)
    if not worse:
        notes = len(findings)
        also = f", {_number(notes, 'note')}" if notes else ""
        common.say(f"{out or path}: nothing to mend{also}")
    return {
        "file": str(path),
        "fixed": str(out) if out else None,
        "worse": worse,
        "findings": [dataclasses.asdict(entry) for entry in findings],
        "repaired": [dataclasses.asdict(entry) for entry in repaired],
    }


def _meant(findings: list[Finding], sidecar: Sidecar | None) -> list[Finding]:
    """What `quantize --eval` left in float on purpose is worth a note only."""
    kept = sidecar.calibration.kept if sidecar and sidecar.calibration else ()
    return [
        dataclasses.replace(entry, severity="note")
        if entry.node in kept and entry.rule.startswith("float-")
        else entry
        for entry in findings
    ]


def _repair(
    path: Path, out: Path, model: Any, sidecar: Sidecar | None
) -> tuple[list[Finding], list[Repair]]:
    """Writes the repaired file and says what was done and what is left."""
    from rtresnet.core import artifacts, atomic_io
    from rtresnet.quantization.autofix import fix

    if sidecar is None and artifacts.sidecar_path(out).exists():
        raise InputError(f"{out}: has a sidecar, of another file", fix="choose another --fix")
    with common.progress(f"repairing {path}, and comparing outputs"):
        fixed, repaired, left = fix(model)

    def write(target: Path) -> None:
        target.write_bytes(fixed.SerializeToString())

    if sidecar is None:
        with atomic_io.atomic_path(out) as temporary:
            write(temporary)
    else:
        in_place = out.exists() and out.samefile(path)
        parent = sidecar.parent if in_place else artifacts.link_to(path, out)
        artifacts.publish(out, write, dataclasses.replace(sidecar, parent=parent, made_by={}))
    for (rule, what), count in Counter((entry.rule, entry.what) for entry in repaired).items():
        common.say(f"repaired  {rule}, {_number(count, 'node')}: {what}")
    common.say(f"{out}: " + ("same outputs, bit for bit" if repaired else "nothing was repaired"))
    if repaired and left:
        common.say("left:")
        for line in _listed(left):
            common.say(line)
    return left, repaired


def _listed(findings: Iterable[Finding]) -> list[str]:
    """Three lines or so for each way in which a rule is broken, with the first nodes' names."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for entry in findings:
        key = (entry.severity, entry.rule, entry.consequence, entry.mend)
        groups.setdefault(key, []).append(entry.node)
    lines = []
    for (severity, rule, consequence, mend), nodes in groups.items():
        lines.append(f"{severity:<8} {rule}, {_number(len(nodes), 'node')}")
        more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
        lines += _wrapped("at    ", ", ".join(nodes[:NAMED]) + more)
        lines += _wrapped("so    ", consequence)
        lines += _wrapped("mend  ", mend)
    return lines


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {head}", subsequent_indent=" " * 8, break_on_hyphens=False
    )


def _counted(findings: Iterable[Finding]) -> str:
    """As in "3 errors, 1 warning"; empty where there is nothing worse than a note."""
    count = Counter(entry.severity for entry in findings)
    return ", ".join(_number(count[s], s) for s in ("error", "warning") if count[s])


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
