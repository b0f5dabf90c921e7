"""`rtresnet doctor`: what this machine supports, and how to install the rest."""

from __future__ import annotations

import click

from rtresnet.cli import common
from rtresnet.core.errors import CheckFailedError
from rtresnet.core.isolated import FAILED


@click.command("doctor")
@click.option("--gpu", is_flag=True, help="Run a short self-test of the GPU.  [default: off]")
@common.json_option
def command(gpu: bool) -> None:
    """Show what this machine supports, and the command that installs what is missing."""
    from rtresnet.reporting import checks

    if not gpu:
        from rtresnet.workflows.doctor import doctor

        result = doctor()
        common.show(checks.doctor_lines(result))
        common.write_json("doctor", result)
        return
    from rtresnet.workflows.doctor_gpu import test_gpu

    results = test_gpu()
    common.show(checks.gpu_lines(results))
    common.write_json("doctor", {"gpu": results})
    failed = [step for step in results if step.status == FAILED]
    if failed:
        raise CheckFailedError(
            f"{len(failed)} of {len(results)} steps failed: {failed[0].name}: {failed[0].reason}",
            fix="see stderr in: rtresnet doctor --gpu --json -",
        )
