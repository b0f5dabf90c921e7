"""Ten minutes of `rtresnet serve` with well-behaved and hostile clients; memory of the server.

    python benchmarks/serving_soak.py [--seconds 600] [--requests 200000]

Well-behaved clients send requests over HTTP and gRPC, each with an id of its own, and check id and
logits of every answer. An answer that does not come counts as lost; bytes that nobody asked for
count as answered twice. Hostile clients run at the same time: they disconnect within and after
their request, send garbage, ask with a time limit that no server can meet, and send heads byte by
byte. The run ends when both limits are reached. Then SIGTERM must end the server with exit code 0,
and its own count must be that of the clients. The net is ResNet-20 at 32 px, untrained, FP32.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from common import markdown, rtresnet, save
from load_generator import Connection, binary_request

from rtresnet import load
from rtresnet.core import hardware

NAME = "resnet20"
PATH = f"/v2/models/{NAME}/infer"
MB = 1 << 20


class Soak:
    """Clients of one server, and what happened to them."""

    def __init__(self, port: int, grpc: str, images: np.ndarray, logits: np.ndarray) -> None:
        self.port, self.grpc, self.images, self.logits = port, grpc, images, logits
        self.counts: dict[str, int] = {}
        self.problems: list[str] = []
        self.stop = False
        self._number = 0

    def count(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def next_request(self, **parameters: int) -> tuple[str, int, bytes]:
        """Return (id, index of the image, whole HTTP request)."""
        self._number += 1
        index = self._number % len(self.images)
        return (
            f"r{self._number}",
            index,
            binary_request(PATH, self.images[index], f"r{self._number}", parameters),
        )

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, "127.0.0.1", self.port)
        return connection

    async def good(self) -> None:
        """Send one request at a time on a kept-alive connection."""
        connection = await self._open()
        while not self.stop:
            identity, index, request = self.next_request()
            try:
                status, body = await asyncio.wait_for(connection.ask(request), 60)
            except (OSError, asyncio.TimeoutError) as error:
                self.problems.append(f"lost {identity}: {type(error).__name__}")
                connection = await self._open()
                continue
            header, data = body[: -self.logits[0].nbytes], body[-self.logits[0].nbytes :]
            if status != 200 or json.loads(header)["id"] != identity:
                self.problems.append(f"{identity}: status {status}, {body[:80]!r}")
            elif np.abs(np.frombuffer(data, np.float32) - self.logits[index]).max() > 1e-3:
                self.problems.append(f"{identity}: another image's logits")
            self.count("http")
            if connection.unexpected:
                self.problems.append(f"{identity}: answered twice")
            await asyncio.sleep(0)
        connection.transport.close()

    async def good_grpc(self) -> None:
        """Send requests over gRPC, with tritonclient."""
        import tritonclient.grpc.aio as triton

        client = triton.InferenceServerClient(self.grpc)
        tensor = triton.InferInput("images", [1, *self.images.shape[1:]], "FP32")
        while not self.stop:
            identity, index, _ = self.next_request()
            tensor.set_data_from_numpy(self.images[index][None])
            result = await client.infer(NAME, [tensor], request_id=identity)
            difference = np.abs(result.as_numpy("logits")[0] - self.logits[index]).max()
            if result.get_response().id != identity or difference > 1e-3:
                self.problems.append(f"{identity}: another answer over gRPC")
            self.count("grpc")
        await client.close()

    async def hostile(self, seed: int) -> None:
        """Send one kind of bad request after another."""
        rng = random.Random(seed)
        actions = (self._disconnect, self._garbage, self._broken, self._expired, self._slow)
        while not self.stop:
            action = rng.choice(actions)
            try:
                await action(rng)
            except OSError:
                self.count("refused connection")
            self.count(action.__name__.lstrip("_"))
            await asyncio.sleep(0.02)

    async def _disconnect(self, rng: random.Random) -> None:
        connection = await self._open()
        _, _, request = self.next_request()
        connection.transport.write(request[: rng.choice((30, 200, 5000, len(request)))])
        await asyncio.sleep(rng.random() * 0.01)
        connection.transport.abort() if rng.random() < 0.5 else connection.transport.close()

    async def _garbage(self, rng: random.Random) -> None:
        connection = await self._open()
        connection.transport.write(rng.randbytes(rng.choice((10, 1000, 100_000))))
        await asyncio.sleep(0.02)
        connection.transport.close()

    async def _broken(self, rng: random.Random) -> None:
        connection = await self._open()
        _, _, request = self.next_request()
        place = request.index(b"\r\n\r\n") + 4 + rng.randrange(60)
        request = request[:place] + b"\0" + request[place + 1 :]
        status, body = await asyncio.wait_for(connection.ask(request), 60)
        if status != 400:
            self.problems.append(f"broken JSON: status {status}, {body[:80]!r}")
        connection.transport.close()

    async def _expired(self, rng: random.Random) -> None:
        connection = await self._open()
        status, _ = await asyncio.wait_for(connection.ask(self.next_request(timeout=1)[2]), 60)
        if status not in (200, 504):
            self.problems.append(f"time limit of 1 us: status {status}")
        self.count(f"time limit: status {status}")
        connection.transport.close()

    async def _slow(self, rng: random.Random) -> None:
        connection = await self._open()
        for byte in self.next_request()[2][: rng.randrange(1, 20)]:
            if connection.transport.is_closing():
                break
            connection.transport.write(bytes([byte]))
            await asyncio.sleep(0.05)
        connection.transport.close()

    async def run(self, process: psutil.Process, seconds: float, requests: int) -> dict[str, Any]:
        """Run all clients, and sample the server's memory at least every few seconds."""
        begin, memory = time.monotonic(), []
        clients = [self.good() for _ in range(4)] + [self.hostile(seed) for seed in range(4)]
        if hardware.installed("tritonclient"):
            clients.append(self.good_grpc())
        tasks = [asyncio.ensure_future(client) for client in clients]
        while True:
            await asyncio.sleep(min(5.0, seconds / 20))
            answered = self.counts.get("http", 0) + self.counts.get("grpc", 0)
            elapsed = time.monotonic() - begin
            memory.append((round(elapsed, 1), answered, process.memory_info().rss))
            broken = [task for task in tasks if task.done()]
            if broken or (elapsed > seconds and answered >= requests):
                break
        self.stop = True
        await asyncio.gather(*tasks)
        return {"seconds": time.monotonic() - begin, "answered": answered, "memory": memory}


def memory_growth(memory: list[tuple[float, int, int]], requests: int) -> dict[str, float]:
    """Return megabytes of the server: after the first tenth, at the end, and the growth between."""
    settled = next(entry for entry in memory if entry[1] >= requests / 10)
    return {
        "first_mb": settled[2] / MB,
        "last_mb": memory[-1][2] / MB,
        "largest_mb": max(entry[2] for entry in memory) / MB,
        "growth_mb": (memory[-1][2] - settled[2]) / MB,
        "requests_between": memory[-1][1] - settled[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--name", default="serving-soak")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rtresnet("export", "--model", NAME, "--weights", "untrained", "--fp32", "--no-plan",
                 cwd=folder)  # fmt: skip
        (path,) = folder.rglob(f"{NAME}*.onnx")
        images = np.random.default_rng(0).standard_normal((64, 3, 32, 32), dtype=np.float32)
        with load(path, provider="cpu") as session:
            logits = session.logits(images)
            where: dict[str, Any] = session.describe()
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", "rtresnet", "serve", path, "--provider", "cpu", "--threads",
                 "1", "--port", "0", "--grpc-port", "0"],
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
            assert server.stdout is not None
            web, rpc = (server.stdout.readline().strip().split("//")[1] for _ in range(2))
            soak = Soak(int(web.rpartition(":")[2]), rpc, images, logits)
            try:
                measured = uvloop.run(
                    soak.run(psutil.Process(server.pid), options.seconds, options.requests)
                )
                server.send_signal(signal.SIGTERM)
                exit_code = server.wait(60)
            finally:
                server.kill()
        log_text = (folder / "log").read_text()
    failures = [line for line in log_text.splitlines() if '"level": "error"' in line]
    record: dict[str, Any] = {
        **measured, "counts": soak.counts, "problems": soak.problems, "exit_code": exit_code,
        "errors_in_log": failures[:20], "growth": memory_growth(measured["memory"],
                                                                options.requests),
        "load_before": load_before,
    } | where  # fmt: skip
    growth = record["growth"]
    rows = [(
        f"{measured['seconds']:.0f}", f"{measured['answered']:,}",
        f"{sum(n for kind, n in soak.counts.items() if kind in HOSTILE):,}",
        len(soak.problems), len(failures), exit_code, f"{growth['first_mb']:.1f}",
        f"{growth['last_mb']:.1f}", f"{growth['requests_between']:,}",
    )]  # fmt: skip
    headings = (
        "s", "answers checked", "hostile clients", "lost, wrong or duplicate", "errors in the log",
        "exit code", "memory after a tenth, MB", "at the end, MB", "requests between",
    )  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    caption = (
        f"ResNet-20, 32 px, FP32, untrained; {hardware.cpu()}, {where['provider']}, 1 thread, "
        f"{versions}. Hostile: "
        + ", ".join(f"{n:,} {kind}" for kind, n in soak.counts.items() if kind in HOSTILE)
        + f". The machine was shared: load {load_before:.1f} before the start."
    )
    save(options.name, record, markdown(headings, rows) + "\n\n" + caption)
    sys.exit(bool(soak.problems or failures or exit_code))


HOSTILE = ("disconnect", "garbage", "broken", "expired", "slow")

if __name__ == "__main__":
    main()
