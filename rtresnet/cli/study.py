"""`rtresnet study`: the paper's own analyses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.errors import InputError
from rtresnet.core.reporter import plural
from rtresnet.workflows.study import DATA_OPTION, StudyConfig, StudyResult

if TYPE_CHECKING:
    from rtresnet.reporting.study import Panel
    from rtresnet.study.compare import Net

CAPTION = "A band is one standard deviation over the seeds; the first steps may lie above the axes."


@click.group("study")
def command() -> None:
    """Repeat the paper's analyses on any net and any data."""


def _out_option(name: str) -> Callable[[Any], Any]:
    return click.option(
        "--out",
        type=click.Path(path_type=Path),
        default=f"runs/study-{name}",
        help=f"Folder of the study.  [default: runs/study-{name}]",
    )


_data_option = click.option("--data", required=True, help=DATA_OPTION)


@command.command("degradation")
@click.option("--depths", default="20,32,44,56", help="Depths of the nets.  [default: 20,32,44,56]")
@_data_option
@config_options(StudyConfig)
@_out_option("degradation")
@common.json_option
def degradation(
    depths: str, data: str, config: StudyConfig, out: Path, json_file: str | None
) -> None:
    """Train plain and residual nets of growing depth (figures 1, 4 and 6, table 2).

    Every run is a folder in --out; finished runs are not repeated.
    """
    from rtresnet.cli.console import REPORTER
    from rtresnet.reporting import study
    from rtresnet.workflows.study import study_degradation

    try:
        numbers = [int(part) for part in depths.split(",")]
    except ValueError:
        raise InputError(
            f"--depths {depths}: not numbers with commas between", fix="as in --depths 20,32"
        ) from None
    result = study_degradation(data, numbers, config, out=out, reporter=REPORTER)
    _show(result, study.plain_and_residual, json_file)


@command.command("shortcuts")
@click.option("--model", default="resnet20", help="A residual net.  [default: resnet20]")
@_data_option
@config_options(StudyConfig)
@_out_option("shortcuts")
@common.json_option
def shortcuts(model: str, data: str, config: StudyConfig, out: Path, json_file: str | None) -> None:
    """Train a net with shortcut options A, B and C, and the plain net (section 4.1, table 3).

    A pads with zeros, B projects where dimensions change, C projects everywhere.
    """
    from rtresnet.cli.console import REPORTER
    from rtresnet.reporting import study
    from rtresnet.workflows.study import study_shortcuts

    result = study_shortcuts(data, model, config, out=out, reporter=REPORTER)
    _show(result, study.training_and_validation, json_file)


def _show(
    result: StudyResult, panels: Callable[[Sequence[Net]], list[Panel]], json_file: str | None
) -> None:
    """Prints the table, writes figure, page and JSON."""
    from rtresnet.reporting import pages, study, tables

    figure = None
    if _can_draw() and any(net.finished for net in result.nets):
        figure = study.error_curves(panels(result.nets), title=result.title, subtitle=result.note)
    table = study.table(result.nets)
    tables.show(common.out_console(), table.headings, table.rows)
    common.note(f"{result.note}.")
    common.note(table.about)
    pages.write_study(
        result.out, result.study, title=result.title, figure=figure, caption=CAPTION,
        tables=[table], diverged=result.diverged, recipe=result.recipe,
    )  # fmt: skip
    common.write_json(str(result.out / f"{result.study}.json"), f"study {result.study}", result)
    common.note(f"page: {result.out / 'index.html'}")
    common.write_json(json_file, f"study {result.study}", result)


def _can_draw() -> bool:
    """Whether there can be a figure; notes what is missing."""
    from rtresnet.core import hardware

    if not hardware.installed("matplotlib"):
        common.note("no figure: pip install 'rtresnet[report]', and run the same command again")
        return False
    return True


@command.command("responses")
@click.argument("checkpoints", nargs=-1, required=True)
@_data_option
@click.option(
    "--images", type=click.IntRange(min=1), default=256, help="Number of images.  [default: 256]"
)
@_out_option("responses")
@common.json_option
def responses(
    checkpoints: tuple[str, ...], data: str, images: int, out: Path, json_file: str | None
) -> None:
    """Measure the standard deviation of each 3x3 layer's response (figure 7).

    After batch norm, before ReLU and addition: how strongly a layer changes its input.
    """
    from rtresnet.cli.console import REPORTER
    from rtresnet.core import atomic_io, locks
    from rtresnet.reporting import pages, study, tables
    from rtresnet.workflows.study import short_name, study_responses

    with locks.hold_folder(out, warn=common.note):
        result = study_responses(checkpoints, data, images, reporter=REPORTER)
        shown = [study.response_table(entry, data) for entry in result.results]
        for table in shown:
            tables.show(common.out_console(), table.headings, table.rows, title=table.title)
        common.footer(
            f"Assumed of {e.checkpoint}: {line}." for e in result.results for line in e.assumed
        )
        subtitle = f"{plural(result.results[0].n, 'image')} of {short_name(data)}"
        pages.write_study(
            atomic_io.make_folder(out),
            "responses",
            title="Layer responses",
            figure=study.response_figure(result.results, subtitle) if _can_draw() else None,
            caption="Standard deviation of the output of each 3x3 layer, after batch norm, before "
            "ReLU and addition.",
            tables=shown,
        )
        common.write_json(str(out / "responses.json"), "study responses", result)
    common.note(f"page: {out / 'index.html'}")
    common.write_json(json_file, "study responses", result)
