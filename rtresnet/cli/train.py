"""`rtresnet train`: images to a checkpoint."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core import hardware
from rtresnet.core.errors import InputError
from rtresnet.reporting import predictions
from rtresnet.workflows.detect_train import TrainDetectorConfig
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.train import TrainResult, train
from rtresnet.workflows.train_job import TrainConfig

ONLY_DETECT = ("backbone", "test_data")


def _read_file(
    context: click.Context, option: click.Parameter, path: str | None
) -> tuple[str, ...]:
    """Make the options of a file the defaults; return its recipe settings."""
    if path is None:
        return ()
    from rtresnet.workflows.config_file import changed_options, read_config

    content = read_config(path)
    context.default_map = {**changed_options(content.train), **changed_options(content.stated)}
    return content.train.settings


@click.command("train")
@click.option(
    "--task",
    type=click.Choice(["classify", "detect"]),
    default="classify",
    help="Task of the net; detect trains a Faster R-CNN.  [default: classify]",
)
@click.option(
    "--config",
    "from_file",
    metavar="FILE",
    is_eager=True,
    callback=_read_file,
    help="TOML file with options of train and a table [recipe], such as a run's config.toml; the "
    "command line overrides it.  [default: none]",
)
@config_options(TrainConfig)
@config_options(
    TrainDetectorConfig,
    argument="detector",
    leave_out=[
        f.name for f in dataclasses.fields(TrainDetectorConfig) if f.name not in ONLY_DETECT
    ],
)
@config_options(
    InputConfig,
    argument="stated",
    default_texts={
        "size": "from --weights, or the net's",
        "mean": "from --weights, or ImageNet's",
        "std": "from --weights, or ImageNet's",
        "interpolation": "from --weights, or bilinear",
    },
)
@common.json_option
def command(
    from_file: tuple[str, ...],
    task: str,
    config: TrainConfig,
    detector: TrainDetectorConfig,
    stated: InputConfig,
) -> None:
    """Train a net, and evaluate it on the test split once, at the end.

    Before the first epoch the images are checked: counts per class, broken files, identical images
    in two splits. All broken files are listed, also in broken.txt in the run's folder.

    Writes best.pt, last.pt, log.jsonl, config.toml, curves.png and index.html into the run's
    folder. Several GPUs: torchrun --nproc-per-node N -m rtresnet train ...

    With --task detect, --data is voc:DIR[:SPLIT], coco:JSON:IMAGES or shapes:N, --weights may be
    imagenet, and --set also takes fields of the net, such as anchors.
    """
    if task == "detect" or _resumes_detector(config):
        if click.get_current_context().default_map:
            raise InputError("--config needs --task classify")
        _train_detector(config, detector, stated)
        return
    if detector != TrainDetectorConfig():
        raise InputError("--backbone and --test-data need --task detect")
    config = dataclasses.replace(config, settings=(*from_file, *config.settings))
    result = train(config, stated=stated, reporter=common.REPORTER)
    if result.is_main:
        result = dataclasses.replace(result, page=show(result))
        if result.page:
            common.say(f"page: {result.page}")
        precision = f" --{result.recipe.qat_format}" if result.recipe.qat else ""
        weights = shlex.quote(str(result.checkpoint))
        common.say(f"next: rtresnet export --weights {weights}{precision}")
        common.write_json("train", result)


def _resumes_detector(config: TrainConfig) -> bool:
    from rtresnet.workflows.detect import is_detector

    return config.resume and config.out is not None and is_detector(config.out / "last.pt")


def _train_detector(
    config: TrainConfig, detector: TrainDetectorConfig, stated: InputConfig
) -> None:
    """Train a detector with the options that both tasks have.

    Raises:
        InputError: An option that detectors do not have.
    """
    from rtresnet.workflows.detect_train import train_detector

    shared = {f.name for f in dataclasses.fields(TrainDetectorConfig)} - set(ONLY_DETECT)
    default = TrainConfig()
    changed = {
        field.name: value
        for field in dataclasses.fields(TrainConfig)
        if (value := getattr(config, field.name)) != getattr(default, field.name)
    }
    if changed.pop("flip", None) is not None:
        changed["settings"] = (*config.settings, f"flip={str(config.flip).lower()}")
    if "model" in changed:
        raise InputError(
            "--model does not apply to --task detect", fix=f"use --backbone {config.model}"
        )
    if others := sorted(set(changed) - shared):
        option = others[0].replace("_", "-")
        raise InputError(f"--{option} does not apply to --task detect", fix="leave it out")
    result = train_detector(
        dataclasses.replace(detector, **changed), stated=stated, reporter=common.REPORTER
    )
    if result.measured is None:
        common.say(f"{result.checkpoint}: not tested, because there are no test images")
    else:
        common.say(f"{result.checkpoint}: test {predictions.average_precision(result.measured)}")
    common.say(f"next: rtresnet export --weights {shlex.quote(str(result.checkpoint))}")
    common.write_json("train", result)


def show(result: TrainResult) -> Path | None:
    """Print the accuracy; write the curves and the page.

    Returns:
        The page; None if matplotlib is not installed.
    """
    common.say(predictions.train_line(result))
    if not hardware.installed("matplotlib"):
        common.note("no curves and no page without matplotlib: pip install 'rtresnet[report]'")
        return None
    from rtresnet.reporting import classification, pages
    from rtresnet.workflows import gallery
    from rtresnet.workflows.train_report import classify_test_images

    if result.recipe.qat:  # tested in INT8 or FP8, which a checkpoint does not run in
        return pages.write_training(result)
    report, source = classify_test_images(result, reporter=common.REPORTER)
    images = gallery.thumbnails(source, classification.listed(report))
    return pages.write_training(result, report, images)
