"""`rtresnet check`: whether an image has the same output in every batch."""

from __future__ import annotations

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.errors import CheckFailedError
from rtresnet.data import DATA_HELP
from rtresnet.reporting import checks
from rtresnet.workflows.check import CheckConfig, check
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig


@click.command("check")
@click.argument("path")
@click.option(
    "--data", metavar="SPEC", help=f"Images, labelled or not: {DATA_HELP}  [default: noise]"
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
) -> None:
    """Check that an output does not depend on the batch, and compare it with the FP32 ONNX file.

    An image alone, in a batch, permuted, at every batch of the plan's profiles (1, 8 and 32 for
    other files), at odd batches, after other batches and next to a broken image must have the same
    output, within the tolerance of its precision. The exit code is 1 if it does not.

    For a detector: detections must be valid, repeatable and equal to those of its source file.
    --data needs no boxes [default: drawn shapes].
    """
    result = check(path, data, config, runtime=runtime, stated=stated, reporter=common.REPORTER)
    common.show(checks.check_lines(result))
    common.write_json("check", result)
    if result.failed:
        first, *others = result.failed
        more = f", and {len(others)} more" if others else ""
        fix = None
        if first.name in ("parent", "parity") and data is None and result.precision == "int8":
            fix = f"INT8 ranges do not fit {result.images}; use images of the data: --data SPEC"
        elif first.name == "settled":
            fix = "export it again with more --nms-rounds (default 16)"
        raise CheckFailedError(
            f"{path}: {first.name} ({first.compared}): {first.why}{more}",
            fix=fix,
        )
