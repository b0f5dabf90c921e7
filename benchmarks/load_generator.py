"""Sends requests to a server over kept-alive connections, and measures latencies.

Open loop: requests arrive as a Poisson process, whatever the server does, and a latency counts from
the intended arrival, so that a slow server or a late generator cannot hide. Closed loop: a number
of callers each send their next request when the last was answered. Every answer is compared with
the expected one. Independent of the kind of server.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httptools
import numpy as np
import uvloop


@dataclass(kw_only=True)
class LoadResult:
    """Latencies and failures of one run.

    Attributes:
        latencies: Seconds from the intended arrival to the whole answer.
        late: Seconds by which requests were sent after their intended arrival.
        failed: Requests without the expected answer, by what came instead.
        seconds: From the first request to the last answer.
        cpu_seconds: Of this process.
    """

    latencies: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def quantile_ms(self, share: float) -> float:
        """Return a quantile of the latencies in milliseconds."""
        return float(np.quantile(self.latencies, share)) * 1000 if self.latencies else np.inf

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds


def binary_request(
    path: str, image: np.ndarray, identity: str = "", parameters: dict[str, int] | None = None
) -> bytes:
    """Return an HTTP request of the Open Inference Protocol: one image, binary both ways."""
    header = {
        "id": identity,
        "parameters": parameters or {},
        "inputs": [{"name": "images", "datatype": "FP32", "shape": [1, *image.shape],
                    "parameters": {"binary_data_size": image.nbytes}}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }  # fmt: skip
    head = json.dumps(header).encode()
    return post(path, head + image.tobytes(), f"Inference-Header-Content-Length: {len(head)}\r\n")


def post(path: str, body: bytes, fields: str = "") -> bytes:
    """Return a whole HTTP request."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{fields}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection with one request at a time.

    Attributes:
        unexpected: Bytes that came without a request.
    """

    def __init__(self) -> None:
        self.transport: Any = None
        self.unexpected = 0
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """Send a request; the future has the status and the body."""
        self._parser, self._body = httptools.HttpResponseParser(self), bytearray()
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.unexpected += len(data)
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._answer.set_exception(ConnectionError(str(error)))

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), bytes(self._body)))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("connection lost"))


def _equal(data: bytes, expected: np.ndarray) -> bool:
    if len(data) != expected.nbytes:
        return False
    return bool(np.abs(np.frombuffer(data, np.float32) - expected).max() < 1e-3)


class Client:
    """Connections to one server, and one request for each image.

    Args:
        port: On 127.0.0.1.
        requests: Whole HTTP requests; they are sent in turn.
        expected: For each, the last bytes of the body that answers it, as float32.
    """

    def __init__(self, port: int, requests: list[bytes], expected: list[np.ndarray]) -> None:
        self._port, self._requests, self._expected = port, requests, expected
        self.pid = 0  # of the server, if the caller states it
        self._idle: list[Connection] = []
        self._next = 0

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
        return connection

    async def _one(self, intended: float, measured: LoadResult) -> None:
        index = self._next = (self._next + 1) % len(self._requests)
        problem = ""
        try:
            connection = await self._connection()
            measured.late.append(time.perf_counter() - intended)
            status, body = await asyncio.wait_for(connection.ask(self._requests[index]), 60)
            measured.latencies.append(time.perf_counter() - intended)
            self._idle.append(connection)
            expected = self._expected[index]
            if status != 200:
                problem = f"status {status}"
            elif not _equal(body[-expected.nbytes :], expected):
                problem = "wrong logits"
        except (OSError, asyncio.TimeoutError) as error:
            problem = type(error).__name__
        if problem:
            measured.failed[problem] = measured.failed.get(problem, 0) + 1

    async def _open(self, rate: float, seconds: float, seed: int) -> LoadResult:
        gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds))
        measured, tasks = LoadResult(), []
        begin, cpu = time.perf_counter() + 0.05, time.process_time()
        for intended in begin + np.cumsum(gaps):
            while (left := intended - time.perf_counter()) > 0:
                await asyncio.sleep(left if left > 0.002 else 0)
            tasks.append(asyncio.ensure_future(self._one(intended, measured)))
        await asyncio.gather(*tasks)
        measured.seconds = time.perf_counter() - begin
        measured.cpu_seconds = time.process_time() - cpu
        return measured

    async def _closed(self, callers: int, seconds: float) -> LoadResult:
        measured, begin, cpu = LoadResult(), time.perf_counter(), time.process_time()

        async def caller() -> None:
            while (now := time.perf_counter()) < begin + seconds:
                await self._one(now, measured)

        await asyncio.gather(*(caller() for _ in range(callers)))
        measured.seconds = time.perf_counter() - begin
        measured.cpu_seconds = time.process_time() - cpu
        return measured

    def open_loop(self, rate: float, seconds: float, seed: int) -> LoadResult:
        """Send requests with Poisson arrivals at `rate` requests/s."""
        return self._run(self._open(rate, seconds, seed))

    def closed_loop(self, callers: int, seconds: float) -> LoadResult:
        """Keep `callers` requests in flight at any time."""
        return self._run(self._closed(callers, seconds))

    def _run(self, work: Any) -> LoadResult:
        async def once() -> LoadResult:
            measured: LoadResult = await work
            for connection in self._idle:
                connection.transport.close()
            self._idle.clear()
            return measured

        return uvloop.run(once())
