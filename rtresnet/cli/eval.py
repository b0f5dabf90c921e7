"""`rtresnet eval`: accuracy of a checkpoint, an ONNX file or a plan on labelled images."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import click

from rtresnet.cli import common


@click.command("eval", short_help="Measure top-1 and top-5 accuracy.")
@click.argument("artifact")
@click.option("--data", required=True, help=common.DATA_HELP)
@click.option(
    "--split",
    type=click.Choice(("train", "test", "all")),
    default="test",
    show_default=True,
    help="A set that came undivided is evaluated whole.",
)
@click.option("--batch", type=click.IntRange(min=1), help="Images at a time.")
@click.option("--model", help="The net of a foreign checkpoint [recognized].")
@common.input_options
@common.device_options
@common.json_option
def command(
    artifact: str, data: str, split: str, batch: int | None, json_file: str | None, **options: Any
) -> None:
    """Measure top-1 (and top-5 above five classes), single centre crop."""
    result = run(artifact, data, split=split, batch=batch, **options)
    top5 = "" if result["top5"] is None else f", top-5 {result['top5_percent']:.2f} %"
    skipped = f", {len(result['skipped'])} skipped" if result["skipped"] else ""
    common.out_console().print(
        f"{artifact}: top-1 {result['top1_percent']:.2f} % ({result['top1']} of {result['n']})"
        f"{top5}{skipped}  [{result['precision']}, {result['provider']}]",
        soft_wrap=True,
        markup=False,
    )
    common.write_json(json_file, "eval", result)


def run(
    artifact: str, data: str, *, split: str = "test", batch: int | None = None, **options: Any
) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes."""
    from rtresnet import artifacts
    from rtresnet.data import loader
    from rtresnet.data.sources import open_source
    from rtresnet.train.evaluate import evaluate

    opened = common.open_artifact(artifact, **options)
    source = open_source(data, split)
    tally = loader.Tally(len(source), common.note)
    fits = len(source.classes) == len(opened.classes)
    if not fits:
        common.note(
            f"note: the data has {len(source.classes)} classes and the net {len(opened.classes)}"
        )
    with contextlib.closing(opened), common.progress(f"evaluating {artifact}"):
        accuracy = evaluate(opened.forward, source, opened.preprocess, batch=batch, tally=tally)
    measured = dataclasses.asdict(accuracy) | {
        "top1_percent": accuracy.top1_percent,
        "top5_percent": accuracy.top5_percent,
    }
    about = {"data": data, "split": split if source.splits else "all"}
    if fits and not any(options.get(name) for name in ("size", "mean", "std")):
        artifacts.update_measured(artifact, accuracy=measured | about)
    return (
        {"artifact": artifact, "precision": opened.precision}
        | measured
        | about
        | {"skipped": list(tally.skipped.values())}
        | opened.where
    )
