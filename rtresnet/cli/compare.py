"""`rtresnet compare`: agreement of two artifacts on the same images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.reporter import plural
from rtresnet.data import DATA_HELP
from rtresnet.reporting import predictions
from rtresnet.workflows.compare import CompareConfig, CompareResult, compare
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig

if TYPE_CHECKING:
    from rtresnet.workflows.detect_compare import CompareDetectorsResult


@click.command("compare")
@click.argument("reference")
@click.argument("candidate")
@click.option("--data", required=True, help=f"Images to run: {DATA_HELP}")
@config_options(CompareConfig)
@config_options(InputConfig, argument="stated")
@config_options(RuntimeConfig, argument="runtime", leave_out=("contexts", "graphs"))
@common.report_option("the images whose class changes, with both predictions")
@common.json_option
def command(
    reference: str,
    candidate: str,
    data: str,
    config: CompareConfig,
    stated: InputConfig,
    runtime: RuntimeConfig,
    report: Path | None,
) -> None:
    """Measure agreement of two artifacts: top-1, largest and relative difference of logits.

    A file that outputs only the most probable classes is compared by its top-1. --size, --mean,
    --std and --preset apply to artifacts without a sidecar. Two detectors are compared by their
    detections; images with boxes (voc:DIR[:SPLIT], coco:JSON:IMAGES, shapes:N) also give the
    average precision of both.
    """
    result = compare(
        reference, candidate, data, config, runtime=runtime, stated=stated, reporter=common.REPORTER
    )
    common.show(predictions.comparison_lines(result))
    if report is not None:
        common.say(f"page: {_write_page(report, result, config.split)}")
    common.write_json("compare", result)


def _write_page(folder: Path, result: CompareResult | CompareDetectorsResult, split: str) -> Path:
    from rtresnet.reporting import detection, pages
    from rtresnet.workflows import detect_compare, gallery

    if not isinstance(result, CompareResult):
        return detection.write_comparison(folder, result, detect_compare.pictures(result))
    one, other = Path(result.reference.artifact).name, Path(result.candidate.artifact).name
    summary = [
        f"{other} predicts a different class than {one} for {result.changed:,} of "
        f"{plural(result.n, 'image')} of {result.data}: agreement {100 * result.agreement:.2f} %."
    ]
    if len(result.flips) < result.changed:
        summary.append(f"{len(result.flips)} of them are shown, sorted by confidence.")
    images = gallery.from_data(result.data, split, [flip.index for flip in result.flips])
    return pages.write_flips(
        folder, result.flips, images, title=f"{other} against {one}", summary=summary
    )
