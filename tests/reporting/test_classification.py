"""The page of `eval --report`, in a real browser."""

from __future__ import annotations

import html
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest

from rtresnet.core.classification import ClassificationReport, Collector
from rtresnet.reporting import classification, gallery, pages

pytest.importorskip("matplotlib")
HOSTILE = '<img src=x onerror=alert(1)> "cat" & $x$'


def evaluated(classes: int = 3, n: int = 60, wrong: int = 9) -> ClassificationReport:
    """Return `n` images, `wrong` predicted as the next class; confidence rises with the index."""
    names = [HOSTILE, *(f"class {index}" for index in range(1, classes))]
    collector = Collector(names)
    labels = np.arange(n) % classes
    predicted = np.where(np.arange(n) < wrong, (labels + 1) % classes, labels)
    best = np.linspace(0.5, 0.99, n)
    probabilities = np.repeat((1 - best)[:, None] / (classes - 1), classes, axis=1)
    probabilities[np.arange(n), predicted] = best
    collector.add(np.arange(n), labels, probabilities)
    return collector.report(lambda index: f"photos/{HOSTILE}/{index}.jpg")


def attributes(dom: str, name: str) -> list[str]:
    """Return values of an attribute in a page, of any element."""
    values: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            values.extend(value or "" for key, value in attrs if key == name)

    Reader().feed(dom)
    return values


def page(report: ClassificationReport, side: int = 32) -> str:
    rng = np.random.default_rng(0)
    listed = classification.listed(report)[1:]  # one image cannot be read
    images = {i: rng.integers(0, 255, (side, side, 3), np.uint8) for i in listed}
    return pages.render(
        "evaluation.html", title="Evaluation", summary=["a.onnx: int8"], notes=["Note: x."],
        view=classification.view(report, images), command="rtresnet eval",
    )  # fmt: skip


def test_evaluation_page_with_hostile_names_is_rendered_as_text(
    browser: Callable[..., str],
) -> None:
    report = evaluated()
    dom = browser(page(report))
    assert "alert(1)" in dom and not attributes(dom, "onerror")
    assert dom.count("not readable") == 2  # the image is a mistake and uncertain
    assert dom.count("data:image/png") == len(report.mistakes) + len(report.uncertain) - 2
    assert "51 of 60" in dom and "85.00 %" in dom
    links = attributes(dom, "src") + attributes(dom, "href")
    assert links and all(link.startswith(("data:", "#")) for link in links)


def test_evaluation_page_lists_the_most_confident_mistake_first() -> None:
    shown = classification.view(evaluated(), {})
    assert shown.mistakes[0].place.endswith("/8.jpg")
    assert shown.mistakes[0].lines[0].startswith("56.6 %")
    assert [row[1] for row in shown.classes.rows] == [20, 20, 20]
    assert shown.classes.rows[0][2] == classification.percent(shown.report.classes[0].recall)


def test_confusion_matrix_rows_are_the_counts_of_each_class() -> None:
    report = evaluated()
    shown = classification.view(report, {})
    assert [[cell.n for cell in cells] for _, cells in shown.matrix] == report.matrix().tolist()


def test_evaluation_page_with_many_classes_lists_confusions_without_a_matrix() -> None:
    report = evaluated(classes=200, n=1000, wrong=100)
    shown = classification.view(report, {})
    assert not shown.matrix and len(shown.confusions.rows) == classification.LISTED
    assert "of 100" in shown.confusions.about and "of 200" in shown.classes.about


def test_evaluation_page_without_mistakes_says_so(browser: Callable[..., str]) -> None:
    dom = browser(page(evaluated(wrong=0)))
    assert "as another class" in dom and "confident mistakes" not in dom


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_evaluation_page_does_not_scroll_sideways(width: int, browser: Callable[..., str]) -> None:
    host = (
        f'<body><iframe style="border:0;width:{width}px;height:800px" '
        f'srcdoc="{html.escape(page(evaluated(classes=20)))}"></iframe><script>onload = () => {{'
        'const page = document.querySelector("iframe").contentDocument.documentElement;'
        'document.body.dataset.measured = page.scrollWidth + " of " + page.clientWidth;'
        "}</script></body>"
    )
    assert f'data-measured="{width} of {width}"' in browser(host)


def test_thumbnails_of_small_images_are_exact_and_of_large_ones_small() -> None:
    pixels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    small = gallery.tile(pixels, "a")
    assert small.pixelated and small.source.startswith("data:image/png")
    large = gallery.tile(np.zeros((160, 120, 3), np.uint8), "a")
    assert not large.pixelated and large.source.startswith("data:image/jpeg")
