"""JSON schemas of what `serialization.to_builtins` writes of dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from rtresnet.core.errors import InputError


def json_schema(result: type[Any]) -> Mapping[str, Any]:
    """Return the JSON schema (2020-12) of a dataclass as `to_builtins` writes it.

    A type that cannot be resolved without importing heavy packages is described as any value.

    Raises:
        InputError: Not a dataclass.
    """
    if not dataclasses.is_dataclass(result):
        raise InputError(f"{result!r}: not a dataclass")
    return msgspec.json.schema(_written(result, {}))


def _written(kind: Any, known: dict[Any, Any]) -> Any:
    """Return the type as JSON has it: fields renamed, flattened and hidden, paths as strings."""
    if kind is Path:
        return str
    if dataclasses.is_dataclass(kind):
        if kind not in known:
            known[kind] = Any  # a type that contains itself
            fields = _fields(typing.cast(Any, kind), known)
            known[kind] = msgspec.defstruct(
                typing.cast(type, kind).__name__,
                [(name, hint) for name, hint in fields.items() if name.isidentifier()],
                kw_only=True,
            )
        return known[kind]
    if typing.is_typeddict(kind):
        if kind not in known:
            hints = typing.get_type_hints(kind)
            known[kind] = typing.TypedDict(  # type: ignore[operator]
                kind.__name__,
                {name: _optional_number(_written(hint, known)) for name, hint in hints.items()},
                total=kind.__total__,
            )
        return known[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        options = [_written(argument, known) for argument in arguments]
        if Any in options or sum(isinstance(o, type) and issubclass(o, msgspec.Struct)
                                 for o in options) > 1:  # fmt: skip
            return Any
        return typing.Union[tuple(options)]  # noqa: UP007
    if origin in (tuple, list) and arguments:
        return list[_written(arguments[0], known)]  # type: ignore[misc]
    if origin is dict and len(arguments) == 2:
        return dict[str, _written(arguments[1], known)]  # type: ignore[misc]
    if origin is typing.Literal or kind in (str, int, float, bool, type(None)):
        return kind
    return Any


def _fields(kind: type[Any], known: dict[Any, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.metadata.get("hidden"):
            continue
        hint = _resolved(kind, field)
        if field.metadata.get("flatten") and dataclasses.is_dataclass(hint):
            fields |= _fields(typing.cast(Any, hint), known)
        else:
            name = field.metadata.get("json", field.name)
            fields[name] = _optional_number(_written(hint, known))
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
