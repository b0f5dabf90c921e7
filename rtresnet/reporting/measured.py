"""What a sidecar's `measured` says, as lines and tables for a terminal.

Reads tolerantly: what has another form than this version writes is shown as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rtresnet.core.sidecar import accuracies
from rtresnet.reporting.tables import Row

BLOCKS = ("name", "alone_db", "gain_db", "weights", "runs_in")
OUTLIERS = ("tensor", "channels", "times", "remedy")
HEADINGS = {
    BLOCKS: ("block", "SNR alone, dB", "in float, dB gained", "% of weights", "runs in"),
    OUTLIERS: ("outlier", "channels", "times the median", "remedy"),
}


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A table of what was measured for each block or tensor."""

    headings: Sequence[str]
    rows: Sequence[Row]


def lines(measured: Mapping[str, Any]) -> list[str]:
    """A line for each measurement that is no table."""
    found = []
    for name, value in measured.items():
        if name == "accuracy" and accuracies(measured):
            found += [_accuracy(record) for record in accuracies(measured)]
        elif name == "drop" and _has(value, ("points", "low", "high", "n")):
            found.append(
                f"drop {value['points']:.2f} points of top-1 (95 %: {value['low']:.2f} to "
                f"{value['high']:.2f}) on {value['n']} images of {value.get('data')}"
            )
        elif not _listing(name, value):
            found.append(f"{name} {plain(value)}")
    return found


def listings(measured: Mapping[str, Any]) -> list[Listing]:
    """The tables."""
    found = (_listing(name, value) for name, value in measured.items())
    return [listing for listing in found if listing]


def plain(value: Any) -> str:
    """A value of a few numbers on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _accuracy(record: Mapping[str, Any]) -> str:
    """As in "accuracy top-1 99.72 % (358 of 359), digits, test"."""
    if not _has(record, ("top1", "n")) or not record["n"]:
        return f"accuracy {plain(dict(record))}"
    labels = record.get("labels")
    by = labels.get("matched_by") if isinstance(labels, dict) else None
    parts = [
        f"top-1 {100 * record['top1'] / record['n']:.2f} % ({record['top1']} of {record['n']})"
    ]
    if isinstance(record.get("top5"), int):
        parts.append(f"top-5 {100 * record['top5'] / record['n']:.2f} %")
    parts += [str(record[name]) for name in ("data", "split") if record.get(name)]
    parts += ["classes matched by position"] if by == "position" else []
    return f"accuracy {', '.join(parts)}"


def _listing(name: str, value: Any) -> Listing | None:
    columns = {"blocks": BLOCKS, "outliers": OUTLIERS}.get(name)
    if columns is None or not isinstance(value, list) or not value:
        return None
    if not all(isinstance(entry, dict) and set(columns) <= set(entry) for entry in value):
        return None
    rows = [[_cell(column, entry[column]) for column in columns] for entry in value]
    return Listing(headings=HEADINGS[columns], rows=rows)


def _cell(column: str, value: Any) -> object:
    if not isinstance(value, float):
        return value
    shown = {"alone_db": f"{value:.1f}", "gain_db": f"{value:.2f}", "weights": f"{100 * value:.1f}"}
    return shown.get(column, f"{value:.0f}")


def _has(value: Any, names: Sequence[str]) -> bool:
    """Whether a mapping holds numbers under these names."""
    return isinstance(value, Mapping) and all(
        isinstance(value.get(name), int | float) for name in names
    )
