"""Read a plan's own description: its header, and its name field.

Both are readable without TensorRT and without a GPU. They are hints, because no hash protects
them; if a plan has a sidecar, the sidecar decides.

- TensorRT keeps a network's name, at most 4,095 bytes of UTF-8, and TensorRT-RTX writes it into the
  plan as plain text. The builder puts the facts of the sidecar there, so that a plan that is moved
  without its sidecar evaluates the same. See `name_field` for the size limit.
- The first 64 bytes of a plan of TensorRT-RTX hold its version, targets and size. This was observed
  with version 1.7; NVIDIA does not document it.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtresnet.core import atomic_io, hardware
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.gpu_targets import SERVED
from rtresnet.core.serialization import from_json
from rtresnet.core.sidecar import Sidecar, description, from_description

HEADER_SIZE = 64
MAGIC = b"vtrt"
NAME_LIMIT = 4095
KEY = b'{"rtresnet":'
NAMES_LEFT_OUT = "model: class names, which did not fit into the plan; classes are numbered"
"""Entry of `Sidecar.assumed`."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """Header of a plan of TensorRT-RTX: the version that built it, targets, size in bytes."""

    version: str
    targets: tuple[str, ...]
    bytes: int


def read_header(path: str | os.PathLike[str]) -> Header | None:
    """Read the header of a plan; return None if TensorRT-RTX did not build it.

    Raises:
        ArtifactError: The file is empty or truncated.
    """
    path = atomic_io.require_file(path)
    with open(path, "rb") as file:
        data = file.read(HEADER_SIZE)
    header, size = parse_header(data), path.stat().st_size
    cut = header is None and data.startswith(MAGIC) and size < HEADER_SIZE
    if cut or (header is not None and header.bytes != size):
        raise ArtifactError(
            f"{path}: truncated ({size} of {header.bytes if header else 'at least 64'} bytes)",
            fix="copy it again or build it again",
        )
    return header


def parse_header(data: bytes) -> Header | None:
    """Parse a plan's first 64 bytes; return None if they are not TensorRT-RTX's."""
    if len(data) < HEADER_SIZE or data[:4] != MAGIC:
        return None
    size, mask = struct.unpack_from("<Q", data, 16)[0], struct.unpack_from("<Q", data, 32)[0]
    return Header(
        version=".".join(str(byte) for byte in data[24:28]),
        targets=tuple(name for bit, name in enumerate(SERVED) if mask >> bit & 1),
        bytes=size,
    )


@dataclass(frozen=True, kw_only=True)
class NameField:
    """The content of a plan's name field.

    Attributes:
        rtresnet: The version that built the plan.
        model: Architecture.
        precision: Precision of the ONNX file.
        input: Side of the input in pixels.
        classes: Number of classes.
        batches: Optimization profiles, as MIN:OPT:MAX.
        weights: Origin of the weights.
        onnx: First 16 digits of the sha256 of the ONNX file.
        sidecar: The sidecar's facts; None in a plan of an earlier version, or if they did not fit.
    """

    rtresnet: str | None
    model: str
    precision: str
    input: int
    classes: int
    batches: tuple[str, ...]
    weights: str
    onnx: str
    sidecar: Sidecar | None = None


def name_field(sidecar: Sidecar) -> str:
    """Write the content of a plan's name field.

    If it exceeds 4,095 bytes, it is shortened in this order: class names are compressed;
    calibration and the source of the weights are dropped; class names are dropped, and the classes
    are numbered; the sidecar's facts are dropped.

    Args:
        sidecar: The plan's sidecar, with `plan` and `parent`.

    Raises:
        InputError: Even the shortest form does not fit.
    """
    assert sidecar.plan is not None and sidecar.parent is not None
    facts: dict[str, Any] = {
        "rtresnet": hardware.version("rtresnet"),
        "model": sidecar.model.architecture,
        "precision": sidecar.precision,
        "input": sidecar.input.size,
        "classes": len(sidecar.model.classes),
        "batches": [str(profile) for profile in sidecar.plan.profiles],
        "weights": sidecar.weights.origin,
        "onnx": sidecar.parent.sha256[:16],
    }
    for described in (*_shorter_and_shorter(sidecar), {}):
        text = json.dumps(facts | described, ensure_ascii=False, separators=(",", ":"))
        if len(text.encode()) <= NAME_LIMIT:
            return text
    raise InputError(
        f"the plan's name field would be longer than {NAME_LIMIT} bytes",
        fix="use fewer --batch options",
    )


def _shorter_and_shorter(sidecar: Sidecar) -> Iterator[dict[str, Any]]:
    """Yield the sidecar's facts in forms of decreasing length."""
    yield {"sidecar": description(sidecar)}
    model = sidecar.model
    names = json.dumps(model.classes, ensure_ascii=False).encode()
    packed = {"names": base64.b85encode(zlib.compress(names, 9)).decode()}
    unnamed = dataclasses.replace(sidecar, model=dataclasses.replace(model, classes=()))
    yield {"sidecar": description(unnamed)} | packed
    weights = dataclasses.replace(sidecar.weights, source=None)
    short = dataclasses.replace(unnamed, calibration=None, weights=weights)
    yield {"sidecar": description(short)} | packed
    yield {"sidecar": description(short)}


def read_name_field(path: str | os.PathLike[str]) -> NameField | None:
    """Find the content of the name field in a plan's bytes; return None if there is none."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(KEY)
        if start < 0:
            return None
        text = data[start : start + NAME_LIMIT].decode("utf-8", errors="ignore")
    try:
        facts, _ = json.JSONDecoder().raw_decode(text)
        record = facts.pop("sidecar", None)
        names = facts.pop("names", None)
        name = from_json(NameField, facts)
        if record is None:
            return name
        return dataclasses.replace(name, sidecar=_sidecar(record, names, name.classes))
    except (ValueError, TypeError, AttributeError, zlib.error):
        return None


def _sidecar(record: Any, names: str | None, count: int) -> Sidecar:
    sidecar = from_description(record)
    if sidecar.model.classes:
        return sidecar
    assumed = sidecar.assumed
    if names is not None:
        inflate = zlib.decompressobj()
        classes = tuple(json.loads(inflate.decompress(base64.b85decode(names), 1 << 20)))
    else:
        classes = tuple(map(str, range(count)))
        assumed = (*assumed, NAMES_LEFT_OUT)
    if len(classes) != count or not all(isinstance(entry, str) for entry in classes):
        raise ValueError("the class names are damaged")
    model = dataclasses.replace(sidecar.model, classes=classes)
    return dataclasses.replace(sidecar, model=model, assumed=assumed)


def described(path: str | os.PathLike[str]) -> Sidecar | None:
    """Return a plan's own description as a sidecar, with the file's hash; None if it has none.

    Raises:
        ArtifactError: The plan is empty or truncated.
    """
    header, name = read_header(path), read_name_field(path)
    if name is None or name.sidecar is None:
        return None
    path, plan = Path(path), name.sidecar.plan
    if plan is not None and header is not None:
        plan = dataclasses.replace(plan, version=header.version, targets=header.targets)
    return dataclasses.replace(
        name.sidecar, file=path.name, plan=plan, sha256=atomic_io.sha256(path),
        bytes=path.stat().st_size,
    )  # fmt: skip
