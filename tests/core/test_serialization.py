from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from msgspec import Meta
from typing_extensions import NotRequired, TypedDict

from rtresnet.core import serialization
from rtresnet.core.errors import ArtifactError, InputError


class Inner(TypedDict):
    figure: Annotated[float, Meta(ge=0)]


class Outer(TypedDict):
    count: int
    entries: NotRequired[list[Inner]]
    note: NotRequired[str | None]


def read(text: str | bytes, tmp_path: Path) -> Outer:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    value = serialization.load(path, error=ArtifactError)
    return serialization.convert(value, Outer, where=str(path), at="result", error=ArtifactError)


def test_convert_valid_file_returns_declared_fields(tmp_path: Path) -> None:
    layers = read('{"count": 2, "entries": [{"figure": 1, "x": 1e999}], "y": NaN}', tmp_path)
    assert layers == {"count": 2, "entries": [{"figure": 1.0}]}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"count": true}', "result.count: "),
        ('{"count": 2.0}', "result.count: "),
        ('{"count": "2"}', "result.count: "),
        ('{"count": null}', "result.count: "),
        ('{"entries": []}', "result: "),
        ("[]", "result: "),
        ('{"count": 1, "entries": [{"figure": 1}, {"figure": NaN}]}', "result.entries[1].figure: "),
        ('{"count": 1, "entries": [{"figure": -Infinity}]}', "result.entries[0].figure: "),
        ('{"count": 1, "entries": [{"figure": 1e999}]}', "result.entries[0].figure: "),
        ('{"count": 1, "entries": [{"figure": 1' + "0" * 400 + "}]}", "result.entries[0].figure: "),
        ('{"count": 1, "entries": [{"figure": -1}]}', "result.entries[0].figure: "),
        ('{"count": 1, "entries": [{}]}', "result.entries[0]: "),
        ('{"count": 1, "note": NaN}', "result.note: "),
    ],
)
def test_convert_wrong_value_names_file_and_place(text: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        read(text, tmp_path)
    assert f"a.json: {place}" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "nul", '{"count": 1', '{"count": 1}}', b"\xff\xfe{}", '{"count": 1, "count": 2}',
        '{"count": 1, "note": "\\ud800"}', '{"count": 1, "x": ["\\uDFFF"]}',
        "[" * 200_000, '{"count": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_load_malformed_json_is_refused(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a\.json: "):
        read(text, tmp_path)


def test_load_names_the_fix(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError) as caught:
        serialization.load(tmp_path / "a.json", fix="write it again")
    assert caught.value.fix == "write it again"


def test_load_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('"\\ud83d\\ude00"')
    assert serialization.load(tmp_path / "a.json") == "\U0001f600"


@dataclasses.dataclass(frozen=True)
class Part:
    size: int
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Record:
    counts: dict[str, int]
    parts: tuple[Part, ...] = ()
    best: Part | None = None
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)


def test_from_json_round_trip_keeps_the_record() -> None:
    record = Record({"Int8": 3}, (Part(1), Part(2, 0.5)), Part(3), {"x": [1, {"y": None}]})
    assert serialization.from_json(Record, json.loads(serialization.to_json(record))) == record


@pytest.mark.parametrize("data", [
    [], {}, {"counts": {"Int8": "many"}}, {"counts": {"Int8": True}}, {"counts": {"Int8": 1.5}},
    {"counts": {}, "parts": [{"size": True}]}, {"counts": {}, "parts": "ab"},
    {"counts": {}, "parts": [{"size": 1, "scale": "1"}]}, {"counts": {}, "other": 1},
    {"counts": {}, "parts": [{"size": 1}, {"size": 1, "other": 1}]},
    {"counts": {}, "best": {"size": 1, "other": 1}}, {"counts": {}, "best": {}},
])  # fmt: skip
def test_from_json_wrong_missing_or_unknown_field_is_refused(data: Any) -> None:
    with pytest.raises(TypeError):
        serialization.from_json(Record, data)


def test_from_json_deeply_nested_dict_is_kept() -> None:
    nested: Any = []
    for _ in range(900):  # the parser's limit is near 1000
        nested = [nested]
    record = serialization.from_json(Record, {"counts": {}, "measured": {"x": nested}})
    assert record.measured["x"] is not None
