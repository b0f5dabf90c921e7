from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from msgspec import Meta
from typing_extensions import NotRequired, TypedDict

from rtresnet.core import typed_json
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
    value = typed_json.load(path, error=ArtifactError)
    return typed_json.convert(value, Outer, where=str(path), at="result", error=ArtifactError)


def test_convert_valid_file_returns_declared_fields(tmp_path: Path) -> None:
    found = read('{"count": 2, "entries": [{"figure": 1, "x": 1e999}], "y": NaN}', tmp_path)
    assert found == {"count": 2, "entries": [{"figure": 1.0}]}


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
        typed_json.load(tmp_path / "a.json", fix="write it again")
    assert caught.value.fix == "write it again"


def test_load_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('"\\ud83d\\ude00"')
    assert typed_json.load(tmp_path / "a.json") == "\U0001f600"
