"""Options of a server: addresses, batching, security and limits."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from rtresnet.core import atomic_io
from rtresnet.core.config import Config, option, parse_wait
from rtresnet.core.errors import InputError

QUEUE = 1024  # images
# Reasons of OpenSSL: another key, and keys of two algorithms.
MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Config):
    """Options of `serve`.

    Attributes:
        max_wait_ms: Milliseconds that the first image of a batch waits for others.
        queue: Images that may wait, at least `max_batch`; a request beyond it is answered with 503.
            None: `queue_limit` has the default.
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
        default_text="2ms",
    )
    queue: int | None = option(
        None,
        "Length of the queue in images, at least --max-batch; further requests get status 503.",
        minimum=1,
        default_text=f"{QUEUE}, or --max-batch if that is larger",
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
            raise InputError(
                "--certificate and --key must be used together", fix="add the missing one"
            )
        if self.queue_limit < self.max_batch:
            raise InputError(
                f"--queue {self.queue}: a full batch of {self.max_batch} never fits",
                fix=f"use --queue {self.max_batch}, or --max-batch {self.queue}",
            )

    @property
    def queue_limit(self) -> int:
        """Number of images that may wait."""
        return self.queue or max(QUEUE, self.max_batch)

    @property
    def max_body(self) -> int:
        """Largest request, in bytes."""
        return self.max_body_mb * 1024 * 1024


def read_token(path: Path | None) -> str | None:
    """Return the token in a file; None without a file.

    Raises:
        InputError: There is no such file, or it does not contain a usable token.
    """
    if path is None:
        return None
    fix = "create it with a token of at least 16 characters"
    token = atomic_io.require_file(path, fix=fix).read_text(errors="replace").strip()
    if len(token) < 16 or not token.isascii() or any(c.isspace() for c in token):
        raise InputError(f"{path}: not a token of at least 16 ASCII characters on one line")
    return token


def check_tls(certificate: Path, key: Path) -> None:
    """Check that a certificate and its private key can be used.

    Raises:
        InputError: A file is missing, is not PEM or is encrypted, or they do not belong together.
    """

    def refuse_encrypted() -> str:  # OpenSSL would ask for the password on the terminal
        raise InputError(
            f"{key}: is encrypted", fix=f"decrypt it with: openssl pkey -in {key} -out NEW"
        )

    for path in (certificate, key):
        atomic_io.require_file(path, fix="name the PEM file of the certificate or key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(certificate)
    except ssl.SSLError:
        raise InputError(f"{certificate}: not a certificate in PEM format") from None
    try:
        context.load_cert_chain(certificate, key, refuse_encrypted)
    except ssl.SSLError as error:
        if error.reason in MISMATCHES:
            raise InputError(f"{key}: not the private key of {certificate}") from None
        raise InputError(
            f"{key}: not usable as the private key of {certificate} ({error.reason or error})",
            fix="both must be in PEM format",
        ) from None
