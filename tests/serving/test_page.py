"""The server's page in a real browser: an image is classified, on a phone too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, wait_for
from tests.serving.conftest import Server


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser here")
    running = Browser(chromium, tmp_path / "profile")
    yield running
    running.close()


@pytest.mark.slow
def test_page_classifies_an_image_and_fits_a_phone(
    browser: Browser, server: Server, photo: bytes, tmp_path: Path
) -> None:
    image = tmp_path / "photo.png"
    image.write_bytes(photo)
    width = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.call("Emulation.setDeviceMetricsOverride", **width)
    browser.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
    wait_for(lambda: "resnet8" in (browser.evaluate("document.body.innerText") or ""))
    browser.choose_file("#file", image)
    shown = "document.querySelector('#classes').innerText"
    wait_for(lambda: "%" in (browser.evaluate(shown) or ""))
    split = browser.evaluate("document.querySelector('#split').innerText")
    assert "wait for a batch" in split and "compute" in split
    total = "document.querySelector('#total').innerText"  # from the status, asked for every second
    wait_for(lambda: (browser.evaluate(total) or "").isdecimal() and browser.evaluate(total) != "0")
    assert browser.evaluate("document.querySelectorAll('#histogram rect').length") >= 1
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert "resnet8.onnx" in browser.evaluate("document.querySelector('#chain').innerText")
