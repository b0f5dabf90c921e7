"""Tables for a terminal of 80 columns. An unknown is a dash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = Sequence[object]


def text(value: object) -> str:
    """A cell: a dash for None, three significant digits or so for a float."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return number(value)
    return str(value)


def number(value: float) -> str:
    """0.1234, 1.234, 12.34, 123.4, 1,234."""
    if value == 0 or not abs(value) < 1e15:
        return str(value)
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f}"


def megabytes(size: int) -> str:
    """Bytes as MB (10^6)."""
    return f"{number(size / 1e6)} MB"


def show(
    console: Console, headings: Sequence[str], rows: Sequence[Row], *, title: str | None = None
) -> None:
    """Prints a table; columns of numbers are set right."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for index, heading in enumerate(headings):
        numeric = all(isinstance(row[index], int | float | None) for row in rows)
        options: dict[str, Any] = {"justify": "right"} if numeric else {"overflow": "fold"}
        table.add_column(heading, **options)
    for row in rows:
        table.add_row(*(Text(text(value)) for value in row))
    console.print(table)
