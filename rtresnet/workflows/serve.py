"""Serve models over HTTP and gRPC."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rtresnet.core import atomic_io, hardware, reporter
from rtresnet.core.errors import UnavailableError
from rtresnet.core.reporter import Reporter
from rtresnet.serving.config import ServeConfig
from rtresnet.workflows.loading import RuntimeConfig, load_artifact

NEEDED = (
    "starlette", "uvicorn", "uvloop", "httptools", "grpc", "google.protobuf", "prometheus_client",
    "multipart",
)  # fmt: skip


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
        config: Addresses, batching, security and limits.
        runtime: Where the models run. A plan gets two contexts by default if batches are formed.
        on_ready: Called once requests are taken, with one line for each address and model.
        reporter: Receives progress while the models are loaded.

    Returns:
        The exit code: 0, or 3 if the device was lost.

    Raises:
        InputError: A file cannot be served, its preprocessing is unknown, the token or the TLS
            files are not usable, or a port is in use.
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
    from rtresnet.serving.repository import model_files
    from rtresnet.serving.server import Server

    paths = [
        path
        if path.is_dir()
        else atomic_io.require_file(path, fix="create it with: rtresnet export")
        for path in map(Path, sources)
    ]
    files = [os.fspath(file) for path in paths for _, _, file in model_files(path)]

    def load(path: Path) -> Session:
        batches = config.max_batch > 1
        return load_artifact(path, runtime.for_artifact(os.fspath(path), files, batches=batches))

    def decoded(data: bytes) -> np.ndarray:
        return decode("image", data)

    server = Server(paths, load, decoded, config)
    with reporter.progress(f"loading {', '.join(map(str, paths))}"):
        server.load()
    return server.run(on_ready)
