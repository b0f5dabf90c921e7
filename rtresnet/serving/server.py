"""Run the server: HTTP and gRPC, logs, signals, limits on connections, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rtresnet.core.errors import InputError, UnavailableError
from rtresnet.runtime.batcher import short_switch_interval
from rtresnet.runtime.session import Session
from rtresnet.serving.config import ServeConfig, check_tls, read_token
from rtresnet.serving.grpc_service import Service
from rtresnet.serving.http import Api
from rtresnet.serving.repository import Repository

log = logging.getLogger("rtresnet.serve")

HEADER_BYTES, IDLE_SECONDS = 32 * 1024, 75
HEADER_SECONDS = 10.0  # within which the head of a request must arrive
BODY_SECONDS = 30.0  # within which its body must arrive
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
CONNECTIONS = 2048
ACCEPT_SECONDS = 0.1  # for connections that wait in the queue when no new ones are taken
ACCEPTED_SECONDS = 0.5  # that a new connection without a request stays open during shutdown
LEAVE_SECONDS = 0.5  # of answering while not ready, so that load balancers notice it


class _Protocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits on a request's head and on the time that it takes.

    A request has this object as `request.state.connection`.
    """

    on_lost: Callable[[], None] | None = None
    _timer: asyncio.TimerHandle | None = None
    _head = 0  # bytes of the head until now
    _in_body = _begun = _ending = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_within(HEADER_SECONDS)

    def _expect_within(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._too_slow) if seconds else None

    def _too_slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            if not self.pipeline and (self.cycle is None or not self.cycle.response_started):
                self.transport.write(TOO_SLOW)
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            self._head += len(data)
            # The head may arrive together with the first bytes of the body: allow for both.
            if self._head > HEADER_BYTES + 256 * 1024:
                self.send_400_response("Request header too large")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._fields, self._in_body = 0, 0, False
        if self._timer is None:
            self._expect_within(HEADER_SECONDS)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += len(name) + len(value)
        if self._fields > HEADER_BYTES:
            raise ValueError("header too large")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._expect_within(BODY_SECONDS)
        self._in_body = self._begun = True
        self.scope["state"]["connection"] = self
        super().on_headers_complete()
        if self._ending:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._expect_within(None)
        super().on_message_complete()

    def shutdown(self) -> None:
        """Close the connection; a new connection may still send its first request."""
        self._ending = True
        if self._begun:
            super().shutdown()
        else:
            self.loop.call_later(ACCEPTED_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if not self._begun and not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_within(None)
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, event, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        entry = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class Server:
    """A server of models.

    Args:
        sources: ONNX files, plans, or folders of a Triton repository.
        load: Opens an artifact and verifies its sidecar.
        decode: Turns an encoded image into uint8 RGB [H, W, 3].
        config: Addresses, security, batching and limits.

    Raises:
        InputError: The token or the TLS files are not usable.
    """

    def __init__(
        self,
        sources: list[Path],
        load: Callable[[Path], Session],
        decode: Callable[[bytes], np.ndarray],
        config: ServeConfig,
    ) -> None:
        self._config, self._decode = config, decode
        self._token = read_token(config.token_file)
        if config.certificate is not None and config.key is not None:
            check_tls(config.certificate, config.key)
        self._repository = Repository(sources, load, config)
        self._stop = asyncio.Event()

    def load(self) -> None:
        """Load, check and warm up the models. Call it before `run`.

        Raises:
            InputError: A model cannot be served.
            CheckFailedError: A model's self-check fails.
        """
        self._repository.load_all()

    def run(self, on_ready: Callable[[list[str]], None] = lambda lines: None) -> int:
        """Serve until SIGTERM, SIGINT or the loss of a device.

        Args:
            on_ready: Called with a line for each address and model when requests are accepted.

        Returns:
            0, or 3 if a device was lost.

        Raises:
            InputError: A port is in use.
        """
        with short_switch_interval():
            try:
                return uvloop.run(self._serve(on_ready))
            finally:
                self._repository.close()

    async def _serve(self, on_ready: Callable[[list[str]], None]) -> int:
        config, loop = self._config, asyncio.get_running_loop()
        sockets = [_bind(config.host, config.port)]
        api = Api(self._repository, self._decode, self._token)
        web = _Web(uvicorn.Config(
            api, http=_Protocol, ws="none", lifespan="off", proxy_headers=False,
            log_config=None, access_log=False, server_header=False,
            limit_concurrency=CONNECTIONS, timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=int(config.grace) + 1,
            ssl_certfile=config.certificate, ssl_keyfile=config.key,
        ))  # fmt: skip
        rpc = await self._start_grpc()
        serving = asyncio.create_task(web.serve(sockets=sockets))
        watching = asyncio.create_task(self._repository.watch())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        while not web.started and not serving.done():
            await asyncio.sleep(0.01)
        lost = False
        if not serving.done():  # else it raises below
            self._repository.ready = True
            on_ready(self._addresses(sockets[0]))
            lost = await self._until_stopped(serving)
            self._repository.ready = False
            log.info("stopping", extra={"fields": {"device_lost": lost}})
        watching.cancel()
        if not serving.done():
            await asyncio.sleep(0 if lost else min(LEAVE_SECONDS, config.grace))
            _refuse_connections(sockets[0])
            await asyncio.sleep(0 if lost else ACCEPT_SECONDS)
        web.should_exit = True
        if rpc is not None:
            await rpc.stop(0 if lost or serving.done() else config.grace)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(serving, config.grace + 2)
        return UnavailableError.exit_code if lost else 0

    async def _until_stopped(self, serving: asyncio.Task[None]) -> bool:
        """Wait for the end; returns whether a device was lost."""
        while not self._stop.is_set() and not serving.done():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 0.5)
            if not self._repository.healthy:
                return True
        return False

    async def _start_grpc(self) -> Any:
        config = self._config
        if not config.grpc:
            return None
        limit = config.max_body
        server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", limit), ("grpc.so_reuseport", 0),
                     ("grpc.max_send_message_length", limit), ("grpc.max_metadata_size", 16384)],
            maximum_concurrent_rpcs=CONNECTIONS,
        )  # fmt: skip
        service = Service(self._repository, self._token)
        server.add_generic_rpc_handlers((service.handlers(),))
        address = f"{config.host}:{config.grpc_port}"
        credentials = None
        if config.certificate is not None and config.key is not None:
            pair = (config.key.read_bytes(), config.certificate.read_bytes())
            credentials = grpc.ssl_server_credentials([pair])
        try:
            port = (
                server.add_secure_port(address, credentials)
                if credentials
                else server.add_insecure_port(address)
            )
        except RuntimeError:
            raise InputError(
                f"{address}: gRPC cannot listen there (in use, or not permitted)",
                fix="choose another --grpc-port",
            ) from None
        self._grpc_address = f"{config.host}:{port}"
        await server.start()
        return server

    def _addresses(self, web: socket.socket) -> list[str]:
        scheme = "https" if self._config.certificate else "http"
        host, port = web.getsockname()[:2]
        lines = [f"{scheme}://{host}:{port}"]
        if self._config.grpc:
            lines.append(f"grpc://{self._grpc_address}")
        return lines + [
            f"{model.name} version {model.version}: {model.session.precision}, "
            f"{model.session.info.provider}"
            for model in self._repository.all()
        ]


class _Web(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def _bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        InputError: The address is in use, or not an address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sets TCP_NODELAY only where the protocol is named
        listener = socket.socket(family[0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(family[4])
        listener.listen(CONNECTIONS)
    except OSError as error:
        raise InputError(
            f"{host}:{port}: {error.strerror or error}", fix="choose another --host or --port"
        ) from None
    return listener


def _refuse_connections(listener: socket.socket) -> None:
    """Make the kernel ignore new connections, so that none is waiting when the socket is closed.

    Closing a socket resets the connections in its queue. A filter that drops every packet stops new
    ones; those in the queue are accepted and answered.
    """
    if sys.platform != "linux":
        return
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF: return 0 bytes
    program = struct.pack("HP", 1, ctypes.addressof(drop))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER


def log_to_stderr() -> None:
    """Send the server's log to standard error, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
