"""Options of a server: addresses, batching, security and limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of a server; `grpc_port` None: no gRPC; `max_body` in bytes; `timeout` in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001
    max_batch: int = 32
    max_wait_ms: float = 2.0
    queue: int = 1024
    timeout: float = 30.0
    max_body: int = 64 * 1024 * 1024
    grace: float = 30.0
    token: str | None = None
    certificate: Path | None = None
    key: Path | None = None
