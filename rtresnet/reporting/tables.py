"""Tables for a terminal of 80 columns, and for pages. An unknown is a dash."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rtresnet.core.reporter import escape_cell, plural
from rtresnet.core.sidecar import accuracies

Row = Sequence[object]

# Tables in a sidecar's `measured`: the fields of a row, and their headings.
MEASURED = {
    "blocks": {
        "name": "block", "alone_db": "SNR alone, dB", "gain_db": "in float, dB gained",
        "weights": "% of weights", "runs_in": "runs in",
    },
    "outliers": {
        "tensor": "outlier", "channels": "channels", "times": "times the median",
        "remedy": "remedy",
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """A table with its title and an explanation."""

    headings: Sequence[str]
    rows: Sequence[Row]
    title: str = ""
    about: str = ""

    @property
    def numeric_columns(self) -> list[bool]:
        """Which columns hold numbers only (dashes, deviations), and so are aligned right."""
        columns = range(len(self.headings))
        return [numeric(row[column] for row in self.rows) for column in columns]

    def without_empty_columns(self) -> DataTable:
        """Return the same without columns in which every cell is None."""
        columns = range(len(self.headings))
        filled = [index for index in columns if any(row[index] is not None for row in self.rows)]
        return DataTable(
            headings=[self.headings[index] for index in filled],
            rows=[[row[index] for index in filled] for row in self.rows],
            title=self.title,
            about=self.about,
        )


def text(value: object) -> str:
    """Return a cell: a dash for None, three significant digits or so for a float."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return number(value)
    return str(value)


def number(value: float) -> str:
    """Format a number with four digits: 0.1234, 1.234, 12.34, 123.4, 1,234."""
    if value == 0 or not abs(value) < 1e15:
        return str(value)
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f}"


def numeric(cells: Iterable[object]) -> bool:
    """Return whether a column holds numbers only (dashes, deviations, ranges)."""
    return all(re.fullmatch(r"[-+\d.,e]+( ± [\d.]+|\u2013[\d.,e]+)?", text(cell)) for cell in cells)


def show(console: Console, data: DataTable) -> None:
    """Print a table; columns of numbers are aligned right, and only text is wrapped."""
    table = Table(
        box=box.SIMPLE_HEAD, title=data.title or None, title_justify="left", padding=(0, 1, 0, 0)
    )
    for heading, right in zip(data.headings, data.numeric_columns, strict=True):
        table.add_column(
            heading,
            justify="right" if right else "left",
            overflow="fold",
            min_width=None if right else len(heading),
            no_wrap=right,
        )
    for row in data.rows:
        table.add_row(*(Text(escape_cell(text(value))) for value in row))
    console.print(table)


def assumed(assumptions: Iterable[str], of: str = "") -> list[str]:
    """Return a sentence for each assumption, once; `of` names the file that it is about."""
    about = of and f" about {of}"
    return [f"Assumed{about}: {line}." for line in dict.fromkeys(assumptions)]


def measured_lines(measured: Mapping[str, Any]) -> list[str]:
    """Return a sidecar's `measured` as lines, without the values in `measured_tables`.

    A value in another format than this version writes is shown without changes.
    """
    lines = []
    for name, value in measured.items():
        if name == "accuracy" and accuracies(measured):
            lines += [_accuracy(record) for record in accuracies(measured)]
        elif name == "average_precision" and _has_numbers(value, ("ap50", "ap", "objects", "n")):
            lines.append(
                f"average precision AP50 {value['ap50']:.2f} %, AP {value['ap']:.2f} % of "
                f"{plural(value['objects'], 'object')} in {plural(value['n'], 'image')} of "
                f"{value.get('data')}, {value.get('split')}"
            )
        elif name == "detection_parity" and _has_numbers(
            value, ("detections", "unmatched", "n", "score", "box")
        ):
            lines.append(
                f"parity with torch: {value['unmatched']} of {value['detections']} detections in "
                f"{plural(value['n'], 'image')} without a match, scores within "
                f"{value['score']:.1e}, boxes within {value['box']:.1e} pixels"
            )
        elif name == "drop" and _has_numbers(value, ("points", "low", "high", "n")):
            lines.append(
                f"drop {value['points']:.2f} points of top-1 (95 %: {value['low']:.2f} to "
                f"{value['high']:.2f}) on {plural(value['n'], 'image')} of {value.get('data')}"
            )
        elif not _is_table(name, value):
            lines.append(f"{name} {one_line(value)}")
    return lines


def measured_tables(measured: Mapping[str, Any]) -> list[DataTable]:
    """Return the tables in a sidecar's `measured`."""
    return [
        DataTable(
            headings=list(MEASURED[name].values()),
            rows=[[_cell(field, row[field]) for field in MEASURED[name]] for row in value],
        )
        for name, value in measured.items()
        if _is_table(name, value)
    ]


def one_line(value: Any) -> str:
    """Return a value of a few numbers on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {one_line(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(one_line, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _accuracy(record: Mapping[str, Any]) -> str:
    """Format an accuracy as "accuracy top-1 99.72 % (358 of 359), digits, test"."""
    if not _has_numbers(record, ("top1", "n")) or not record["n"]:
        return f"accuracy {one_line(dict(record))}"
    labels = record.get("labels")
    by_position = isinstance(labels, dict) and labels.get("matched_by") == "position"
    parts = [
        f"top-1 {100 * record['top1'] / record['n']:.2f} % ({record['top1']} of {record['n']})"
    ]
    if isinstance(record.get("top5"), int):
        parts.append(f"top-5 {100 * record['top5'] / record['n']:.2f} %")
    parts += [str(record[name]) for name in ("data", "split") if record.get(name)]
    parts += ["classes matched by position"] if by_position else []
    return f"accuracy {', '.join(parts)}"


def _is_table(name: str, value: Any) -> bool:
    return (
        name in MEASURED
        and isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and set(MEASURED[name]) <= set(row) for row in value)
    )


def _cell(field: str, value: Any) -> object:
    if not isinstance(value, float):
        return value
    shown = {"alone_db": f"{value:.1f}", "gain_db": f"{value:.2f}", "weights": f"{100 * value:.1f}"}
    return shown.get(field, f"{value:.0f}")


def _has_numbers(value: Any, names: Sequence[str]) -> bool:
    """Return whether a mapping has numbers under these names."""
    return isinstance(value, Mapping) and all(
        isinstance(value.get(name), int | float) for name in names
    )
