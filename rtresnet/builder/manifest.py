"""The short manifest in a plan's name field: what the plan says of itself without its sidecar.

TensorRT keeps a network's name, at most 4,095 bytes of UTF-8, and gives it back as `engine.name`.
TensorRT-RTX writes it into the plan in the clear, so that it can be read without a GPU: a hint,
for nothing vouches for it. The sidecar holds the whole.
"""

from __future__ import annotations

import json
import mmap
import os
from typing import Any

from rtresnet.core import hardware
from rtresnet.core.errors import InputError
from rtresnet.core.sidecar import Profile, Sidecar

LIMIT = 4095
KEY = b'{"rtresnet":'


def write(parent: Sidecar, profiles: tuple[Profile, ...]) -> str:
    """The manifest of a plan that is built from an ONNX file.

    Raises:
        InputError: It would not fit.
    """
    record = {
        "rtresnet": hardware.version("rtresnet"),
        "model": parent.model.architecture,
        "precision": parent.precision,
        "input": parent.input.size,
        "classes": len(parent.model.classes),
        "batches": [str(profile) for profile in profiles],
        "weights": parent.weights.origin,
        "onnx": parent.sha256[:16],
    }
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode()) > LIMIT:
        raise InputError(f"the plan's name would be longer than {LIMIT} bytes", fix="fewer --batch")
    return text


def find(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest in a plan's bytes, or None."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(KEY)
        if start < 0:
            return None
        text = data[start : start + LIMIT].decode("utf-8", errors="ignore")
    try:
        found, _ = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
