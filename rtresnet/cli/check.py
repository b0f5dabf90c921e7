"""`rtresnet check`: whether an image gets the same answer in every batch."""

from __future__ import annotations

from collections.abc import Sequence

import click

from rtresnet.bench.consistency import Check
from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.errors import CheckFailedError
from rtresnet.workflows.check import CheckConfig, CheckResult, check
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig


@click.command("check")
@click.argument("path")
@click.option(
    "--data", metavar="SPEC", help=f"Images, labelled or not: {common.DATA_HELP}  [default: noise]"
)
@config_options(CheckConfig)
@config_options(InputConfig, argument="stated")
@config_options(RuntimeConfig, argument="runtime", leave_out=("contexts", "graphs"))
@common.json_option
def command(
    path: str,
    data: str | None,
    config: CheckConfig,
    stated: InputConfig,
    runtime: RuntimeConfig,
    json_file: str | None,
) -> None:
    """Compare an artifact with itself, and with the FP32 ONNX file it came from.

    An image alone, in a batch, permuted, at every batch of the plan's profiles (1, 8 and 32 for
    other files), at odd batches, after other batches and next to a broken image must get the same
    answer, within what its precision allows. The exit code is 1 where it does not.

    A detector's detections must be valid, repeatable and those of the file it was made from: on
    --data with or without boxes, by default drawn shapes.
    """
    from rtresnet.cli.console import REPORTER
    from rtresnet.workflows.detect import is_detector

    if is_detector(path):
        _check_detector(path, data, config, stated, runtime, json_file)
        return
    result = check(path, data, config, runtime=runtime, stated=stated, reporter=REPORTER)
    show(result)
    common.write_json(json_file, "check", result)
    if result.failed:
        first, *others = result.failed
        more = f", and {len(others)} more" if others else ""
        raise CheckFailedError(
            f"{path}: {first.name} ({first.compared}): {first.why}{more}",
            fix="the ranges of an INT8 file do not suit noise: --data SPEC"
            if first.name == "parent" and data is None and result.precision == "int8"
            else None,
        )


def _check_detector(
    path: str,
    data: str | None,
    config: CheckConfig,
    stated: InputConfig,
    runtime: RuntimeConfig,
    json_file: str | None,
) -> None:
    from rtresnet.cli.console import REPORTER
    from rtresnet.workflows.detect_check import check_detector

    result = check_detector(path, data, config, runtime=runtime, stated=stated, reporter=REPORTER)
    _show_checks(result.checks)
    lines = [f"{result.n} images ({result.images}), {result.detections} detections."]
    lines += [f"{line[0].upper()}{line[1:]}." for line in result.missing]
    if any(entry.name == "parity" and not entry.n for entry in result.checks):
        lines.append(
            "WEAK: no detection has a score of 50 % or more, and none was compared. Use other "
            "images: --data SPEC"
        )
    common.footer([*lines, str(result.runtime), *result.runtime.notes])
    common.footer(f"Assumed: {line}." for line in result.assumed)
    common.write_json(json_file, "check", result)
    if result.failed:
        raise CheckFailedError(
            f"{path}: " + "; ".join(f"{entry.name}: {entry.why}" for entry in result.failed),
            fix="the ranges of an INT8 file do not suit other images: --data SPEC"
            if result.failed[0].name == "parity" and data is None
            else None,
        )


def _show_checks(checks: Sequence[Check]) -> None:
    from rtresnet.reporting import tables

    rows = [
        (entry.name, entry.compared, entry.n, entry.largest, entry.tolerance,
         "ok" if entry.ok else "FAILED")
        for entry in checks
    ]  # fmt: skip
    headings = ("check", "compared", "n", "difference", "tolerance", "verdict")
    tables.show(common.out_console(), headings, rows)


def show(result: CheckResult) -> None:
    """Print the table, and what was compared on which device."""
    from rtresnet.reporting import tables

    _show_checks(result.checks)
    unknown = ", as its precision is unknown" if result.precision == "unknown" else ""
    lines = [
        f"{result.n} images ({result.images}), compared within what {result.bound} can do"
        f"{unknown}; answers range over {tables.number(result.range)}."
    ]
    if result.parent is None:
        lines.append(f"Not compared with an FP32 file: {result.no_parent}.")
    if result.discriminability < 0.5:
        lines.append(
            f"WEAK: {100 * (1 - result.discriminability):.0f} % of the pairs of images get the "
            "same answer within the tolerance, so that exchanged rows would not be noticed. Use "
            "other images: --data SPEC"
        )
    common.footer([*lines, str(result.runtime), *result.runtime.notes])
    common.footer(f"Assumed: {line}." for line in result.assumed)
