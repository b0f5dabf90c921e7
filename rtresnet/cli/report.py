"""`rtresnet report`: what was measured, as one page for people and Markdown for a pull request."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common
from rtresnet.core.errors import InputError
from rtresnet.core.terminal import escape

if TYPE_CHECKING:
    from rtresnet.reporting.results import Gathered

DEFAULT = "engines"


def page_place(context: click.Context, option: click.Parameter, given: Any) -> Any:
    """An option's callback: `common.text_place`, and no name of a result."""
    if given is not None and Path(given).suffix.lower() == ".json":
        raise InputError(f"{given}: the name of a result, and this is a page", fix="name it .html")
    return common.text_place(context, option, given)


@click.command("report", short_help="Make one page of what was measured.")
@click.argument("results", nargs=-1, metavar="[RESULTS.json|ARTIFACT|FOLDER...]")
@click.option(
    "--out", type=click.Path(path_type=Path), default="report.html", show_default=True,
    callback=page_place,
)  # fmt: skip
@click.option(
    "--markdown",
    metavar="FILE",
    callback=page_place,
    help="The same as Markdown too (- for stdout).",
)
def command(results: tuple[str, ...], out: Path, markdown: str | None) -> None:
    """Make one self-contained HTML page of what was measured.

    RESULTS are files that bench, eval, compare, profile or quickstart wrote with --json;
    artifacts bring what their sidecars know. Without any, the folder engines/ is taken.
    """
    from rtresnet.core import atomic_io
    from rtresnet.reporting import markdown as markdown_report
    from rtresnet.reporting import result_page, result_tables
    from rtresnet.reporting import results as reading

    if not results and not Path(DEFAULT).is_dir():
        raise InputError(
            f"nothing to report: no {DEFAULT}/ here",
            fix="write results with: rtresnet bench ARTIFACT... --json bench.json",
        )
    if markdown not in (None, "-") and Path(str(markdown)).resolve() == Path(out).resolve():
        raise InputError(f"{out}: --out and --markdown name one file", fix="choose two names")
    found = reading.gather(results or (DEFAULT,))
    text = result_page.html(found, list(_engines(found)))
    atomic_io.write_text(out, text)
    rendered = markdown_report.render(found) if markdown else ""
    if markdown == "-":
        click.echo(escape(rendered), nl=False)
    elif markdown:
        atomic_io.write_text(markdown, rendered)
    console = common.err_console() if markdown == "-" else common.out_console()
    for line in (*result_tables.summary(found), *result_tables.remarks(found)):
        console.print(line, soft_wrap=True, markup=False)
    console.print(
        f"page: {out}, {len(text) / 1e3:.0f} kB: {len(found.artifacts)} artifacts, "
        f"{len(found.timings)} latencies, {len(found.profiles)} profiles"
        + (f", {len(found.searches)} searches" if found.searches else ""),
        soft_wrap=True, markup=False,
    )  # fmt: skip


def _engines(found: Gathered) -> Iterator[tuple[str, str]]:
    """A caption and a picture of every plan whose layers were kept; notes where they are gone."""
    from rtresnet.builder import layers
    from rtresnet.core import artifacts
    from rtresnet.reporting import engine_graph

    for artifact in found.artifacts:
        if not artifact.chain or artifact.chain[0][-1] != "ok":  # gone, or not what it was
            continue
        sidecar = artifacts.read_sidecar(artifact.path)
        if sidecar is None or sidecar.plan is None or sidecar.plan.layers is None:
            continue
        file = sidecar.plan.layers.file
        if not (artifact.path.parent / file).exists():
            found.notes.append(f"The layers of {artifact.name} are not shown: {file} is not there.")
            continue
        engine = dataclasses.asdict(layers.load(artifact.path, sidecar))
        yield (
            f"The fused layers of {artifact.name}, in the order of execution.",
            engine_graph.draw(engine, artifact.name),
        )
