"""Dataclasses to JSON and back, strict reading of JSON files into declared types, JSON schemas.

Types for reading are those of msgspec: TypedDict, dataclass, Struct, with bounds as
`Annotated[float, msgspec.Meta(ge=0)]`. `true` is not a number, NaN and infinity are not figures, a
name must not occur twice in one object. `convert` drops fields that a TypedDict does not declare;
`from_json` rejects them.

Independent of the meaning of the files.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from rtresnet.core.errors import InputError

T = TypeVar("T")


def json_name(name: str, **keywords: Any) -> Any:
    """Return a dataclass field that `to_builtins` writes under another name."""
    return dataclasses.field(metadata={"json": name}, **keywords)


def flattened(**keywords: Any) -> Any:
    """Return a dataclass field whose own fields `to_builtins` writes in its place."""
    return dataclasses.field(metadata={"flatten": True}, **keywords)


def to_builtins(value: Any) -> Any:
    """Return a result as dicts, lists, strings and numbers, ready for `json.dumps`.

    Dataclasses become dicts (see `json_name` and `flattened`), paths strings and NumPy scalars
    numbers; a float that is not finite becomes None.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            if field.metadata.get("hidden"):
                continue
            entry = to_builtins(getattr(value, field.name))
            if field.metadata.get("flatten"):
                fields |= entry or {}
            else:
                fields[field.metadata.get("json", field.name)] = entry
        return fields
    if isinstance(value, Mapping):
        return {str(key): to_builtins(entry) for key, entry in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [to_builtins(entry) for entry in value]
    if hasattr(value, "item") and not isinstance(value, str | bytes):  # a NumPy scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(record: Any) -> str:
    """Return a dataclass as indented JSON; lists of scalars stay on one line."""
    text = json.dumps(nonfinite_to_none(dataclasses.asdict(record)), indent=1, ensure_ascii=False)
    flat = re.sub(r"\[\n[^\[\]{}]*\n\s*\]", lambda m: re.sub(r"\n\s*", " ", m[0]), text)
    return flat + "\n"


def nonfinite_to_none(value: Any) -> Any:
    """Replace every float that is not finite by None, because JSON cannot express it."""
    if isinstance(value, dict):
        return {key: nonfinite_to_none(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [nonfinite_to_none(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(cls: type[T], data: object) -> T:
    """Build a dataclass from parsed JSON; reject missing and unknown fields.

    Raises:
        TypeError: A field is missing, unknown, or not of the declared type.
    """
    try:
        record = msgspec.convert(data, cls)
    except (msgspec.ValidationError, RecursionError) as problem:
        raise TypeError(f"{cls.__name__}: {problem}") from None
    if unknown := _first_unknown(data, record):
        raise TypeError(f"{cls.__name__} has no field {unknown!r}")
    return record


def _first_unknown(data: Any, record: Any) -> str | None:
    """Return the first key of parsed JSON that a dataclass built from it does not declare.

    Does not enter dicts, because their keys are free and their values can be nested to any depth.
    """
    pairs: Iterable[tuple[Any, Any]] = ()
    if dataclasses.is_dataclass(record):
        names = {field.name for field in dataclasses.fields(record)}
        if undeclared := [key for key in data if key not in names]:
            return str(undeclared[0])
        pairs = ((entry, getattr(record, key)) for key, entry in data.items())
    elif isinstance(record, tuple):
        pairs = zip(data, record, strict=True)
    return next(filter(None, (_first_unknown(entry, built) for entry, built in pairs)), None)


def load(
    path: str | os.PathLike[str], *, fix: str | None = None, error: type[InputError] = InputError
) -> Any:
    """Parse a JSON file.

    Args:
        path: UTF-8 text.
        fix: How to fix it, for the error.
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
    """Parse the bytes of a JSON file; `where` names the file in the error. See `load`."""
    try:
        values = json.loads(
            data.decode("utf-8"),
            parse_constant=_not_finite,
            parse_float=_finite,
            object_pairs_hook=_without_repeats,
        )
        if re.search(rb"\\u[dD][89a-fA-F]", data):  # a lone surrogate cannot be written
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
    """Check parsed JSON against a type.

    Args:
        value: Result of `load`, or a part of it.
        cls: The declared type.
        where: The file's name, for the error.
        at: Path of `value` within the file, as in `result.results`.
        fix: How to fix it, for the error.
        error: Class of the exception.

    Raises:
        InputError: A field is missing, of the wrong type or out of bounds. Of class `error`; names
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


def json_schema(result: type[Any]) -> Mapping[str, Any]:
    """Return the JSON schema (2020-12) of a dataclass as `to_builtins` writes it.

    A type that cannot be resolved without importing heavy packages is described as any value.

    Raises:
        InputError: Not a dataclass.
    """
    if not dataclasses.is_dataclass(result):
        raise InputError(f"{result!r}: not a dataclass")
    return msgspec.json.schema(_written(result, {}))


def _written(kind: Any, defined: dict[Any, Any]) -> Any:
    """Return the type as JSON has it: fields renamed, flattened and hidden, paths as strings."""
    if kind is Path:
        return str
    if dataclasses.is_dataclass(kind):
        if kind not in defined:
            defined[kind] = Any  # a type that contains itself
            fields = _fields(typing.cast(Any, kind), defined)
            defined[kind] = msgspec.defstruct(
                typing.cast(type, kind).__name__,
                [(name, hint) for name, hint in fields.items() if name.isidentifier()],
                kw_only=True,
            )
        return defined[kind]
    if typing.is_typeddict(kind):
        if kind not in defined:
            hints = typing.get_type_hints(kind)
            defined[kind] = typing.TypedDict(  # type: ignore[operator]
                kind.__name__,
                {name: _optional_number(_written(hint, defined)) for name, hint in hints.items()},
                total=kind.__total__,
            )
        return defined[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        options = [_written(argument, defined) for argument in arguments]
        if Any in options or sum(isinstance(o, type) and issubclass(o, msgspec.Struct)
                                 for o in options) > 1:  # fmt: skip
            return Any
        return typing.Union[tuple(options)]  # noqa: UP007
    if origin in (tuple, list) and arguments:
        return list[_written(arguments[0], defined)]  # type: ignore[misc]
    if origin is dict and len(arguments) == 2:
        return dict[str, _written(arguments[1], defined)]  # type: ignore[misc]
    if origin is typing.Literal or kind in (str, int, float, bool, type(None)):
        return kind
    return Any


def _fields(kind: type[Any], defined: dict[Any, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.metadata.get("hidden"):
            continue
        hint = _resolved(kind, field)
        if field.metadata.get("flatten") and dataclasses.is_dataclass(hint):
            fields |= _fields(typing.cast(Any, hint), defined)
        else:
            name = field.metadata.get("json", field.name)
            fields[name] = _optional_number(_written(hint, defined))
    return fields


def _optional_number(kind: Any) -> Any:
    """Return the type as it is written: a float that is not finite becomes null."""
    return typing.Optional[float] if kind is float else kind  # noqa: UP045


def _resolved(kind: type[Any], field: dataclasses.Field[Any]) -> Any:
    if not isinstance(field.type, str):
        return field.type
    for base in kind.__mro__:
        if field.name in inspect.get_annotations(base):
            try:
                return eval(field.type, vars(sys.modules[base.__module__]))
            except NameError:  # imported for type checkers only
                return Any
    return Any
