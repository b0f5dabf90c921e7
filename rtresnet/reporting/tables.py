"""Tables for a terminal of 80 columns. An unknown is a dash."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rtresnet.core.reporter import escape_cell

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


def numeric(cells: Iterable[object]) -> bool:
    """Whether a column holds numbers only (dashes, deviations), and so is set right."""
    return all(re.fullmatch(r"[-+\d.,e]+( ± [\d.]+)?", text(cell)) for cell in cells)


def show(
    console: Console, headings: Sequence[str], rows: Sequence[Row], *, title: str | None = None
) -> None:
    """Prints a table; columns of numbers are set right, and only text is broken into lines."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        right = numeric(row[index] for row in rows)
        table.add_column(
            heading,
            justify="right" if right else "left",
            overflow="fold",
            min_width=None if right else len(heading),
            no_wrap=right,
        )
    for row in rows:
        table.add_row(*(Text(escape_cell(text(value))) for value in row))
    console.print(table)
