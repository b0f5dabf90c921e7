"""What the first 64 bytes of a plan say. Readable anywhere, without TensorRT and without a GPU.

Observed on TensorRT-RTX 1.7, not documented by NVIDIA: a hint for a plan without a sidecar and
a check against truncation. The sidecar decides everything else.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from rtresnet.builder.targets import RTX_TARGETS
from rtresnet.core import atomic_io
from rtresnet.core.errors import ArtifactError

SIZE = 64
MAGIC = b"vtrt"


@dataclass(frozen=True, kw_only=True)
class Header:
    """The version that built the plan, what it was built for, and its size in bytes."""

    version: str
    targets: tuple[str, ...]
    bytes: int


def read(path: str | os.PathLike[str]) -> Header | None:
    """Reads the header of a TensorRT-RTX plan; None for a file that is not one.

    Raises:
        ArtifactError: Empty or truncated.
    """
    path = atomic_io.require_file(path)
    with open(path, "rb") as file:
        head = file.read(SIZE)
    header, actual = parse(head), path.stat().st_size
    cut = header is None and head.startswith(MAGIC) and actual < SIZE
    if cut or (header is not None and header.bytes != actual):
        raise ArtifactError(
            f"{path}: truncated ({actual} of {header.bytes if header else 'at least 64'} bytes)",
            fix="copy it again or build it again",
        )
    return header


def parse(head: bytes) -> Header | None:
    """The header in a plan's first 64 bytes; None where they are not TensorRT-RTX's."""
    if len(head) < SIZE or head[:4] != MAGIC:
        return None
    size, mask = struct.unpack_from("<Q", head, 16)[0], struct.unpack_from("<Q", head, 32)[0]
    return Header(
        version=".".join(str(byte) for byte in head[24:28]),
        targets=tuple(name for bit, name in enumerate(RTX_TARGETS) if mask >> bit & 1),
        bytes=size,
    )
