"""The analyses of `rtresnet study` that train no net, or only a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.reporter import plural
from rtresnet.workflows.study import DATA_OPTION
from rtresnet.workflows.study_analysis import GradientsConfig
from rtresnet.workflows.study_detection import DetectionStudyConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rtresnet.reporting.tables import DataTable


def out_option(name: str) -> Callable[[Any], Any]:
    """Return the option of a study's folder."""
    return click.option(
        "--out",
        type=common.PATH,
        default=f"runs/study-{name}",
        help=f"Folder of the study.  [default: runs/study-{name}]",
    )


data_option = click.option("--data", required=True, help=DATA_OPTION)


def can_draw() -> bool:
    """Return whether a figure can be drawn; if not, print a note on what is missing."""
    from rtresnet.core import hardware

    if not hardware.installed("matplotlib"):
        common.note(
            "no figure without matplotlib: pip install 'rtresnet[report]', then run the command "
            "again"
        )
        return False
    return True


@click.command("responses")
@click.argument("checkpoints", nargs=-1, required=True)
@data_option
@click.option(
    "--images", type=click.IntRange(min=1), default=256, help="Number of images.  [default: 256]"
)
@out_option("responses")
@common.json_option
def responses(checkpoints: tuple[str, ...], data: str, images: int, out: Path) -> None:
    """Measure the standard deviation of each 3x3 layer's response (figure 7).

    The response is taken after batch norm, before ReLU and addition.
    """
    from rtresnet.core import atomic_io, locks
    from rtresnet.reporting import pages, study, tables
    from rtresnet.workflows.study import short_name, study_responses

    with locks.hold_folder(out, warn=common.note):
        result = study_responses(checkpoints, data, images, reporter=common.REPORTER)
        shown = [study.response_table(entry, data) for entry in result.results]
        common.show(shown)
        for entry in result.results:
            common.show(tables.assumed(entry.assumed, of=entry.checkpoint))
        subtitle = f"{plural(result.results[0].n, 'image')} of {short_name(data)}"
        pages.write_study(
            atomic_io.make_folder(out),
            "responses",
            title="Layer responses",
            figure=study.response_figure(result.results, subtitle) if can_draw() else None,
            caption="Standard deviation of the output of each 3x3 layer, after batch norm, before "
            "ReLU and addition.",
            tables=shown,
        )
        common.write_json("study responses", result, file=out / "responses.json")
    common.note(f"page: {out / 'index.html'}")


def _show_analysis(
    name: str,
    title: str,
    result: object,
    out: Path,
    table: DataTable,
    draw: Callable[[], Figure],
    caption: str,
) -> None:
    """Print the table of an analysis; write its figure, page and JSON."""
    from rtresnet.core import atomic_io
    from rtresnet.reporting import pages

    common.show([table])
    common.note(table.about)
    pages.write_study(
        atomic_io.make_folder(out), name, title=title, figure=draw() if can_draw() else None,
        caption=caption, tables=[table],
    )  # fmt: skip
    common.write_json(f"study {name}", result, file=out / f"{name}.json")
    common.note(f"page: {out / 'index.html'}")


@click.command("cost")
@out_option("cost")
@common.json_option
def cost(out: Path) -> None:
    """Count parameters and multiply-adds of every net against VGG-19 (section 3.3, table 1)."""
    from rtresnet.reporting import study
    from rtresnet.workflows.study_analysis import study_cost

    result = study_cost()
    _show_analysis(
        "cost", "Cost of the nets", result, out, study.cost_table(result),
        lambda: study.cost_figure(result), "Multiply-adds for one image.",
    )  # fmt: skip


@click.command("gradients")
@data_option
@config_options(GradientsConfig)
@out_option("gradients")
@common.json_option
def gradients(data: str, config: GradientsConfig, out: Path) -> None:
    """Measure the gradient of each 3x3 layer at initialization and along a run (section 4.1).

    The run uses SGD at the paper's learning rate, on images without augmentation.
    """
    from rtresnet.reporting import study
    from rtresnet.workflows.study import short_name
    from rtresnet.workflows.study_analysis import study_gradients

    result = study_gradients(data, config, out=out, reporter=common.REPORTER)
    _show_analysis(
        "gradients", "Gradients by layer", result, out, study.gradient_table(result),
        lambda: study.gradient_figure(result, short_name(data)),
        "Norm of the loss gradient with respect to the weights of each 3x3 convolution.",
    )  # fmt: skip


@click.command("lesions")
@click.argument("checkpoint")
@data_option
@click.option("--images", type=click.IntRange(min=1), help="Number of test images.  [default: all]")
@out_option("lesions")
@common.json_option
def lesions(checkpoint: str, data: str, images: int | None, out: Path) -> None:
    """Remove one block at a time from a trained net and evaluate, next to its noise in INT8."""
    from rtresnet.reporting import study, tables
    from rtresnet.workflows.study import short_name
    from rtresnet.workflows.study_analysis import study_lesions

    result = study_lesions(checkpoint, data, images, out=out, reporter=common.REPORTER)
    _show_analysis(
        "lesions", f"{result.model} without one of its blocks", result, out,
        study.lesion_table(result), lambda: study.lesion_figure(result, short_name(data)),
        "Accuracy without each block, and the noise of the same block in INT8.",
    )  # fmt: skip
    common.show(tables.assumed(result.assumed, of=checkpoint))
    common.show(f"Note: {line}." for line in result.remarks)


@click.command("detection")
@click.option(
    "--data",
    default="shapes:200",
    help="Images with boxes: voc:DIR[:SPLIT], coco:JSON:IMAGES or shapes:N.  [default: shapes:200]",
)
@config_options(DetectionStudyConfig)
@out_option("detection")
@common.json_option
def detection(data: str, config: DetectionStudyConfig, out: Path) -> None:
    """Train Faster R-CNN with several backbones, equally pre-trained (section 4.3, table 7).

    Every run is a folder in --out; finished runs are not repeated. Drawn shapes show that a
    backbone learns; a ranking needs VOC or COCO, ImageNet weights and a GPU.
    """
    from rtresnet.reporting import study
    from rtresnet.workflows.study_detection import study_detection

    result = study_detection(data, config, out=out, reporter=common.REPORTER)
    common.note(f"{result.note}.")
    _show_analysis(
        "detection", "Backbones of Faster R-CNN", result, out, study.detection_table(result),
        lambda: study.detection_figure(result),
        "Average precision of each backbone, a dot for each seed, and its training loss.",
    )  # fmt: skip
