"""`rtresnet estimate`: the minimum time that a net can take on a GPU."""

from __future__ import annotations

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.reporting import performance
from rtresnet.workflows.estimate import EstimateConfig, estimate


@click.command("estimate")
@click.argument("models", metavar="MODEL|PATH...", nargs=-1, required=True)
@config_options(EstimateConfig)
@common.json_option
def command(models: tuple[str, ...], config: EstimateConfig) -> None:
    """Print the minimum time that a net can take on a GPU, from published peak rates.

    The result is a lower bound, not a measurement: real implementations are slower.
    For a plan, the kernels are the fused ones. Several plans are compared.
    """
    if len(models) > 1:
        from rtresnet.workflows.advisor import advise

        advice = advise(models, config)
        common.show(performance.advice_lines(advice))
        common.write_json("advise", advice)
        return
    result = estimate(models[0], config)
    common.show(performance.estimate_lines(result))
    common.write_json("estimate", result)
