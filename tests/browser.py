"""Chromium, driven over its debugging protocol, for tests and for the documentation's pictures."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-port=0",
)  # fmt: skip


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


class Browser:
    """A running Chromium with one page.

    Args:
        chromium: The program.
        folder: Its profile; it is created.
    """

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
        """Call a method of the debugging protocol; return its result."""
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

    def choose_file(self, selector: str, file: Path) -> None:
        """Put a file into the file input that a CSS selector names."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def close(self) -> None:
        """End the browser."""
        self.process.kill()
        self.process.wait()

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression)["result"].get("value")
