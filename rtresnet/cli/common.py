"""Options and output functions that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from rtresnet.cli.console import Console, TerminalReporter
from rtresnet.core import atomic_io, provenance
from rtresnet.core.errors import InputError
from rtresnet.core.reporter import escape_cell
from rtresnet.reporting import tables

SCHEMA = 1  # version of the --json format; see docs/reference/json.md
JSON_FILE = "rtresnet.json_file"  # where `--json` is kept in the context of click
REPORTER = TerminalReporter()
PATH = click.Path(path_type=Path)
F = TypeVar("F", bound=Callable[..., Any])


def text_place(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """Validate a text file's output path before its content is computed (option callback).

    Raises:
        InputError: The path is not writable, or it is the name of an image or of a net's
            sidecar.
    """
    if value is not None and str(value) != "-":
        from rtresnet.data.sources import IMAGE_SUFFIXES

        place = Path(value)
        if place.suffix.lower() in IMAGE_SUFFIXES:
            raise InputError(f"{place}: has the suffix of an image file", fix="choose another name")
        if place.suffix.lower() == ".json" and place.with_suffix("").suffix in atomic_io.NETS:
            raise InputError(
                f"{place}: is the name of {place.stem}'s sidecar", fix="choose another name"
            )
        if not place.is_fifo() and not place.is_char_device():
            atomic_io.require_text_place(place)
    return value


def json_option(function: F) -> F:
    """Add `--json FILE`, which writes the result as JSON; see `write_json`."""

    def keep(context: click.Context, option: click.Parameter, value: str | None) -> None:
        context.meta[JSON_FILE] = text_place(context, option, value)

    return click.option(
        "--json",
        metavar="FILE",
        callback=keep,
        expose_value=False,
        help="Also write the result as JSON; - writes it to stdout and the tables to stderr.  "
        "[default: none]",
    )(function)


def page_folder(
    context: click.Context, option: click.Parameter, folder: Path | None
) -> Path | None:
    """Check an option's folder for a page before the work that the page shows.

    Raises:
        InputError: No page can be written there.
        UnavailableError: A package that writes pages is not installed.
    """
    if folder is not None:
        from rtresnet.reporting import pages

        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: exists and is not a folder", fix="choose another folder")
        atomic_io.require_text_place(folder / "index.html")
        pages.require_packages()
    return folder


def report_option(content: str) -> Callable[[F], F]:
    """Return the option `--report DIR` for a page with `content`; its value is a path or None."""
    return click.option(
        "--report",
        type=PATH,
        metavar="DIR",
        callback=page_folder,
        help=f"Write DIR/index.html, a page that works offline: {content}.  [default: none]",
    )


def classes_option(function: F) -> F:
    """Return the option `--classes FILE`; its value is a tuple of names."""
    return click.option(
        "--classes",
        metavar="FILE",
        callback=_class_names,
        help="Class names in the order of the outputs, one per line or a JSON list.  [default: "
        "numbers]",
    )(function)


def _class_names(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    from rtresnet.core.labels import read_classes

    return None if value is None else read_classes(value)


def json_file() -> str | None:
    """Return what the running command was given as `--json`."""
    context = click.get_current_context(silent=True)
    return None if context is None else context.meta.get(JSON_FILE)


def out_console() -> Console:
    """Return the console of results: stdout, or stderr with `--json -`."""
    return Console(stderr=json_file() == "-")


def say(line: str) -> None:
    """Print a line of the result."""
    click.echo(escape_cell(line), err=json_file() == "-")


def show(result: Iterable[str | tables.DataTable]) -> None:
    """Print the lines and tables of a result; see `rtresnet.reporting`."""
    for part in result:
        if isinstance(part, tables.DataTable):
            tables.show(out_console(), part)
        elif part.startswith("NOTE: "):
            out_console().print(part, style="bold yellow", soft_wrap=True)
        else:
            say(part)


def note(line: str) -> None:
    """Print a line on standard error, above a progress bar if there is one."""
    REPORTER.note(line)


def write_json(verb: str, result: Any, *, file: Path | None = None) -> None:
    """Write `{"verb": ..., "made_by": ..., "result": ...}` where `--json` says, and to `file`.

    The command is also under "command"; "verb" is its name in files of the first version.
    """
    from rtresnet.core import serialization

    targets = [target for target in (file, json_file()) if target is not None]
    if not targets:
        return
    record = serialization.to_builtins(
        {
            "schema": SCHEMA, "verb": verb, "command": verb, "made_by": provenance.made_by(),
            "result": result,
        }
    )  # fmt: skip
    text = json.dumps(record, indent=1) + "\n"
    for target in targets:
        if target == "-":
            click.echo(text, nl=False)
        else:
            atomic_io.write_text(target, text)
