"""`rtresnet profile`: time and bottleneck of each block of a net."""

from __future__ import annotations

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.reporting import performance
from rtresnet.workflows.profile import ProfileConfig, profile


@click.command("profile")
@click.argument("path")
@config_options(ProfileConfig)
@click.option(
    "--layers", type=click.IntRange(min=0), default=5, show_default=True,
    help="Number of the slowest layers to show.",
)  # fmt: skip
@common.json_option
def command(path: str, config: ProfileConfig, layers: int) -> None:
    """Measure the time of each block, and whether arithmetic, memory or overhead limits it.

    An ONNX file runs in ONNX Runtime's CPU provider, a plan on the GPU. Rates are compared with
    peak rates: measured once for this machine, or published for the GPU.
    """
    result = profile(path, config, reporter=common.REPORTER)
    common.show(performance.profile_lines(result, layers))
    common.write_json("profile", result)
