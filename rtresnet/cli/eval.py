"""`rtresnet eval`: accuracy of a checkpoint, an ONNX file or a plan on labelled images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.errors import InputError
from rtresnet.data import DATA_HELP
from rtresnet.reporting import predictions
from rtresnet.workflows.evaluate import (
    EvaluateConfig,
    EvaluateResult,
    evaluate,
    record_accuracy,
)
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig


@click.command("eval")
@click.argument("paths", nargs=-1, required=True, metavar="ARTIFACT...")
@click.option("--data", required=True, help=f"Labelled images: {DATA_HELP}")
@config_options(EvaluateConfig)
@click.option(
    "--record/--no-record",
    default=None,
    help="Write the accuracy into the artifact's sidecar.  [default: if possible]",
)
@config_options(InputConfig, argument="stated")
@config_options(RuntimeConfig, argument="runtime", leave_out=("contexts", "graphs"))
@common.report_option(
    "confusion matrix, precision and recall per class, calibration, galleries of mistakes"
)
@common.json_option
def command(
    paths: tuple[str, ...],
    data: str,
    config: EvaluateConfig,
    record: bool | None,
    stated: InputConfig,
    runtime: RuntimeConfig,
    report: Path | None,
) -> None:
    """Measure top-1 accuracy, and top-5 for more than five classes.

    Several artifacts form an ensemble: their probabilities are averaged, image by image. For a
    detector, the average precision on images with boxes is measured: voc:DIR[:SPLIT],
    coco:JSON:IMAGES or shapes:N.
    """
    from rtresnet.workflows.detect import is_detector

    if any(is_detector(path) for path in paths):
        _evaluate_detector(paths, data, config, record, stated, runtime, report)
        return

    if report is not None:
        config = dataclasses.replace(config, details=True)
    result = evaluate(paths, data, config, runtime=runtime, stated=stated, reporter=common.REPORTER)
    common.show(predictions.accuracy_lines(result))
    if report is not None:
        common.say(f"page: {_write_page(report, result)}")
    common.write_json("eval", result)
    if record is not False:
        record_accuracy(result, required=bool(record), reporter=common.REPORTER)


def _evaluate_detector(
    paths: tuple[str, ...],
    data: str,
    config: EvaluateConfig,
    record: bool | None,
    stated: InputConfig,
    runtime: RuntimeConfig,
    report: Path | None,
) -> None:
    from rtresnet.workflows import detect_evaluate

    if len(paths) > 1:
        raise InputError("detectors cannot form an ensemble", fix="evaluate one at a time")
    result = detect_evaluate.evaluate_detector(
        paths[0], data, split=config.detector_split("details"), runtime=runtime, stated=stated,
        record=False, details=config.details or report is not None,
        reporter=common.REPORTER,
    )  # fmt: skip
    common.show(predictions.detector_lines(result))
    if report is not None:
        from rtresnet.reporting import detection

        page = detection.write_detection(report, result, detect_evaluate.pictures(result))
        common.say(f"page: {page}")
    common.write_json("eval", result)
    if record is not False:
        detect_evaluate.record_average_precision(
            result, required=bool(record), reporter=common.REPORTER
        )


def _write_page(folder: Path, result: EvaluateResult) -> Path:
    from rtresnet.reporting import classification, pages
    from rtresnet.workflows import gallery

    assert result.report is not None
    listed = classification.listed(result.report)
    images = gallery.from_data(result.data, result.split, listed)
    return pages.write_evaluation(folder, result, images)
