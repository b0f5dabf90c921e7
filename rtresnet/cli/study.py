"""`rtresnet study`: the paper's own analyses."""

from __future__ import annotations

from typing import Any

import click

from rtresnet.cli import common


@click.group("study")
def command() -> None:
    """The paper's analyses, on any net and any data."""


@command.command("responses")
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--data", required=True, help=common.DATA_HELP)
@click.option("--images", type=click.IntRange(min=1), default=256, show_default=True)
@common.json_option
def responses(checkpoints: tuple[str, ...], data: str, images: int, json_file: str | None) -> None:
    """Standard deviation of each 3x3 layer's response (figure 7).

    After batch norm, before ReLU and addition: how strongly a layer changes its input.
    """
    common.require_torch("the analysis of responses")
    from rtresnet.data import loader
    from rtresnet.data.sources import open_source
    from rtresnet.models import checkpoint
    from rtresnet.report import tables
    from rtresnet.study.responses import layer_responses

    source = open_source(data, "test")
    chosen = loader.sample(source, images)
    results: list[dict[str, Any]] = []
    for path in checkpoints:
        loaded = checkpoint.load(path)
        size = loader.batch_size(loaded.input)
        found = loader.batches(source, loaded.input, size, indices=chosen)
        with common.progress(f"responses of {path}"):
            deviations = layer_responses(loaded.net(), (pixels for pixels, _ in found))
        results.append(
            {
                "checkpoint": path,
                "model": loaded.model.architecture,
                "n": len(chosen),
                "responses": deviations,
            }
        )
    console = common.out_console()
    for entry in results:
        rows = [
            (index + 1, name, value)
            for index, (name, value) in enumerate(entry["responses"].items())
        ]
        title = f"{entry['model']}, {entry['checkpoint']}, {entry['n']} images of {data}"
        tables.show(console, ("layer", "name", "std of response"), rows, title=title)
    common.write_json(json_file, "study responses", {"results": results})
