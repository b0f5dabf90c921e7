from __future__ import annotations

import pytest

from rtresnet.builder.profiles import DEFAULT, parse
from rtresnet.core.errors import InputError
from rtresnet.core.sidecar import Profile


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:8:32", (1, 8, 32)),
        ("4:4:4", (4, 4, 4)),
        ("1:1:256", (1, 1, 256)),
        ("8", (8, 8, 8)),
        ("1", (1, 1, 1)),
    ],
)
def test_a_profile_is_read(text: str, expected: tuple[int, int, int]) -> None:
    assert parse(text) == Profile(min=expected[0], opt=expected[1], max=expected[2])


def test_a_profile_prints_as_it_is_read() -> None:
    assert str(parse("1:8:32")) == "1:8:32"
    assert str(parse("8")) == "8:8:8"
    assert parse(str(parse(DEFAULT))) == parse(DEFAULT)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "1:8", "1:2:3:4", "8:4:32", "1:64:32", "0:1:2", "1.5", "a:b:c", "1::3", "1,8"],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="MIN <= OPT <= MAX") as caught:
        parse(text)
    assert f"--batch {DEFAULT}" in str(caught.value)
    assert caught.value.exit_code == 2
