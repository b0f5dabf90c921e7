"""Pages of a data set and of flipped images, in a real browser."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rtresnet.core.flips import Flip
from rtresnet.reporting import pages
from rtresnet.workflows.data import (
    AugmentedBatch,
    DataInspectResult,
    DuplicatePair,
    ImageRef,
    SplitSummary,
)
from tests.reporting.test_classification import HOSTILE, attributes

pytest.importorskip("jinja2")
PIXELS = np.full((32, 32, 3), 200, np.uint8)


def reference(split: str, index: int) -> ImageRef:
    return ImageRef(split=split, index=index, place=f"{split}/{index}.jpg", label=HOSTILE)


def split(name: str, counts: tuple[int, ...]) -> SplitSummary:
    return SplitSummary(
        name=name, images=sum(counts), counts=counts, broken=(f"{name}/<b>.jpg: truncated",),
        ignored=("1 file outside the class folders ignored: <i>.jpg",),
        transparent=1, widths=(8, 16, 32, 64, 128), heights=(8, 16, 32, 64, 128), coarse=0,
        samples=tuple(reference(name, index) for index in range(3)),
    )  # fmt: skip


def data_page(folder: Path) -> str:
    pairs = [
        DuplicatePair(first=reference("train", 1), second=reference("train", 5), exact=True),
        DuplicatePair(first=reference("train", 2), second=reference("test", 7), exact=False),
    ]
    result = DataInspectResult(
        data="photos", classes=(HOSTILE, "dog"),
        splits=(split("train", (30, 12)), split("test", (7, 0))), duplicates=tuple(pairs),
    )  # fmt: skip
    assert pages.data_images(result) == {"train": [0, 1, 2, 5], "test": [0, 1, 2, 7]}
    images = {
        (name, index): PIXELS
        for name, indices in pages.data_images(result).items()
        for index in indices
    }
    batch = AugmentedBatch(
        pixels=np.stack([PIXELS] * 4), labels=("cat",) * 4, mixed=("cat", "dog", "cat", "dog"),
        share=0.7, recipe=(),
    )  # fmt: skip
    return pages.write_data(folder, result, images, batch).read_text()


def flips_page(folder: Path) -> str:
    flip = Flip(
        index=3, place="a/3.jpg", label="cat", reference="cat", reference_probability=0.51,
        candidate=HOSTILE, candidate_probability=0.47,
    )  # fmt: skip
    return pages.write_flips(folder, [flip], {3: PIXELS}, title="T", summary=["S"]).read_text()


def test_data_page_shows_duplicates_across_splits_first(
    tmp_path: Path, browser: Callable[..., str]
) -> None:
    dom = browser(data_page(tmp_path))
    assert "1 pair of duplicates has one image in each split" in dom.replace("\n", " ")
    assert dom.index("near-duplicate</p>") < dom.index("identical</p>")
    assert "test/&lt;b&gt;.jpg: truncated" in dom and not attributes(dom, "onerror")
    assert len(attributes(dom, "alt")) == 6 + 4 + 4 and "cat + dog" in dom


def test_flips_page_shows_both_answers(tmp_path: Path, browser: Callable[..., str]) -> None:
    dom = browser(flips_page(tmp_path))
    assert "cat: lost" in dom and "cat 51.0 %" in dom and "47.0 %" in dom
    assert not attributes(dom, "onerror")
    empty = pages.write_flips(tmp_path, [], {}, title="T", summary=[]).read_text()
    assert "changes its class" in empty


@pytest.mark.parametrize("make", [data_page, flips_page])
def test_gallery_pages_do_not_scroll_sideways_on_a_phone(
    make: Callable[[Path], str], tmp_path: Path, browser: Callable[..., str]
) -> None:
    host = (
        '<body><iframe style="border:0;width:320px;height:800px" '
        f'srcdoc="{html.escape(make(tmp_path))}"></iframe><script>onload = () => {{'
        'const page = document.querySelector("iframe").contentDocument.documentElement;'
        'document.body.dataset.measured = page.scrollWidth + " of " + page.clientWidth;'
        "}</script></body>"
    )
    assert 'data-measured="320 of 320"' in browser(host)
