from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

import rtresnet

T = TypeVar("T")

for package in ("starlette", "uvicorn", "grpc", "prometheus_client", "onnxruntime"):
    pytest.importorskip(package)


class Server:
    """`rtresnet serve` as a process of its own, on free ports."""

    def __init__(self, folder: Path, *arguments: object, env: dict[str, str] | None = None) -> None:
        self.log = folder / "serve.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rtresnet", "serve", *map(str, arguments),
                 "--port", "0", "--grpc-port", "0"],
                stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | (env or {}),
            )  # fmt: skip
        self.http, self.grpc = self._line("http://"), self._line("grpc://")
        self.port = int(self.http.rpartition(":")[2])

    def _line(self, scheme: str) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()  # empty where the process ended
        assert line.startswith(scheme), f"{line}\n{self.log.read_text()}"
        return line.removeprefix(scheme)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def events(self) -> list[str]:
        return re.findall(r'"event": "(.*?)"', self.log.read_text())


@pytest.fixture(scope="session")
def models(engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """resnet8.onnx and resnet8-int8.onnx with their sidecars."""
    folder = tmp_path_factory.mktemp("served")
    for name in ("resnet8.onnx", "resnet8-int8.onnx"):
        for suffix in ("", ".json"):
            shutil.copy(engines / f"{name}{suffix}", folder)
    return folder


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of both models that the tests share."""
    running = Server(
        tmp_path_factory.mktemp("server"), models / "resnet8.onnx", models / "resnet8-int8.onnx",
        "--max-body-mb", 2, "--max-wait", "1ms",
    )  # fmt: skip
    yield running
    assert running.process.poll() is None, "a request ended the server"
    assert running.stop() == 0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers that are killed at the end if they still run."""
    started: list[Server] = []

    def run(*arguments: object, **options: dict[str, str]) -> Server:
        started.append(Server(tmp_path, *arguments, **options))
        return started[-1]

    yield run
    for running in started:
        running.process.kill()
        running.process.wait()


@pytest.fixture(scope="session")
def photo() -> bytes:
    """An encoded image of another size than the net's."""
    from PIL import Image

    pixels = np.random.default_rng(3).integers(0, 255, (70, 50, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def served(
    sources: list[Path],
    ask: Callable[[list[str]], T],
    config: rtresnet.ServeConfig,
    runtime: rtresnet.RuntimeConfig | None = None,
) -> T:
    """Serve in this process until `ask` has returned; returns what it returned.

    Args:
        sources: What is served.
        ask: A client, which gets the lines of `on_ready`. It runs in a thread.
        config: Options of the server.
        runtime: Where the models run.
    """
    with ThreadPoolExecutor(1) as pool:
        answers: list[Future[T]] = []

        def on_ready(lines: list[str]) -> None:
            answers.append(pool.submit(ask, lines))
            answers[0].add_done_callback(lambda _: os.kill(os.getpid(), signal.SIGTERM))

        assert rtresnet.serve(sources, config, runtime=runtime, on_ready=on_ready) == 0
    return answers[0].result()
