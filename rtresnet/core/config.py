"""Options of the workflows: declared once, validated at construction.

A config is a frozen dataclass whose fields are made with `option`. The command line derives its
options from the same fields (`cli/options.py`), so that name, default, bounds and help text are
in one place.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtresnet.core.errors import InputError, UnknownNameError


@dataclass(frozen=True, kw_only=True)
class Option:
    """Metadata of a config's field, in addition to type and default.

    Attributes:
        help: Sentence on the effect of the option.
        names: Names on the command line, as in ("--target",); derived from the field's name if
            empty.
        hidden_names: Older names that keep working.
        metavar: Placeholder of the value in the help text.
        minimum: Smallest value of a number.
        maximum: Largest value of a number.
        default_text: Description of the default, if its value is not clear.
        parse: Turns the command line's string into the field's value; raises InputError.
        replaces: Fields of a configuration file that the option overrides on the command line.
    """

    help: str
    names: tuple[str, ...] = ()
    hidden_names: tuple[str, ...] = ()
    metavar: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    default_text: str | None = None
    parse: Callable[[str], Any] | None = None
    replaces: tuple[str, ...] = ()


def option(default: Any, help: str, **details: Any) -> Any:
    """Declare a field of a config.

    Args:
        default: Default value.
        help: Sentence on the effect of the option.
        **details: Further fields of `Option`.
    """
    return dataclasses.field(default=default, metadata={"option": Option(help=help, **details)})


def options_of(config: type[Any]) -> list[tuple[dataclasses.Field[Any], Any, Option]]:
    """Return the declared fields of a config class: (field, its type, its option)."""
    hints = typing.get_type_hints(config)
    return [
        (field, hints[field.name], field.metadata["option"])
        for field in dataclasses.fields(config)
        if "option" in field.metadata
    ]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configs: checks types, choices and bounds at construction.

    Lists become tuples and strings become paths if the field's type requires it.

    Raises:
        InputError: A value has the wrong type or is out of bounds.
        UnknownNameError: A value is not one of the choices.
    """

    def __post_init__(self) -> None:
        for field, hint, about in options_of(type(self)):
            value = _checked(field.name, getattr(self, field.name), hint, about)
            object.__setattr__(self, field.name, value)


def split_optional(hint: Any) -> tuple[Any, bool]:
    """Convert `int | None` to (int, True), and `int` to (int, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arguments = [entry for entry in typing.get_args(hint) if entry is not type(None)]
        if len(arguments) == 1:
            return arguments[0], True
    return hint, False


def _checked(name: str, value: Any, hint: Any, about: Option) -> Any:
    kind, optional = split_optional(hint)
    if value is None and optional:
        return None
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UnknownNameError(name, str(value), [str(choice) for choice in choices])
        return value
    if origin is tuple:
        item, *rest = typing.get_args(kind)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise InputError(f"{name} is {value!r}, but must be a sequence")
        if rest != [...] and len(value) != len(rest) + 1:
            raise InputError(f"{name} has {len(value)} values, but needs {len(rest) + 1}")
        return tuple(_checked(name, entry, item, about) for entry in value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(kind, type) and (
        not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
    ):
        raise InputError(f"{name} is {value!r}, but must be of type {kind.__name__}")
    if kind in (int, float):
        if about.minimum is not None and not value >= about.minimum:
            raise InputError(f"{name} is {value}, but must be at least {about.minimum:g}")
        if about.maximum is not None and not value <= about.maximum:
            raise InputError(f"{name} is {value}, but must be at most {about.maximum:g}")
    return value


def parse_percentage(text: str, largest: float = 1) -> float:
    """Read "2", "2%" or "0.5 %" as a share in [0, `largest`].

    Raises:
        InputError: Not a percentage.
    """
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share <= largest:
        raise InputError(f"not a percentage from 0 to {100 * largest:g}", fix="as in 1%")
    return share


def parse_wait(text: str) -> float:
    """Read `10ms`, `0.5s`, `250us`, `10` (ms) or 0; returns milliseconds.

    Raises:
        InputError: Not a time.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(us|ms|s|)", text.strip())
    if match is None:
        raise InputError("not a time", fix="as in 10ms")
    return float(match[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3, "": 1.0}[match[2]]


def parse_milliseconds(text: str) -> float:
    """Read a time as `parse_wait` does, but not 0; returns milliseconds.

    Raises:
        InputError: Not a time above 0.
    """
    value = parse_wait(text)
    if value <= 0:
        raise InputError("not a time above 0", fix="as in 10ms")
    return value
