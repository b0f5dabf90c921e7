"""`rtresnet lint`: problems of quantized ONNX files in TensorRT."""

from __future__ import annotations

from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.core import artifacts
from rtresnet.core.errors import CheckFailedError, InputError
from rtresnet.reporting import checks
from rtresnet.workflows.lint import lint


@click.command("lint")
@click.argument("paths", metavar="FILE.onnx...", nargs=-1, required=True, type=common.PATH)
@click.option(
    "--fix",
    metavar="OUT.onnx",
    type=common.PATH,
    help="Write a copy of one file with all repairs that do not change "
    "its outputs by a single bit.  [default: write nothing]",
)
@common.json_option
def command(paths: tuple[Path, ...], fix: Path | None) -> None:
    """Report nodes that TensorRT would reject, compute differently or run slowly.

    Works on files of any tool, without a GPU or TensorRT; --fix needs ONNX Runtime. The exit
    code is 1 if there is any error or warning.
    """
    if fix is not None and len(paths) > 1:
        raise InputError("--fix accepts only one file", fix="run lint --fix once for each file")
    for path in paths:  # reject a file that is no ONNX file before checking another
        artifacts.require_onnx(path, "lint")
    results = []
    for path in paths:
        results.append(lint(path, fix=fix, reporter=common.REPORTER))
        if len(paths) > 1 and results[-1].findings:  # without any, the only line names the file
            common.say(f"{path}:")
        common.show(checks.lint_lines(results[-1]))
    common.write_json("lint", results[0] if len(paths) == 1 else {"files": results})
    if len(results) == 1:
        results[0].require_passed()
    if failed := [result for result in results if not result.passed]:
        fixable = any("--fix" in entry.fix for result in failed for entry in result.findings)
        raise CheckFailedError(
            "; ".join(f"{result.file}: {result.worse}" for result in failed),
            fix="repair it with: rtresnet lint FILE.onnx --fix OUT.onnx" if fixable else None,
        )
