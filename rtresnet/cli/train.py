"""`rtresnet train`: images to a checkpoint."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import click

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.train import TrainConfig, TrainResult


@click.command("train")
@config_options(TrainConfig)
@config_options(InputConfig, argument="stated")
@common.json_option
def command(config: TrainConfig, stated: InputConfig, json_file: str | None) -> None:
    """Train a net; the test split is used once, at the end.

    Before the first epoch the images are checked: counts per class, broken files, identical images
    in two splits. All broken files are listed, also in broken.txt in the run's folder.

    Writes best.pt, last.pt, log.jsonl, curves.png and index.html into the run's folder. Several
    GPUs: torchrun --nproc-per-node N -m rtresnet train ...
    """
    from rtresnet.cli.console import REPORTER
    from rtresnet.workflows.train import train

    result = train(config, stated=stated, reporter=REPORTER)
    if result.is_main:
        result = dataclasses.replace(result, page=show(result))
        if result.page:
            common.say(f"page: {result.page}")
        precision = " --int8" if result.recipe.qat else ""
        weights = shlex.quote(str(result.checkpoint))
        common.say(f"next: rtresnet export --weights {weights}{precision}")
        common.write_json(json_file, "train", result)


def show(result: TrainResult) -> Path | None:
    """Prints the accuracy; writes the curves and the page.

    Returns:
        The page; None where matplotlib is not installed.
    """
    from rtresnet.core import hardware

    measured = result.measured
    held_out = ""
    if measured.val_top1 is not None:
        held_out = f", val {measured.val_top1:.2f} % of {measured.val_n}"
    rounded = "in INT8, " if result.recipe.qat else ""
    common.say(
        f"{result.checkpoint}: {rounded}test top-1 {measured.test_top1:.2f} % of "
        f"{measured.test_n} images (epoch {measured.epoch}{held_out})"
    )
    if not hardware.installed("matplotlib"):
        common.note("no curves and no page: pip install 'rtresnet[report]'")
        return None
    from rtresnet.reporting import pages

    return pages.write_training(result)
