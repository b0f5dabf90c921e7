"""The server's page in a real browser: an image is classified, on a phone too."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import Server, wait_for

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-port=0",
)  # fmt: skip


class Browser:
    """Chromium, driven over its debugging protocol."""

    def __init__(self, chromium: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [chromium, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port = folder / "DevToolsActivePort"
        wait_for(lambda: port.exists() and bool(port.read_text()))
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port.read_text().split()[0]}/json"
        ) as answer:
            page = next(t for t in json.load(answer) if t["type"] == "page")
        host, _, path = page["webSocketDebuggerUrl"].removeprefix("ws://").partition("/")
        self.socket = socket.create_connection((host.split(":")[0], int(host.split(":")[1])))
        self.socket.settimeout(30)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._read(1)
        self.number = 0

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += self.socket.recv(count - len(data))
        return data

    def call(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        message = json.dumps({"id": self.number, "method": method, "params": parameters}).encode()
        length = (
            struct.pack(">B", 0x80 | len(message)) if len(message) < 126
            else struct.pack(">BH", 0x80 | 126, len(message))
        )  # fmt: skip
        self.socket.sendall(b"\x81" + length + bytes(4) + message)  # a mask of zeros
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        data = b""
        while True:
            first, second = self._read(2)
            size = second & 127
            if size == 126:
                (size,) = struct.unpack(">H", self._read(2))
            elif size == 127:
                (size,) = struct.unpack(">Q", self._read(8))
            data += self._read(size)
            if first & 0x80:
                return json.loads(data)  # type: ignore[no-any-return]

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression)["result"].get("value")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser here")
    running = Browser(chromium, tmp_path / "profile")
    yield running
    running.process.kill()
    running.process.wait()


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
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", files=[str(image)], nodeId=node)
    shown = "document.querySelector('#classes').innerText"
    wait_for(lambda: "%" in (browser.evaluate(shown) or ""))
    split = browser.evaluate("document.querySelector('#split').innerText")
    assert "wait for a batch" in split and "compute" in split
    total = "document.querySelector('#total').innerText"  # from the status, asked for every second
    wait_for(lambda: (browser.evaluate(total) or "").isdecimal() and browser.evaluate(total) != "0")
    assert browser.evaluate("document.querySelectorAll('#histogram rect').length") >= 1
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert "resnet8.onnx" in browser.evaluate("document.querySelector('#chain').innerText")
