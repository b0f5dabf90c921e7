from __future__ import annotations

import io

import pytest
from rich.console import Console

from rtresnet.reporting import tables


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"), (0.0, "0.0"), (0.00012, "1.2e-04"), (0.1234, "0.123"), (1.2345, "1.234"),
        (12.345, "12.35"), (123.45, "123.5"), (1234.5, "1,234"), (7, "7"), ("a", "a"),
        (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_cells_are_readable(value: object, shown: str) -> None:
    assert tables.text(value) == shown


def test_numbers_are_set_right_and_nothing_is_read_as_markup() -> None:
    out = io.StringIO()
    rows = [("a[cpu]", 1.0), ("b", 100.0), ("c", None)]
    data = tables.DataTable(headings=("name", "ms"), rows=rows)
    tables.show(Console(file=out, width=60), data)
    lines = [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
    assert any("a[cpu]" in line for line in lines)
    ends = {len(line) for line in lines if line.strip().startswith(("a[", "b ", "c "))}
    assert len(ends) == 1


def test_means_with_their_deviations_are_numbers() -> None:
    assert tables.numeric(["12.34 ± 0.56", "7.00", None])
    assert not tables.numeric(["12.34 ± 0.56", "diverged"])


def test_show_many_columns_breaks_names_and_no_number() -> None:
    headings = ("file", "median", "p90", "p95", "p99", "img/s")
    row = ("resnet152-" * 6, *(f"{n}1,234,567.8" for n in range(1, 6)))
    out = io.StringIO()
    tables.show(Console(file=out, width=80), tables.DataTable(headings=headings, rows=[row]))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert set(row[1:]) <= set(out.getvalue().split())
