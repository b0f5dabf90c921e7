"""`rtresnet lint`: whether TensorRT runs quantized ONNX files as they say."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rtresnet.cli import common
from rtresnet.core import artifacts
from rtresnet.core.errors import CheckFailedError, InputError
from rtresnet.core.reporter import plural
from rtresnet.workflows.lint import LintResult, lint

if TYPE_CHECKING:
    from rtresnet.quantization.lint_rules import Finding

WIDTH = 80
NAMED = 3  # nodes that are named of all that break one rule in one way


@click.command("lint")
@click.argument(
    "paths", metavar="FILE.onnx...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--fix",
    metavar="OUT.onnx",
    type=click.Path(path_type=Path),
    help="Write a copy of one file with everything repaired that can be repaired without changing "
    "a bit of its outputs.  [default: write nothing]",
)
@common.json_option
def command(paths: tuple[Path, ...], fix: Path | None, json_file: str | None) -> None:
    """Show where TensorRT would refuse a Q/DQ file, compute other numbers, or be slow.

    For files made by any tool. Needs neither a GPU nor TensorRT; --fix needs ONNX Runtime. The exit
    code is 1 where there is anything worse than a note.
    """
    from rtresnet.cli.console import REPORTER

    if fix is not None and len(paths) > 1:
        raise InputError("--fix writes one file", fix="give the files to lint --fix one by one")
    for path in paths:  # refuse a file that is no ONNX file before checking another
        artifacts.require_onnx(path, "lint")
    results = []
    for path in paths:
        if len(paths) > 1:
            common.say(f"{path}:")
        results.append(lint(path, fix=fix, reporter=REPORTER))
        _show(results[-1])
    common.write_json(json_file, "lint", results[0] if len(paths) == 1 else {"files": results})
    if len(results) == 1:
        results[0].require_passed()
    if failed := [result for result in results if not result.passed]:
        fixable = any("--fix" in entry.fix for result in failed for entry in result.findings)
        raise CheckFailedError(
            "; ".join(f"{result.file}: {result.worse}" for result in failed),
            fix="repair what can be repaired: rtresnet lint FILE.onnx --fix OUT.onnx"
            if fixable
            else None,
        )


def _show(result: LintResult) -> None:
    for line in _listed(result.before):
        common.say(line)
    if result.fixed is not None:
        repairs = Counter((entry.rule, entry.what) for entry in result.repaired)
        for (rule, what), count in repairs.items():
            common.say(f"repaired  {rule}, {plural(count, 'node')}: {what}")
        same = "same outputs, bit for bit" if repairs else "nothing was repaired"
        common.say(f"{result.fixed}: {same}")
        if repairs and result.findings:
            common.say("left:")
            for line in _listed(result.findings):
                common.say(line)
    if result.passed:
        notes = len(result.findings)
        also = f", {plural(notes, 'note')}" if notes else ""
        common.say(f"{result.fixed or result.file}: no problems{also}")


def _listed(findings: Iterable[Finding]) -> list[str]:
    """Three lines or so for each way in which a rule is broken, with the first nodes' names."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for entry in findings:
        key = (entry.severity, entry.rule, entry.consequence, entry.fix)
        groups.setdefault(key, []).append(entry.node)
    lines = []
    for (severity, rule, consequence, fix), nodes in groups.items():
        lines.append(f"{severity:<8} {rule}, {plural(len(nodes), 'node')}")
        more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
        lines += _wrapped("nodes   ", ", ".join(nodes[:NAMED]) + more)
        lines += _wrapped("problem ", consequence)
        lines += _wrapped("fix     ", fix)
    return lines


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {head}", subsequent_indent=" " * 10, break_on_hyphens=False
    )
