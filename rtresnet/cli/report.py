"""`rtresnet report`: results as an HTML page, and as Markdown for pull requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rtresnet.cli import common
from rtresnet.cli.console import Console
from rtresnet.core import atomic_io
from rtresnet.core.errors import InputError
from rtresnet.core.reporter import escape


def page_path(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """Validate an output path as `common.text_place` does; reject the name of a result file."""
    if value is not None and Path(value).suffix.lower() == ".json":
        raise InputError(f"{value}: must end in .html", fix="use the suffix .html")
    return common.text_place(context, option, value)


@click.command("report")
@click.argument("results", nargs=-1, metavar="[RESULTS.json|ARTIFACT|FOLDER...]")
@click.option(
    "--out",
    type=common.PATH,
    default="report.html",
    callback=page_path,
    help="HTML file to write.  [default: report.html]",
)
@click.option(
    "--markdown",
    metavar="FILE",
    callback=page_path,
    help="Also write the tables as Markdown; - writes them to stdout.  [default: none]",
)
def command(results: tuple[str, ...], out: Path, markdown: str | None) -> None:
    """Create one self-contained HTML page from results.

    RESULTS are files that bench, eval, compare, profile, estimate or quickstart wrote with --json;
    artifacts are shown with what their sidecars record. The default is the folder engines/.
    """
    from rtresnet.reporting.report import report

    if markdown not in (None, "-") and Path(str(markdown)).resolve() == Path(out).resolve():
        raise InputError(f"{out}: --out and --markdown name the same file", fix="choose two names")
    result = report(results, out)
    if markdown == "-":
        click.echo(escape(result.markdown), nl=False)
    elif markdown:
        atomic_io.write_text(markdown, result.markdown)
    console = Console(stderr=markdown == "-")
    searches = f", {result.searches} searches" if result.searches else ""
    for line in (
        *result.summary,
        f"page: {out}, {result.bytes / 1e3:.0f} kB: {result.artifacts} artifacts, "
        f"{result.latencies} latencies, {result.profiles} profiles{searches}",
    ):
        console.print(line, soft_wrap=True, markup=False)
