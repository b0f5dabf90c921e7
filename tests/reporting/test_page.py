from __future__ import annotations

import html
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from rtresnet.reporting import pages
from rtresnet.reporting.tables import DataTable

LOG = [
    {
        "epoch": e, "train_top1": 50.0 + 10 * e, "val_top1": 45.0 + 10 * e, "loss": 1 / e,
        "images_per_second": 100.0,
    }
    for e in range(1, 5)
]  # fmt: skip


class Balanced(HTMLParser):
    """Fails on a tag that is closed by another."""

    VOID = ("meta", "link", "br", "path", "use", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def sample_page(words: str = "plain") -> str:
    pytest.importorskip("matplotlib")
    from rtresnet.reporting import plots

    return pages.render(
        "training.html", title="Title <1>", kept=words,
        curve=plots.svg(plots.training_figure(LOG), "errors"),
        progress=plots.svg(plots.progress_figure(LOG), "loss"), view=None,
        images=words, recipe=words, warnings=[words],
        epochs=DataTable(headings=("name", "ms"), rows=[("<b>bold</b>", 1.5), (words, None)]),
    )  # fmt: skip


def test_training_figures_leave_room_above_every_curve() -> None:
    pytest.importorskip("matplotlib")
    from rtresnet.reporting import plots

    log = [{**entry, "lr": 0.1 / entry["epoch"]} for entry in LOG[:2]]
    for drawing in (plots.training_figure(log), plots.progress_figure(log)):
        for axes in drawing.axes:
            highest = max(max(line.get_ydata()) for line in axes.lines)
            assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1.05 * highest


def test_the_page_is_self_contained_and_escaped() -> None:
    text = sample_page()
    Balanced().feed(text)
    assert "<b>bold</b>" not in text and "&lt;b&gt;bold" in text
    links = re.findall(r'(?:src|href)="([^"#]*)"', text)
    assert set(links) <= {"data:,"}
    assert "@import" not in text and "url(http" not in text


def test_plots_follow_the_pages_colours() -> None:
    text = sample_page()
    assert "#000000" not in text
    assert 'fill="currentColor"' in text


def test_the_same_numbers_give_the_same_page() -> None:
    assert sample_page() == sample_page()


def test_a_browser_renders_it_without_a_complaint(browser: Callable[[str], str]) -> None:
    dom = browser(sample_page())
    assert dom.count("<svg") == 2
    assert "Title &lt;1&gt;" in dom


def test_svg_label_with_markup_is_escaped() -> None:
    pytest.importorskip("matplotlib")
    from rtresnet.reporting import plots

    text = plots.svg(plots.training_figure([entry | {"lr": 0.1} for entry in LOG]), '"><script>')
    assert "<script>" not in text and "&quot;&gt;&lt;script&gt;" in text


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_page_with_long_words_does_not_scroll_sideways(
    width: int, browser: Callable[..., str]
) -> None:
    long = "x" * 300
    host = (
        f'<body><iframe style="border:0;width:{width}px;height:800px" '
        f'srcdoc="{html.escape(sample_page(long))}"></iframe><script>onload = () => {{'
        'const page = document.querySelector("iframe").contentDocument.documentElement;'
        'document.body.dataset.measured = page.scrollWidth + " of " + page.clientWidth;'
        "}</script></body>"
    )
    assert f'data-measured="{width} of {width}"' in browser(host)


def test_latency_distribution_with_a_long_tail_has_a_logarithmic_axis() -> None:
    pytest.importorskip("matplotlib")
    from rtresnet.reporting import plots

    tail = [0.4 + n / 1000 for n in range(95)] + [17.0] * 5
    text = plots.latency_distribution({"fp32": tail}, "ms")
    assert "latency, ms, logarithmic" in text and ">0.5</text>" in text and ">10</text>" in text
    assert "logarithmic" not in plots.latency_distribution({"fp32": [1.0, 2.0, 3.0]}, "ms")


def test_latency_distribution_draws_every_artifact_and_no_formula() -> None:
    pytest.importorskip("matplotlib")
    from rtresnet.reporting import plots

    text = plots.latency_distribution({f"${n}$": [1.0, 2.0] for n in range(8)}, "ms")
    for number in range(8):
        assert f">${number}$ (n=2)<" in text
