"""`rtresnet data`: what a data set contains, before training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import numpy as np

from rtresnet.cli import common
from rtresnet.cli.options import config_options
from rtresnet.core.reporter import escape_cell, plural
from rtresnet.workflows.data import DataInspectConfig, DataInspectResult, inspect_data

SMALL_IMAGE = 64  # median height, in pixels
LISTED = 10  # pairs and files that are printed; --json has all


@click.command("data")
@click.argument("source")
@config_options(DataInspectConfig)
@click.option(
    "--model",
    help="Net whose augmented training images the page shows.  [default: resnet20 for images up to "
    "64 pixels, else resnet18]",
)
@click.option(
    "--recipe", help="Recipe of the augmentation that the page shows.  [default: that of train]"
)
@common.report_option("counts, sizes, duplicates, samples and an augmented batch")
@common.json_option
def command(
    source: str,
    config: DataInspectConfig,
    model: str | None,
    recipe: str | None,
    report: Path | None,
    json_file: str | None,
) -> None:
    """Decode every image of a data set and show counts, sizes, broken files and duplicates.

    Near-duplicates are copies of a picture at another size, compression or brightness. Duplicates
    in the training and the test split make the test accuracy too high.
    """
    from rtresnet.cli.console import REPORTER

    result = inspect_data(source, config, reporter=REPORTER)
    for line in lines(result):
        common.say(line)
    if report is not None:
        common.say(f"page: {_write_page(report, result, model, recipe)}")
    common.write_json(json_file, "data", result)


def _write_page(
    folder: Path, result: DataInspectResult, model: str | None, recipe: str | None
) -> Path:
    from rtresnet.reporting import pages
    from rtresnet.workflows import gallery
    from rtresnet.workflows.data import augmented_batch
    from rtresnet.workflows.train import TrainConfig

    heights = result.splits[0].heights
    small = not heights or heights[2] <= SMALL_IMAGE
    config = TrainConfig(
        data=result.data, model=model or ("resnet20" if small else "resnet18"), recipe=recipe
    )
    batch = augmented_batch(config)
    images = {
        (split, index): image
        for split, indices in pages.data_images(result).items()
        for index, image in gallery.from_data(result.data, split, indices).items()
    }
    pixels = np.stack([gallery.shrink(image) for image in batch.pixels])
    batch = dataclasses.replace(batch, pixels=pixels)
    return pages.write_data(folder, result, images, batch)


def lines(result: DataInspectResult) -> list[str]:
    """Describe a data set, a line for each fact."""
    shown = []
    for split in result.splits:
        present = [count for count in split.counts if count]
        shown.append(
            f"{split.name}: {plural(split.images, 'image')}, {plural(len(present), 'class')}, "
            f"{min(present, default=0):,} to {max(present, default=0):,} per class"
        )
        if split.images:
            shown.append(
                f"  width {split.widths[0]} to {split.widths[-1]} (median {split.widths[2]}), "
                f"height {split.heights[0]} to {split.heights[-1]} (median {split.heights[2]}) px"
            )
        if split.transparent:
            shown.append(f"  {plural(split.transparent, 'image')} with transparency")
        if split.coarse:
            shown.append(
                f"  {plural(split.coarse, 'image')} with no more detail than 16x16 pixels: two of "
                "them are near-duplicates only if they are almost equal"
            )
        shown += [f"  broken: {escape_cell(line)}" for line in split.broken[:LISTED]]
        if len(split.broken) > LISTED:
            shown.append(f"  broken: {len(split.broken) - LISTED} more (see --json)")
    across = len(result.across())
    shown.append(
        f"{plural(len(result.duplicates), 'duplicate pair')}, {across} of them across splits"
    )
    for pair in sorted(result.duplicates, key=lambda p: p.first.split == p.second.split)[:LISTED]:
        kind = "identical" if pair.exact else "near-duplicate"
        first, second = (escape_cell(image.place) for image in (pair.first, pair.second))
        shown.append(f"  {kind}: {pair.first.split} {first} = {pair.second.split} {second}")
    return shown
