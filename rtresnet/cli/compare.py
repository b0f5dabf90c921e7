"""`rtresnet compare`: do two artifacts say the same of the same images?"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import click

from rtresnet.cli import common
from rtresnet.errors import DataError, InputError


@click.command("compare", short_help="Measure how far two artifacts agree.")
@click.argument("reference")
@click.argument("candidate")
@click.option("--data", required=True, help=common.DATA_HELP)
@click.option(
    "--split", type=click.Choice(("train", "test", "all")), default="test", show_default=True
)
@click.option("--batch", type=click.IntRange(min=1), help="Images at a time.")
@common.device_options
@common.json_option
def command(
    reference: str,
    candidate: str,
    data: str,
    split: str,
    batch: int | None,
    json_file: str | None,
    **options: Any,
) -> None:
    """Measure agreement of two artifacts: top-1, largest and relative difference of logits."""
    result = run(reference, candidate, data, split=split, batch=batch, **options)
    common.out_console().print(
        f"{candidate} against {reference}: agreement {100 * result['agreement']:.2f} % of "
        f"{result['n']} images, largest difference {result['largest']:.3g}, relative "
        f"{result['relative']:.2e}",
        soft_wrap=True,
        markup=False,
    )
    common.write_json(json_file, "compare", result)


def run(
    reference: str,
    candidate: str,
    data: str,
    *,
    split: str = "test",
    batch: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes."""
    import numpy as np

    from rtresnet import metrics
    from rtresnet.data import loader
    from rtresnet.data.sources import open_source

    source = open_source(data, split)
    logits, where = [], []
    for path in (reference, candidate):
        opened = common.open_artifact(path, **options)
        found = loader.batches(
            source,
            opened.preprocess,
            batch or loader.batch_size(opened.preprocess),
            tally=loader.Tally(len(source), common.note),
        )
        with contextlib.closing(opened), common.progress(f"running {path}"):
            parts = [opened.forward(images) for images, _ in found]
        if not parts:
            raise DataError(f"{data}: no image could be decoded")
        logits.append(np.concatenate(parts))
        where.append(opened.where | {"artifact": path, "precision": opened.precision})
    if logits[0].shape != logits[1].shape:
        raise InputError(
            f"{reference} has {logits[0].shape[1]} classes and {candidate} {logits[1].shape[1]}"
        )
    parity = metrics.parity(logits[0], logits[1])
    return dataclasses.asdict(parity) | {"data": data, "reference": where[0], "candidate": where[1]}
