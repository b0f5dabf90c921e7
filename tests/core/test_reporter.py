from __future__ import annotations

import pytest

from rtresnet.core import reporter


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Ünï, 猫, 😀", "plain, Ünï, 猫, 😀"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m \x9d0;t\x9c", "\\x9b31m \\x9d0;t\\x9c"),
        ("over\rwritten\x08\x7f\x00", "over\\x0dwritten\\x08\\x7f\\x00"),
        ("gnp\u202e.exe\u2066\u200f", "gnp\\u202e.exe\\u2066\\u200f"),
        ("\udcff", "\\udcff"),
    ],
)
def test_escape_shows_control_characters(text: str, shown: str) -> None:
    assert reporter.escape(text) == shown
    assert reporter.escape(shown) == shown


def test_escape_cell_keeps_a_cell_on_one_line() -> None:
    assert reporter.escape_cell("a\nb\tc\x1b") == "a\\x0ab\\x09c\\x1b"
