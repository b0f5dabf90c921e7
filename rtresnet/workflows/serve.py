"""Serve models over HTTP and gRPC."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rtresnet.core import atomic_io, hardware, reporter
from rtresnet.core.config import Config, option
from rtresnet.core.errors import InputError, UnavailableError
from rtresnet.core.reporter import Reporter
from rtresnet.workflows.loading import RuntimeConfig, load_artifact
from rtresnet.workflows.workload import parse_wait

NEEDED = (
    "starlette", "uvicorn", "uvloop", "httptools", "grpc", "google.protobuf", "prometheus_client",
    "multipart",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Config):
    """Options of `serve`.

    Attributes:
        max_wait_ms: Milliseconds that the first image of a batch waits for others.
        queue: Images that may wait; a request beyond it is answered with 503.
        grpc_port: 0 takes a free port, as `port`.
        grace: Seconds that running requests have after SIGTERM.
    """

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for every interface.")
    port: int = option(8000, "Port for HTTP; 0 takes a free one.", minimum=0, maximum=65535)
    grpc_port: int = option(8001, "Port for gRPC; 0 takes a free one.", minimum=0, maximum=65535)
    grpc: bool = option(True, "Turn gRPC off.", names=(" /--no-grpc",), default_text="on")
    max_batch: int = option(
        32, "Largest number of images in a batch and in a request.", minimum=1, maximum=4096
    )
    max_wait_ms: float = option(
        2.0,
        "Longest time that an image waits for its batch to fill, as in 2ms.",
        names=("--max-wait",),
        metavar="TIME",
        parse=parse_wait,
        minimum=0,
        default_text="2ms",
    )
    queue: int = option(
        1024, "Length of the queue in images; further requests get status 503.", minimum=1
    )
    timeout: float = option(30.0, "Longest time to answer a request, in seconds.", minimum=0.01)
    max_body_mb: int = option(64, "Largest request, in MB.", minimum=1, maximum=4096)
    grace: float = option(
        30.0, "Time to finish running requests after SIGTERM, in seconds.", minimum=0
    )
    token_file: Path | None = option(
        None, "File with a bearer token that every request must carry.", metavar="FILE"
    )
    certificate: Path | None = option(
        None, "TLS certificate chain, PEM; needs --key.", metavar="FILE"
    )
    key: Path | None = option(None, "Private key of the TLS certificate, PEM.", metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.certificate is None) != (self.key is None):
            raise InputError("--certificate and --key need each other", fix="add the missing one")


def serve(
    sources: Sequence[str | os.PathLike[str]],
    config: ServeConfig | None = None,
    *,
    runtime: RuntimeConfig | None = None,
    on_ready: Callable[[list[str]], None] = lambda lines: None,
    reporter: Reporter = reporter.DEFAULT,
) -> int:
    """Serve ONNX files and plans until SIGTERM, Ctrl-C or the loss of the device.

    Args:
        sources: ONNX files, plans, or folders of a Triton repository.
        config: Addresses, batching and limits.
        runtime: Where the models run.
        on_ready: Called once requests are taken, with one line for each address and model.
        reporter: Receives notes.

    Returns:
        The exit code: 0, or 3 if the device was lost.

    Raises:
        InputError: A file cannot be served, its preprocessing is unknown, or a port is in use.
        UnavailableError: A package or the device is missing.
        CheckFailedError: A model's self-check fails.
    """
    config, runtime = config or ServeConfig(), runtime or RuntimeConfig()
    for package in NEEDED:
        if not hardware.installed(package):
            raise UnavailableError(
                f"serving needs the package {package}, which is not installed",
                fix="pip install 'rtresnet[serve]'",
            )
    from rtresnet.data.decode import decode
    from rtresnet.runtime.session import Session
    from rtresnet.serving.options import ServerOptions
    from rtresnet.serving.server import Server

    paths = [
        path if path.is_dir() else atomic_io.require_file(path, fix="rtresnet export makes one")
        for path in map(Path, sources)
    ]

    def load(path: Path) -> Session:
        return load_artifact(path, runtime)

    def decoded(data: bytes) -> np.ndarray:
        return decode("image", data)

    server = Server(
        paths,
        load,
        decoded,
        ServerOptions(
            host=config.host,
            port=config.port,
            grpc_port=config.grpc_port if config.grpc else None,
            max_batch=config.max_batch,
            max_wait_ms=config.max_wait_ms,
            queue=config.queue,
            timeout=config.timeout,
            max_body=config.max_body_mb * 1024 * 1024,
            grace=config.grace,
            token=_token(config.token_file),
            certificate=_pem(config.certificate),
            key=_pem(config.key),
        ),
    )
    with reporter.progress(f"loading {', '.join(map(str, paths))}"):
        pass
    return server.run(on_ready)


def _pem(path: Path | None) -> Path | None:
    return path and atomic_io.require_file(path, fix="name the PEM file of the certificate or key")


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    token = (
        atomic_io.require_file(path, fix="create it with a token of at least 16 characters")
        .read_text()
        .strip()
    )
    if len(token) < 16 or not token.isascii() or any(c.isspace() for c in token):
        raise InputError(f"{path}: not a token of at least 16 ASCII characters on one line")
    return token
