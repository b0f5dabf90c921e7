from __future__ import annotations

import io
import itertools

import pytest

pytest.importorskip("matplotlib")

from rtresnet.reporting.study import Line, Panel, error_curves, response_curves


def ends(axes: object) -> list[tuple[str, float]]:
    """Return the labels next to the lines' ends and their heights, as a share of the axes'."""
    return [(text.get_text(), text.xy[1]) for text in axes.texts]  # type: ignore[attr-defined]


def line(label: str, colour: int, y: list[float], dashed: bool = False) -> Line:
    return Line(label=label, colour=colour, dashed=dashed, x=[10, 20, 30, 40], y=y)


def test_error_curves_share_their_height_and_name_the_ends() -> None:
    plain = [line("", 0, [90, 30, 20, 10], dashed=True), line("plain8", 0, [90, 35, 25, 12])]
    residual = [line("resnet8", 0, [80, 10, 8, 7])]
    figure = error_curves(
        [Panel(title="plain", lines=plain), Panel(title="residual", lines=residual)],
        title="Degradation", subtitle="2,000 of the paper's 64,000 steps " * 6,
    )  # fmt: skip
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[1] == 100
    assert [drawn.get_linestyle() for drawn in left.lines] == ["--", "-"]
    assert [label for label, _ in ends(left)] == ["plain8"]
    figure.savefig(io.BytesIO(), format="png")


def test_the_first_quarter_of_a_run_does_not_set_the_height() -> None:
    curve = Line(label="a", colour=0, dashed=False, x=[1, 5, 10, 20], y=[95, 30, 20, 10])
    figure = error_curves([Panel(title="", lines=[curve])], title="t", subtitle="s")
    assert figure.axes[0].get_ylim()[1] == pytest.approx(1.12 * 30)


def test_labels_of_lines_that_end_together_stand_apart_above_the_floor() -> None:
    lines = [line(f"net{n}", n, [50, 20, 1, 0]) for n in range(5)]
    figure = error_curves([Panel(title="", lines=lines)], title="t", subtitle="s")
    heights = sorted(height for _, height in ends(figure.axes[0]))
    assert heights[0] >= 0
    assert all(b - a > 0.04 for a, b in itertools.pairwise(heights))


def test_responses_are_drawn_in_layer_order_and_sorted() -> None:
    lines = [line("plain8", 0, [3, 1, 2, 4], dashed=True), line("resnet8", 1, [1, 2, 1, 1])]
    order, magnitude = response_curves(lines, subtitle="s").axes
    assert list(order.lines[0].get_ydata()) == [3, 1, 2, 4]
    assert list(magnitude.lines[0].get_ydata()) == [4, 3, 2, 1]
    assert [text.get_text() for text in order.get_legend().get_texts()] == ["plain8", "resnet8"]
