"""`rtresnet compare`: agreement of two artifacts on the same images."""

from __future__ import annotations

from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.errors import InputError
from rtresnet.core.reporter import plural
from rtresnet.reporting import predictions
from rtresnet.reporting.tables import assumed
from rtresnet.workflows.compare import CompareConfig, CompareResult, compare
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig


@click.command("compare")
@click.argument("reference")
@click.argument("candidate")
@click.option("--data", required=True, help=f"Images to run: {common.DATA_HELP}")
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
    detections; on images with boxes (voc:DIR[:SPLIT], coco:JSON:IMAGES, shapes:N) by average
    precision as well.
    """
    from rtresnet.workflows.detect import is_detector

    detectors = [is_detector(path) for path in (reference, candidate)]
    if any(detectors):
        if not all(detectors):
            other = (reference, candidate)[detectors.index(False)]
            raise InputError(
                f"{other}: a classifier, which cannot be compared with a detector",
                fix="name two detectors",
            )
        _compare_detectors(reference, candidate, data, config, stated, runtime, report)
        return
    result = compare(
        reference, candidate, data, config, runtime=runtime, stated=stated, reporter=common.REPORTER
    )
    difference = "logits unknown"
    if result.largest is not None:
        difference = f"largest difference {result.largest:.3g}, relative {result.relative:.2e}"
    common.say(
        f"{candidate} against {reference}: agreement {100 * result.agreement:.2f} % of "
        f"{plural(result.n, 'image')}, {difference}"
    )
    if report is not None:
        common.say(f"page: {_write_page(report, result, config.split)}")
    both = (result.reference, result.candidate)
    common.show(sorted({note for entry in both for note in entry.runtime.notes}))
    for entry in both:
        common.show(assumed(entry.assumed, of=entry.artifact))
    common.show(assumed(result.assumed))
    common.write_json("compare", result)


def _compare_detectors(
    reference: str,
    candidate: str,
    data: str,
    config: CompareConfig,
    stated: InputConfig,
    runtime: RuntimeConfig,
    report: Path | None,
) -> None:
    from rtresnet.workflows import detect_compare

    common.refuse_for_detector(config, "split")
    assert config.split != "all"
    result = detect_compare.compare_detectors(
        reference, candidate, data, split=config.split, runtime=runtime, stated=stated,
        reporter=common.REPORTER,
    )  # fmt: skip
    common.show(predictions.detector_comparison_lines(result))
    if report is not None:
        from rtresnet.reporting import detection

        page = detection.write_comparison(report, result, detect_compare.pictures(result))
        common.say(f"page: {page}")
    common.write_json("compare", result)


def _write_page(folder: Path, result: CompareResult, split: str) -> Path:
    from rtresnet.reporting import pages
    from rtresnet.workflows import gallery

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
