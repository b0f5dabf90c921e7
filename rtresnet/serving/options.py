"""What a server is told: addresses, batching, and what a client may cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of a server.

    Attributes:
        grpc_port: None: no gRPC.
        max_batch: Images in a batch, and in a request.
        max_wait_ms: How long the first image of a batch waits for others.
        queue: Images that may wait; a request beyond it is refused.
        timeout: Seconds within which a request is answered, unless it states less.
        max_body: Bytes of a request.
        grace: Seconds that running requests have after SIGTERM.
        token: Bearer token that every request must carry; None: none.
        certificate: PEM file of the TLS certificate chain, with `key`.
    """

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
