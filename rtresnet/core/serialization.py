"""Frozen dataclasses to JSON and back, strictly: a missing, unknown or mistyped field is refused.

Knows nothing of what the records mean; see `artifacts.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def json_name(name: str, **keywords: Any) -> Any:
    """A dataclass field that `to_builtins` writes under another name."""
    return dataclasses.field(metadata={"json": name}, **keywords)


def flattened(**keywords: Any) -> Any:
    """A dataclass field whose own fields `to_builtins` writes in its place."""
    return dataclasses.field(metadata={"flatten": True}, **keywords)


def to_builtins(value: Any) -> Any:
    """A result as dicts, lists, strings and numbers, ready for `json.dumps`.

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
    """A dataclass as indented JSON; lists of scalars stay on one line."""
    text = json.dumps(known(dataclasses.asdict(record)), indent=1, ensure_ascii=False)
    flat = re.sub(r"\[\n[^\[\]{}]*\n\s*\]", lambda m: re.sub(r"\n\s*", " ", m[0]), text)
    return flat + "\n"


def known(value: Any) -> Any:
    """The same, with None for every float that is not finite: strict JSON has no word for those."""
    if isinstance(value, dict):
        return {key: known(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [known(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(cls: type[T], data: dict[str, Any]) -> T:
    """Builds a dataclass from parsed JSON, refusing missing and unknown fields.

    Raises:
        TypeError: A field is missing, unknown or of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    if not isinstance(data, dict):
        raise TypeError(f"{cls.__name__} is not an object")
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise TypeError(f"{cls.__name__} has no field {unknown[0]!r}")
    return cls(**{name: _coerce(hints[name], value, name) for name, value in data.items()})


def _coerce(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _coerce(next(a for a in arguments if a is not type(None)), value, name)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(Any, hint), value)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(f"{name} is not a list")
        return tuple(_coerce(arguments[0], item, name) for item in value)
    if origin is dict and arguments[1] is not Any and isinstance(value, dict):
        return {key: _coerce(arguments[1], entry, name) for key, entry in value.items()}
    expected = origin or hint
    accepted = (int, float) if expected is float else expected
    boolean = isinstance(value, bool) and expected is not bool  # to Python an int
    if expected is not Any and (boolean or not isinstance(value, accepted)):
        raise TypeError(f"{name} is {value!r}, expected {expected.__name__}")
    return value
