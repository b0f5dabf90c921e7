from __future__ import annotations

import pytest

from rtresnet.reporting import tables

ACCURACY = {"n": 48, "top1": 36, "top5": None, "data": "digits", "split": "test"}
BLOCK = {"name": "layer1.0", "alone_db": 31.25, "gain_db": 0.5, "weights": 0.125, "runs_in": "int8"}


def test_lines_accuracies_have_a_line_each_with_n_and_data() -> None:
    position = {"data": "npz:x", "labels": {"matched_by": "position"}}
    lines = tables.measured_lines({"accuracy": [ACCURACY, ACCURACY | position]})
    assert lines == [
        "accuracy top-1 75.00 % (36 of 48), digits, test",
        "accuracy top-1 75.00 % (36 of 48), npz:x, test, classes matched by position",
    ]
    assert tables.measured_lines({"accuracy": ACCURACY}) == lines[:1]  # of an earlier version


def test_lines_and_listings_of_the_gate_hold_no_raw_dicts() -> None:
    outlier = {"tensor": "layer1.0.add", "channels": 3, "times": 11.7, "remedy": "unchanged"}
    drop = {"n": 400, "points": 0.25, "low": -0.44, "high": 0.94, "data": "digits"}
    gate = {"verdict": "not shown to hold", "bound": 0.5, "images_needed": None}
    output = {"drop": drop, "gate": gate, "blocks": [BLOCK], "outliers": [outlier]}
    assert tables.measured_lines(output) == [
        "drop 0.25 points of top-1 (95 %: -0.44 to 0.94) on 400 images of digits",
        "gate verdict not shown to hold, bound 0.5, images_needed None",
    ]
    blocks, outliers = tables.measured_tables(output)
    assert blocks.rows == [["layer1.0", "31.2", "0.50", "12.5", "int8"]]
    assert outliers.rows == [["layer1.0.add", 3, "12", "unchanged"]]
    assert all(len(row) == len(t.headings) for t in (blocks, outliers) for row in t.rows)


@pytest.mark.parametrize(
    "odd",
    [{"accuracy": 3}, {"accuracy": [{}]}, {"accuracy": {"n": 0, "top1": 0}}, {"drop": {"n": 1}},
     {"blocks": [{}]}, {"blocks": "x"}, {"outliers": [3]}, {"parity": [0.5, 1e-6]}],
)  # fmt: skip
def test_lines_of_another_form_are_shown_as_they_are(odd: dict[str, object]) -> None:
    assert len(tables.measured_lines(odd)) == 1 and tables.measured_tables(odd) == []
