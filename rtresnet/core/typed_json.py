"""Strict reading of JSON files into declared types.

The types are those of msgspec: TypedDict, dataclass, Struct, with bounds as
`Annotated[float, msgspec.Meta(ge=0)]`. `true` is not a number, NaN and infinity are not figures, a
name must not occur twice in one object. Objects may hold fields that the type does not declare; a
TypedDict drops them.

Knows nothing of what the files mean.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from rtresnet.core.errors import InputError

T = TypeVar("T")


def load(
    path: str | os.PathLike[str], *, fix: str | None = None, error: type[InputError] = InputError
) -> Any:
    """Parses a JSON file.

    Args:
        path: UTF-8 text.
        fix: The end of the error message.
        error: Class of the exception.

    Returns:
        Python's values. A number that is not finite (NaN, 1e999) is an object that no declared
        type accepts, so that `convert` names its place.

    Raises:
        InputError: The file is not JSON. Of class `error`.
    """
    return parse(Path(path).read_bytes(), where=str(path), fix=fix, error=error)


def parse(
    data: bytes, *, where: str, fix: str | None = None, error: type[InputError] = InputError
) -> Any:
    """Parses the bytes of a JSON file; `where` names the file in the error. See `load`."""
    try:
        values = json.loads(
            data.decode("utf-8"),
            parse_constant=_not_finite,
            parse_float=_finite,
            object_pairs_hook=_without_repeats,
        )
        if re.search(rb"\\u[dD][89a-fA-F]", data):  # half a character could not be written again
            json.dumps(values, ensure_ascii=False, default=repr).encode("utf-8")
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not valid JSON ({problem})", fix=fix) from None
    return values


def convert(
    value: Any,
    cls: type[T],
    *,
    where: str,
    at: str = "",
    fix: str | None = None,
    error: type[InputError] = InputError,
) -> T:
    """Checks parsed JSON against a type.

    Args:
        value: What `load` returned, or a part of it.
        cls: The declared type.
        where: The file's name, for the error.
        at: Path of `value` within the file, as in `result.results`.
        fix: The end of the error message.
        error: Class of the exception.

    Raises:
        InputError: A field is missing, of another type or out of bounds. Of class `error`; names
            the file, the path within it and what was expected.
    """
    try:
        return msgspec.convert(value, cls)
    except (msgspec.ValidationError, RecursionError) as problem:
        expected, _, place = str(problem).partition(" - at `$")
        place = (at + place.rstrip("`")).lstrip(".")
        words = expected[:1].lower() + expected[1:]
        raise error(f"{where}: {place + ': ' if place else ''}{words}", fix=fix) from None


def _not_finite(name: str) -> Any:
    return type(name, (), {})()  # msgspec calls an unknown value by the name of its class


def _finite(digits: str) -> Any:
    value = float(digits)
    return value if math.isfinite(value) else _not_finite(digits)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {repeated!r} occurs twice in one object")
    return values
