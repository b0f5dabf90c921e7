"""`rtresnet predict`: the most probable classes of images, on the terminal or in a table."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import Aliased, config_options
from rtresnet.core import artifacts, atomic_io
from rtresnet.core.errors import DataError, InputError
from rtresnet.reporting import predictions
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig
from rtresnet.workflows.predict import (
    TableConfig,
    find_model,
    image_files,
    predict,
    predict_table,
)
from rtresnet.workflows.predictor import PredictConfig


@click.command("predict")
@click.argument("images", nargs=-1, required=True, metavar="[ARTIFACT] IMAGE...")
@click.option(
    "--with",
    "artifact",
    metavar="FILE",
    help="Checkpoint, ONNX file or plan to predict with; also accepted as the first argument.  "
    "[default: the only one under engines/ and runs/]",
)
@config_options(PredictConfig)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a table: *.parquet, *.csv or *.jsonl.  [default: print the classes]",
)
@click.option(
    "--draw",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write copies of the images with a detector's boxes into this folder.  [default: none]",
)
@click.option(
    "--min-score",
    "--least-score",
    "least_score",
    cls=Aliased,
    hidden_names=("--least-score",),
    type=click.FloatRange(0, 1),
    default=0.5,
    help="Lowest score of the detections that a detector lists and draws.  [default: 0.5]",
)
@click.option(
    "--explain",
    "explained",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write class activation maps of the images into this folder: the regions that support "
    "the class (residual nets; checkpoints and ONNX files).  [default: none]",
)
@config_options(TableConfig, argument="table")
@config_options(InputConfig, argument="stated")
@config_options(RuntimeConfig, argument="runtime", leave_out=("contexts", "graphs"))
@common.json_option
def command(
    images: tuple[str, ...],
    artifact: str | None,
    config: PredictConfig,
    out: Path | None,
    draw: Path | None,
    least_score: float,
    explained: Path | None,
    table: TableConfig,
    stated: InputConfig,
    runtime: RuntimeConfig,
) -> None:
    """Print the most probable classes of image files, or of every image in a folder.

    With --out FILE, the classes are written to a table, for any number of images. Resume an
    interrupted run with --resume. A broken image becomes a row with an error message. Transparent
    images are composited on white. For a detector, the objects in each image are printed.
    """
    from rtresnet.workflows.detect import is_detector

    if out is None and table != TableConfig():
        raise click.UsageError("--resume, --ray, --actors and --excel-safe need --out")
    artifact, names = _split(images, artifact)
    if explained is not None:
        if out is not None or is_detector(artifact):
            raise click.UsageError("--explain cannot be combined with --out or a detector")
        if config != PredictConfig(model=config.model):
            raise click.UsageError("--top, --batch and --workers cannot be combined with --explain")
        _explain(names, artifact, explained, config, stated)
        return
    if is_detector(artifact):
        if out is not None or config != PredictConfig():
            raise click.UsageError("--out and its options do not apply to detectors")
        _detect(names, artifact, draw, least_score, runtime, stated)
        return
    if draw is not None:
        raise click.UsageError(f"--draw needs a detector, but {artifact} is a classifier")
    if out is None:
        result = predict(
            names, artifact, config, runtime=runtime, stated=stated, reporter=common.REPORTER
        )
        if result.runtime.batch_note:
            common.note(result.runtime.batch_note)
        common.show(predictions.prediction_lines(result))
        common.write_json("predict", result)
    else:
        written = predict_table(
            names, artifact, out, config, table=table, runtime=runtime, stated=stated,
            reporter=common.REPORTER,
        )  # fmt: skip
        if written.runtime.batch_note:
            common.note(written.runtime.batch_note)
        common.show(predictions.table_lines(written))
        common.write_json("predict", written)


def _explain(
    images: Sequence[str],
    artifact: str,
    out: Path,
    config: PredictConfig,
    stated: InputConfig,
) -> None:
    from rtresnet.workflows.explain import explain

    result = explain(
        images, artifact, out, model=config.model, stated=stated, reporter=common.REPORTER
    )
    common.show(predictions.explain_lines(result))
    common.write_json("explain", result)


def _detect(
    images: Sequence[str],
    artifact: str,
    draw: Path | None,
    least_score: float,
    runtime: RuntimeConfig,
    stated: InputConfig,
) -> None:
    from rtresnet.workflows.detect_predict import detect

    result = detect(
        images, artifact, draw=draw, least_score=least_score, runtime=runtime, stated=stated,
        reporter=common.REPORTER,
    )  # fmt: skip
    common.show(predictions.detection_lines(result))
    if draw is not None:
        common.say(f"Images with boxes are in {draw}.")
    common.write_json("predict", result)


def _split(arguments: Sequence[str], artifact: str | None) -> tuple[str, Sequence[str]]:
    """Separate the artifact, which can be the first argument, from the images.

    Raises:
        InputError: A model among the images, a model that does not exist, or no model or several
            to choose from.
        DataError: An artifact and no images.
    """
    if artifact is None and _is_model(arguments[0]):
        artifact, arguments = arguments[0], arguments[1:]
        atomic_io.require_file(artifact)
        if not arguments:
            raise DataError(
                f"no images to predict with {artifact}", fix="name image files or a folder"
            )
    if models := [name for name in arguments if _is_model(name)]:
        raise _model_among_images(models[0], artifact, arguments)
    if artifact is None:
        arguments = image_files(arguments)
        artifact = str(find_model())
        common.note(f"with {artifact}, the only model under engines/ and runs/")
    return artifact, arguments


def _is_model(name: str) -> bool:
    return Path(name).suffix.lower() in artifacts.SUFFIXES and not Path(name).is_dir()


def _model_among_images(model: str, artifact: str | None, arguments: Sequence[str]) -> InputError:
    if artifact is not None:
        return InputError(
            f"{model}: is a model, not an image; {artifact} is the model to run",
            fix="predict with one model at a time",
        )
    images = [name for name in arguments if not _is_model(name)]
    return InputError(
        f"{model}: is a model, not an image",
        fix=f"name the model first: rtresnet predict {shlex.join([model, *images[:1]])}"
        + (" ..." if len(images) > 1 else ""),
    )
