"""`rtresnet data`: the content of a data set, before training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import numpy as np

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.reporting import predictions
from rtresnet.workflows.data import DataInspectConfig, DataInspectResult, inspect_data


@click.command("data")
@click.argument("source")
@config_options(DataInspectConfig)
@click.option(
    "--model",
    help="Net whose augmented training images the page shows.  [default: the net of train]",
)
@click.option(
    "--recipe",
    help="Recipe of the augmentation that the page shows.  [default: the recipe of train]",
)
@common.report_option("counts, sizes, duplicates, samples and an augmented batch")
@common.json_option
def command(
    source: str,
    config: DataInspectConfig,
    model: str | None,
    recipe: str | None,
    report: Path | None,
) -> None:
    """Decode every image of a data set and show counts, sizes, broken files and duplicates.

    Near-duplicates are copies with a different size, compression or brightness. Duplicates
    in the training and the test split make the test accuracy too high.
    """
    result = inspect_data(source, config, reporter=common.REPORTER)
    common.show(predictions.data_lines(result))
    if report is not None:
        common.say(f"page: {_write_page(report, result, model, recipe)}")
    common.write_json("data", result)


def _write_page(
    folder: Path, result: DataInspectResult, model: str | None, recipe: str | None
) -> Path:
    from rtresnet.reporting import pages
    from rtresnet.workflows import gallery
    from rtresnet.workflows.data import augmented_batch
    from rtresnet.workflows.train_job import TrainConfig

    batch = augmented_batch(TrainConfig(data=result.data, model=model, recipe=recipe))
    images = {
        (split, index): image
        for split, indices in pages.data_images(result).items()
        for index, image in gallery.from_data(result.data, split, indices).items()
    }
    pixels = np.stack([gallery.shrink(image) for image in batch.pixels])
    batch = dataclasses.replace(batch, pixels=pixels)
    return pages.write_data(folder, result, images, batch)
