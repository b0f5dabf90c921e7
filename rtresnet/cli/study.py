"""`rtresnet study`: the paper's own analyses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rtresnet.cli import common, study_compare, study_show


@click.group("study")
def command() -> None:
    """The paper's analyses, on any net and any data."""


command.add_command(study_compare.degradation)
command.add_command(study_compare.shortcuts)


@command.command("responses")
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--data", required=True, help=common.DATA_HELP)
@click.option("--images", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/study-responses"),
    show_default=True,
    help="Folder of figure and page.",
)
@common.json_option
def responses(
    checkpoints: tuple[str, ...], data: str, images: int, out: Path, json_file: str | None
) -> None:
    """Standard deviation of each 3x3 layer's response (figure 7).

    After batch norm, before ReLU and addition: how strongly a layer changes its input.
    """
    common.require_torch("the analysis of responses")
    from rtresnet.core import artifacts, atomic_io
    from rtresnet.data import loader
    from rtresnet.data.sources import open_source
    from rtresnet.models import checkpoint
    from rtresnet.reporting import page, study_page, tables
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
                "assumed": list(loaded.assumed),
                "responses": deviations,
            }
        )
    console, headings = common.out_console(), ("layer", "name", "std of response")
    parts = []
    for entry in results:
        rows = [
            (index + 1, name, value)
            for index, (name, value) in enumerate(entry["responses"].items())
        ]
        title = f"{entry['model']}, {entry['checkpoint']}, {entry['n']} images of {data}"
        tables.show(console, headings, rows, title=title)
        parts += [page.heading(title), page.table(headings, rows)]
    common.footer(
        f"Assumed of {e['checkpoint']}: {line}." for e in results for line in e["assumed"]
    )
    study_page.write(
        atomic_io.make_folder(out),
        "responses",
        title="Layer responses",
        drawn=study_show.response_figure(
            results, f"{len(chosen)} images of {study_show.short(data)}"
        ),
        about="Standard deviation of what each 3x3 layer puts out, after batch norm, before ReLU "
        "and addition.",
        parts=[*parts, page.code(artifacts.provenance()["command"])],
    )
    common.write_json(str(out / "responses.json"), "study responses", {"results": results})
    common.note(f"page: {out / 'index.html'}")
    common.write_json(json_file, "study responses", {"results": results})
