"""Click options derived from the configs of the workflows."""

from __future__ import annotations

import copy
import functools
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from rtresnet.core.config import Config, Option, options_of, split_optional
from rtresnet.core.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])


def config_options(
    config: type[Config],
    *,
    argument: str = "config",
    leave_out: Collection[str] = (),
    default_texts: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Decorate a command with one option for each field of a config.

    The command receives the constructed config, so a value that the config rejects raises an
    InputError before the command runs.

    Args:
        config: Class whose fields are declared with `core.config.option`.
        argument: Name of the command's parameter that receives the config.
        leave_out: Fields that are not options of this command; they keep their defaults.
        default_texts: Field to description of its default that replaces the config's.
    """
    texts = default_texts or {}
    fields = [entry for entry in options_of(config) if entry[0].name not in leave_out]

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, **values: Any) -> Any:
            chosen = {field.name: values.pop(field.name) for field, _, _ in fields}
            source = click.get_current_context().get_parameter_source
            for field, _, about in fields:
                if source(field.name) is ParameterSource.COMMANDLINE:
                    for other in about.replaces:
                        if source(other) is ParameterSource.DEFAULT_MAP:
                            chosen[other] = None
            return function(*args, **{argument: config(**chosen)}, **values)

        decorated: Any = command
        for field, hint, about in reversed(fields):
            if field.name in texts:
                about = replace(about, default_text=texts[field.name])
            decorated = click_option(field.name, hint, field.default, about)(decorated)
        return typing.cast(F, decorated)

    return decorate


def precision_flags(helps: dict[str, str], *, default: str, default_text: str) -> Callable[[F], F]:
    """Decorate a command with one flag for each precision.

    The command receives the chosen precisions as `precisions`, a tuple in the order of `helps`.

    Args:
        helps: Precision to help sentence.
        default: The precision if there is no flag.
        default_text: Description of that, for its flag.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, **values: Any) -> Any:
            chosen = tuple([name for name in helps if values.pop(name)])
            return function(*args, precisions=chosen or (default,), **values)

        decorated: Any = command
        for name, text in reversed(helps.items()):
            text = f"{text}  [default: {default_text if name == default else 'off'}]"
            decorated = click.option(f"--{name}", is_flag=True, help=text)(decorated)
        return typing.cast(F, decorated)

    return decorate


def click_option(name: str, hint: Any, default: Any, about: Option) -> Callable[[F], F]:
    """Return the click option of one field."""
    kind, _ = split_optional(hint)
    multiple = typing.get_origin(kind) is tuple and about.parse is None
    names = about.names or (f"--{name.replace('_', '-')}",)
    flag = kind is bool
    keywords: dict[str, Any] = {
        "default": default,
        "help": f"{about.help}  [default: {default_text(default, about, names)}]",
        "metavar": about.metavar,
    }
    if flag:
        keywords["is_flag"] = True
    elif about.parse is not None:
        keywords |= {"callback": _parsed(about.parse), "type": click.UNPROCESSED}
    else:
        keywords |= {"type": _click_type(kind, about), "multiple": multiple}
    return click.option(
        *names, *about.hidden_names, name, cls=Aliased, hidden_names=about.hidden_names, **keywords
    )


class Aliased(click.Option):
    """An option with hidden aliases."""

    def __init__(self, *arguments: Any, hidden_names: Sequence[str], **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.hidden_names = set(hidden_names)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return click's help record without the hidden aliases."""
        shown = copy.copy(self)
        shown.opts = [name for name in self.opts if name not in self.hidden_names]
        record = click.Option.get_help_record(shown, ctx)
        # click writes " / --no-x" for a flag that has only its negative name
        return record and (record[0].removeprefix(" / "), record[1])


def default_text(default: Any, about: Option, names: tuple[str, ...]) -> str:
    """Return how the help text describes a default: never empty."""
    if about.default_text is not None:
        return about.default_text
    if isinstance(default, bool):
        on, _, off = names[0].partition("/")
        return (on if default else off or "off").removeprefix("--") if off else _on(default)
    if isinstance(default, tuple):
        return ", ".join(map(str, default)) or "none"
    return (
        "none"
        if default is None
        else f"{default:g}"
        if isinstance(default, float)
        else str(default)
    )


def _on(value: bool) -> str:
    return "on" if value else "off"


def _click_type(kind: Any, about: Option) -> Any:
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        return click.Choice(typing.get_args(kind))
    if kind is Path:
        return click.Path(path_type=Path)
    bounded = about.minimum is not None or about.maximum is not None
    if bounded and kind is int:
        low, high = about.minimum, about.maximum
        return click.IntRange(
            None if low is None else int(low), None if high is None else int(high)
        )
    if bounded and kind is float:
        return click.FloatRange(about.minimum, about.maximum)
    return kind


def _parsed(parse: Callable[[str], Any]) -> Callable[..., Any]:
    def callback(context: click.Context, option: click.Parameter, value: Any) -> Any:
        try:
            return parse(value) if isinstance(value, str) else value
        except InputError as error:
            if error.message.startswith("--"):
                raise
            name = option.opts[0]
            raise InputError(f"{name} {value}: {error.message}", fix=error.fix) from None

    return callback
