"""What several commands share: options and output."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rtresnet.core.errors import InputError
from rtresnet.core.reporter import escape_cell

if TYPE_CHECKING:
    from rtresnet.cli.console import Console
    from rtresnet.core.config import Config
    from rtresnet.core.reporter import Update

SCHEMA = 1  # of what --json writes; see docs/reference/json.md
F = TypeVar("F", bound=Callable[..., Any])

DATA_HELP = (
    "digits, fashion-mnist:DIR, cifar10:DIR, folder:DIR (or DIR), shards:DIR, npz:FILE, "
    "synthetic:N. Transparent images are composited on white."
)


def text_place(context: click.Context, option: click.Parameter, given: Any) -> Any:
    """Validate a text file's output path before its content is computed (option callback).

    Raises:
        InputError: No text can be written there; or it is the name of an image, or of a net's
            sidecar.
    """
    if given is not None and str(given) != "-":
        from rtresnet.core import atomic_io
        from rtresnet.data.sources import IMAGE_SUFFIXES

        place = Path(given)
        if place.suffix.lower() in IMAGE_SUFFIXES:
            raise InputError(f"{place}: the name of an image", fix="choose another name")
        if place.suffix.lower() == ".json" and place.with_suffix("").suffix in atomic_io.NETS:
            raise InputError(
                f"{place}: the name of {place.stem}'s sidecar", fix="choose another name"
            )
        if not place.is_fifo() and not place.is_char_device():
            atomic_io.require_text_place(place)
    return given


def json_option(function: F) -> F:
    """`--json FILE`: the result for machines; an unknown is null."""
    return click.option(
        "--json",
        "json_file",
        metavar="FILE",
        callback=text_place,
        help="Write the result as JSON too; - writes it to stdout and the tables to stderr.  "
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
        from rtresnet.core import atomic_io
        from rtresnet.reporting import pages

        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: exists and is not a folder", fix="choose another folder")
        atomic_io.require_text_place(folder / "index.html")
        pages.require_packages()
    return folder


def report_option(content: str) -> Callable[[F], F]:
    """`--report DIR`: a page with `content`; arrives as a path or None."""
    return click.option(
        "--report",
        type=click.Path(path_type=Path),
        metavar="DIR",
        callback=page_folder,
        help=f"Write DIR/index.html, a page that works offline: {content}.  [default: none]",
    )


def refuse_for_detector(config: Config, *kept: str) -> None:
    """Raise InputError for an option of a config that detectors do not take.

    Args:
        config: What was given.
        *kept: Fields that apply to detectors too.
    """
    for field in dataclasses.fields(config):
        default = field.default
        if field.name not in kept and getattr(config, field.name) != default:
            name = field.name.replace("_", "-")
            raise InputError(f"--{name} does not go with a detector", fix="leave it out")
    if getattr(config, "split", None) == "all":
        raise InputError("--split all does not go with a detector", fix="--split train or test")


def classes_option(function: F) -> F:
    """`--classes FILE`: names for the side that has none; arrives as a tuple of names."""
    return click.option(
        "--classes",
        metavar="FILE",
        callback=_class_names,
        help="Class names in the order of the outputs, one a line or a JSON list.  [default: "
        "numbers]",
    )(function)


def _class_names(
    context: click.Context, option: click.Parameter, given: str | None
) -> tuple[str, ...] | None:
    from rtresnet.core.labels import read_classes

    return None if given is None else read_classes(given)


def out_console() -> Console:
    """Results go to standard output; with `--json -` that is the document's alone."""
    from rtresnet.cli.console import Console

    return Console(stderr=json_on_stdout())


def json_on_stdout() -> bool:
    """Return whether the running command has `--json -`."""
    context = click.get_current_context(silent=True)
    return context is not None and context.params.get("json_file") == "-"


def err_console() -> Console:
    """Progress, notes and warnings go to standard error."""
    from rtresnet.cli.console import Console

    return Console(stderr=True)


def say(line: str) -> None:
    """Print a line of the result."""
    click.echo(escape_cell(line), err=json_on_stdout())


def footer(lines: Iterable[str]) -> None:
    """What a result assumes and what else a reader must know, under it; each line once."""
    for line in dict.fromkeys(lines):
        say(line)


def note(line: str) -> None:
    """Print a line on standard error, above a progress bar where there is one."""
    print(escape_cell(line), file=sys.stderr)


def warn_loudly(title: str, body: str) -> None:
    """A warning that nobody can miss."""
    from rtresnet.cli.console import REPORTER

    REPORTER.warning(title, body)


def write_json(target: str | None, verb: str, result: Any) -> None:
    """Write `{"verb": ..., "made_by": ..., "result": ...}` where `--json` says."""
    if target is None:
        return
    from rtresnet.core import atomic_io, provenance, serialization

    record = serialization.to_builtins(
        {"schema": SCHEMA, "verb": verb, "made_by": provenance.made_by(), "result": result}
    )
    text = json.dumps(record, indent=1) + "\n"
    if target == "-":
        click.echo(text, nl=False)
    else:
        atomic_io.write_text(target, text)


def progress(description: str, total: float | None = None) -> AbstractContextManager[Update]:
    """Progress on the terminal; see `console.TerminalReporter`."""
    from rtresnet.cli.console import REPORTER

    return REPORTER.progress(description, total)
