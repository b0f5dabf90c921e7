"""`rtresnet study`: the paper's own analyses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.cli.study_analysis import (
    can_draw,
    cost,
    data_option,
    detection,
    gradients,
    lesions,
    out_option,
    responses,
)
from rtresnet.core.errors import InputError
from rtresnet.workflows.study import StudyConfig, StudyResult

if TYPE_CHECKING:
    from rtresnet.reporting.study import Panel
    from rtresnet.study.ablations import Net

CAPTION = "Bands show one standard deviation over the seeds; the first steps may exceed the axes."


@click.group("study")
def command() -> None:
    """Repeat the paper's analyses on any net and any data."""


@command.command("degradation")
@click.option("--depths", default="20,32,44,56", help="Depths of the nets.  [default: 20,32,44,56]")
@data_option
@config_options(StudyConfig)
@out_option("degradation")
@common.json_option
def degradation(depths: str, data: str, config: StudyConfig, out: Path) -> None:
    """Train plain and residual nets of growing depth (figures 1, 4 and 6, table 2).

    Every run is a folder in --out; finished runs are not repeated.
    """
    from rtresnet.reporting import study
    from rtresnet.workflows.study import study_degradation

    try:
        numbers = [int(part) for part in depths.split(",")]
    except ValueError:
        raise InputError(
            f"--depths {depths}: not numbers separated by commas", fix="as in --depths 20,32"
        ) from None
    result = study_degradation(data, numbers, config, out=out, reporter=common.REPORTER)
    _show(result, study.plain_and_residual)


@command.command("shortcuts")
@click.option("--model", default="resnet20", help="A residual net.  [default: resnet20]")
@data_option
@config_options(StudyConfig)
@out_option("shortcuts")
@common.json_option
def shortcuts(model: str, data: str, config: StudyConfig, out: Path) -> None:
    """Train a net with shortcut options A, B and C, and the plain net (section 4.1, table 3).

    A pads with zeros, B projects where dimensions change, C projects everywhere.
    """
    from rtresnet.reporting import study
    from rtresnet.workflows.study import study_shortcuts

    result = study_shortcuts(data, model, config, out=out, reporter=common.REPORTER)
    _show(result, study.training_and_validation)


@command.command("blocks")
@click.option("--model", default="resnet20", help="A net of 18n+2 layers.  [default: resnet20]")
@data_option
@config_options(StudyConfig)
@out_option("blocks")
@common.json_option
def blocks(model: str, data: str, config: StudyConfig, out: Path) -> None:
    """Train a net with residual functions of one, two and three layers (section 3.2).

    All have the same layers. A fourth net has projections everywhere (option C).
    """
    from rtresnet.reporting import study
    from rtresnet.workflows.study import study_blocks

    result = study_blocks(data, model, config, out=out, reporter=common.REPORTER)
    _show(result, study.training_and_validation)


def _show(result: StudyResult, panels: Callable[[Sequence[Net]], list[Panel]]) -> None:
    """Print the table; write figure, page and JSON."""
    from rtresnet.reporting import pages, study

    figure = None
    if can_draw() and any(net.finished for net in result.nets):
        figure = study.error_curves(panels(result.nets), title=result.title, subtitle=result.note)
    table = study.table(result.nets)
    common.show([table])
    common.note(f"{result.note}.")
    common.note(table.about)
    pages.write_study(
        result.out, result.study, title=result.title, figure=figure, caption=CAPTION,
        tables=[table], diverged=result.diverged, recipe=result.recipe,
    )  # fmt: skip
    common.write_json(f"study {result.study}", result, file=result.out / f"{result.study}.json")
    common.note(f"page: {result.out / 'index.html'}")


for _analysis in (responses, cost, gradients, lesions, detection):
    command.add_command(_analysis)
