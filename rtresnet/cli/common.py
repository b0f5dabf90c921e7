"""What several verbs share: options, output, and opening any artifact."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import typing
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rtresnet.core.errors import InputError
from rtresnet.core.terminal import escape

if TYPE_CHECKING:
    from rtresnet.cli.console import Console
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.core.reporter import Update

F = TypeVar("F", bound=Callable[..., Any])

DATA_HELP = (
    "digits, fashion-mnist:DIR, cifar10:DIR, folder:DIR (or DIR), shards:DIR, npz:FILE, "
    "synthetic:N. Transparent images are composited on white."
)


def text_place(context: click.Context, option: click.Parameter, given: Any) -> Any:
    """An option's callback: a file of text is refused before what will be in it is computed.

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


def percentage(context: click.Context, option: click.Parameter, given: str | None) -> float | None:
    """An option's callback: "2", "2%" and "0.5 %" as a share in [0, 1].

    Raises:
        InputError: Anything else, or not within 0 and 100.
    """
    if given is None:
        return None
    try:
        share = float(given.strip().removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        name = option.opts[0]
        raise InputError(f"{name} {given}: not a percentage from 0 to 100", fix=f"as in {name} 1%")
    return share


def max_broken_option(function: F) -> F:
    """`--max-broken N%`, as a share in [0, 1]; None where it is not given."""
    return click.option(
        "--max-broken",
        callback=percentage,
        metavar="N%",
        help="Share of broken images up to which training goes on without them [default: 0%].",
    )(function)


def json_option(function: F) -> F:
    """`--json FILE`: the result for machines; an unknown is null."""
    return click.option(
        "--json",
        "json_file",
        metavar="FILE",
        callback=text_place,
        help="Write the result as JSON too (-: to stdout, and the tables to stderr).",
    )(function)


class ProviderName(click.Choice):  # type: ignore[type-arg, unused-ignore]
    """A provider of the runtime; the one that was dropped is refused with what to use instead."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuses `tensorrt` with an InputError, and an unknown name with click's usage error."""
        if value == "tensorrt":
            from rtresnet.runtime.providers import find_provider

            find_provider(value)
        return super().convert(value, param, ctx)


def device_options(function: F) -> F:
    """`--device`, `--provider`, `--threads`: where an ONNX file or a plan runs."""
    for option in (
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads [every core]."),
        click.option(
            "--provider",
            type=ProviderName(("auto", "cpu", "openvino", "cuda", "tensorrt-rtx")),
            default="auto",
            help="For ONNX files; auto: openvino where it is here and serves this CPU, else cpu.",
        ),
        click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto"),
    ):
        function = option(function)
    return function


def input_options(function: F) -> F:
    """`--size`, `--mean`, `--std`, `--preset`: the input contract of files that do not state it.

    A preset arrives as the mean and std that it stands for.
    """

    @functools.wraps(function)
    def command(
        *args: Any, preset: str | None, mean: str | None, std: str | None, **options: Any
    ) -> Any:
        if preset is not None:
            if mean is not None or std is not None:
                raise click.UsageError("--preset states mean and std; leave out --mean and --std")
            from rtresnet.core.preprocess import PRESETS

            mean, std = (",".join(map(str, values)) for values in PRESETS[preset])
        return function(*args, mean=mean, std=std, **options)

    for option in (
        click.option(
            "--preset",
            type=click.Choice(("imagenet", "half", "unit")),
            help="Mean and std: imagenet's, 0.5 and 0.5 (half), or 0 and 1 (unit).",
        ),
        click.option("--std", metavar="R,G,B", help="Of the input, in units of [0, 1]."),
        click.option("--mean", metavar="R,G,B", help="Of the input, in units of [0, 1]."),
        click.option("--size", type=click.IntRange(min=1), help="Side of the input, in pixels."),
    ):
        command = option(command)
    return typing.cast(F, command)


def stated_input(
    path: object,
    size: int | None,
    mean: str | None,
    std: str | None,
    *,
    fixed: int | None,
    pixels: bool = False,
) -> Preprocess:
    """The input contract that the options state for a file without one.

    Args:
        path: The file, for messages.
        size: From the options, as `mean` and `std`.
        mean: "R,G,B".
        std: "R,G,B".
        fixed: Side of the file's input, in pixels; None where it leaves it open.
        pixels: Whether the file takes uint8 and normalizes by itself.

    Raises:
        InputError: One of them is not stated, or not what the file takes.
    """
    from rtresnet.core.preprocess import UINT8, Preprocess

    lacking = {}
    if size is None and fixed is None:
        lacking["size"] = "--size S"
    if not pixels and (mean is None or std is None):
        lacking["mean and std"] = "--preset imagenet|half|unit, or --mean R,G,B --std R,G,B"
    if lacking:
        raise InputError(
            f"{path}: no sidecar states its {' and '.join(lacking)}",
            fix=f"state them{_once(path)}: {' '.join(lacking.values())}",
        )
    if fixed is not None and size not in (None, fixed):
        raise InputError(f"{path}: takes {fixed}x{fixed} pixels, not {size}", fix=f"--size {fixed}")
    side = fixed or size
    assert side is not None
    base = Preprocess.for_size(side, **({"layout": UINT8} if pixels else {}))
    return preprocess_from(base, None, mean, std)


def _once(path: object) -> str:
    """The command that states the input of an ONNX file for all commands."""
    from rtresnet.core import artifacts

    onnx = artifacts.SUFFIXES.get(Path(str(path)).suffix.lower()) == "onnx"
    return f" (once, with: rtresnet adopt {path})" if onnx else ""


def classes_option(function: F) -> F:
    """`--classes FILE`: names for the side that has none; arrives as a tuple of names."""
    return click.option(
        "--classes",
        metavar="FILE",
        callback=_class_names,
        help="Class names, one a line or a JSON list: of the model's outputs where it has no "
        "names, else of the data's labels.",
    )(function)


def _class_names(
    context: click.Context, option: click.Parameter, given: str | None
) -> tuple[str, ...] | None:
    from rtresnet.core.labels import read_classes

    return None if given is None else read_classes(given)


def preprocess_from(
    base: Preprocess, size: int | None, mean: str | None, std: str | None
) -> Preprocess:
    """`base` with what the options say instead."""
    changed: dict[str, Any] = {}
    if size is not None and size != base.size:
        changed |= {"size": size, "resize": type(base).for_size(size).resize}
    for name, given in (("mean", mean), ("std", std)):
        if given is not None:
            changed[name] = _triple(name, given)
    return dataclasses.replace(base, **changed)


def _triple(name: str, given: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(part) for part in given.split(","))
    except ValueError:
        raise InputError(
            f"--{name} {given}: needs three numbers", fix="as in 0.5,0.5,0.5"
        ) from None
    if max(red, green, blue) > 1:
        raise InputError(f"--{name} {given}: in units of [0, 1]", fix="divide levels by 255")
    return red, green, blue


def out_console() -> Console:
    """Results go to standard output; with `--json -` that is the document's alone."""
    from rtresnet.cli.console import Console

    return Console(stderr=json_on_stdout())


def json_on_stdout() -> bool:
    """Whether the verb that runs was told `--json -`."""
    context = click.get_current_context(silent=True)
    return context is not None and context.params.get("json_file") == "-"


def err_console() -> Console:
    """Progress, notes and warnings go to standard error."""
    from rtresnet.cli.console import Console

    return Console(stderr=True)


def given() -> set[str]:
    """The parameters of the verb that runs which stand on its command line, by Python's names."""
    context = click.get_current_context()
    return {
        name
        for name in context.params
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }


def say(line: str) -> None:
    """Prints a line of the result."""
    click.echo(escape(line), err=json_on_stdout())


def footer(lines: Iterable[str]) -> None:
    """What a result assumes and what else a reader must know, under it; each line once."""
    for line in dict.fromkeys(lines):
        say(line)


def note(line: str) -> None:
    """Prints a line on standard error, above a progress bar where there is one."""
    print(escape(line), file=sys.stderr)


def int8_notes(entries: Iterable[dict[str, Any]]) -> list[str]:
    """How INT8 ran where integer sums would saturate, each once; see `Session.describe`."""
    return sorted({entry["int8_note"] for entry in entries if entry.get("int8_note")})


def run_notes(entries: Iterable[dict[str, Any]]) -> list[str]:
    """How the files ran, where that needs a word: INT8 sums, a fixed batch; each once."""
    entries = list(entries)
    fixed = {entry["batch_note"] for entry in entries if entry.get("batch_note")}
    return [*int8_notes(entries), *sorted(fixed)]


def warn_loudly(title: str, body: str) -> None:
    """A warning that nobody can miss."""
    from rtresnet.cli.console import REPORTER

    REPORTER.warning(title, body)


def write_json(target: str | None, verb: str, result: Any) -> None:
    """Writes `{"verb": ..., "made_by": ..., "result": ...}` where `--json` says."""
    if target is None:
        return
    from rtresnet.core import artifacts, atomic_io, serialization

    record = serialization.to_builtins(
        {"verb": verb, "made_by": artifacts.provenance(), "result": result}
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


def require_torch(purpose: str) -> None:
    """Raises UnavailableError where torch is not installed."""
    from rtresnet.core import hardware
    from rtresnet.core.errors import UnavailableError

    if not hardware.installed("torch"):
        raise UnavailableError(
            f"{purpose} needs torch, which is not installed", fix="pip install torch"
        )


def torch_device(choice: str) -> str:
    """ "auto" is the GPU where torch sees one.

    Raises:
        UnavailableError: CUDA was asked for and torch sees none.
    """
    import torch

    from rtresnet.core.errors import UnavailableError

    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if choice == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("torch sees no CUDA device", fix="see: rtresnet doctor")
    return choice
