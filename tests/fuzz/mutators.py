"""Mutations of bytes in every format, and of values in JSON, ONNX and others.

A mutator takes a valid file's bytes and a source of randomness, and returns other bytes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import pickle
import random
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

NASTY = (
    None, True, -1, 0, 1, 10**30, 2**63, -(2**31), 1e308, 1e-320, math.nan, math.inf, "",
    "x" * 3000,
    "\x1b]0;title\x07", "\ud800", "../../../etc/passwd", "a\0b", [], {}, [[]], {"": None}, [None],
)  # fmt: skip
Mutator = Callable[[bytes, random.Random], bytes]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return bytes truncated, flipped, spliced, overwritten, emptied or with a wrong beginning."""
    place = rng.randrange(len(data) + 1)
    if rng.randrange(2):  # headers are where the meaning is
        place = min(place, rng.randrange(128))
    other, length = rng.randrange(len(data) + 1), 1 << rng.randrange(12)
    kind = rng.randrange(9)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return b""
    if kind == 2:
        return data[:place] + data[other : other + length] + data[place:]
    if kind == 3:
        return data[:place] + data[place + length :]
    if kind == 4:
        return rng.choice((b"PK\x03\x04", b"\x89PNG", b"\x80\x04", b"\x1f\x8b", b"{}")) + data[4:]
    if kind == 5:
        return data + data[other : other + length]
    if kind == 6:
        fill = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80"))
        return data[:place] + fill * min(length, 8) + data[place + min(length, 8) :]
    flipped = bytearray(data)
    for _ in range(1 + rng.randrange(8) if data else 0):
        flipped[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
        place = rng.randrange(len(data))
    return bytes(flipped)


def changed(tree: Any, rng: random.Random) -> Any:
    """Return nested dicts and lists with values replaced, swapped, removed, repeated or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(1 + rng.randrange(2)):
        places = list(_places(tree))
        if not places:
            return rng.choice(NASTY)
        holder, key = rng.choice(places)
        other, other_key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = copy.deepcopy(other[other_key])
        elif kind == 2:
            holder[key] = [holder[key]]
        elif kind == 3 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 3:
            holder[f"{key}\x1b[2J"] = holder.pop(key)
        elif kind == 4 and isinstance(holder[key], int | float | str):
            holder[key] = str(holder[key]) if rng.randrange(2) else -1 * holder[key]
        else:
            holder[key] = copy.deepcopy(rng.choice(NASTY))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    pending = [tree]
    while pending:
        holder = pending.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder))
        for key in keys if isinstance(holder, dict | list) else ():
            yield holder, key
            pending += [holder[key]] if isinstance(holder[key], dict | list) else []


def json_text(data: bytes, rng: random.Random) -> bytes:
    """Return JSON with another meaning, with repeated names, huge numbers or depth, or damaged."""
    kind = rng.randrange(10)
    text = data.decode()
    if kind == 0:
        return damaged(data, rng)
    if kind == 1:  # a name twice in one object
        names = re.findall(r'"\w+":', text)
        return re.sub(re.escape(rng.choice(names)), r"\g<0> 1, \g<0>", text, count=1).encode()
    if kind == 2:
        numbers = list(re.finditer(r"(?<=[ \[])-?\d+(\.\d+)?(?=[,\s\]}])", text))
        at = rng.choice(numbers).span() if numbers else (0, len(text))
        return (
            text[: at[0]] + rng.choice(("9" * 5000, "1e999", "-NaN", "NaN")) + text[at[1] :]
        ).encode()
    if kind == 3:
        depth = 10 ** rng.randrange(1, 6)
        wrapped = "[" * depth + "]" * depth
        return (wrapped if rng.randrange(2) else text.replace("null", wrapped, 1)).encode()
    if kind == 4:
        return text.encode(rng.choice(("utf-8-sig", "utf-16", "utf-32")))
    lines = text.splitlines()
    if len(lines) > 1 and lines[0][-1:] == "}":  # a document a line
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(changed(json.loads(lines[at]), rng))
        return "\n".join([*lines, ""]).encode(errors="surrogatepass")
    return json.dumps(changed(json.loads(text), rng), indent=1).encode(errors="surrogatepass")


def checkpoint(data: bytes, rng: random.Random) -> bytes:
    """Return a torch file with other values or tensors of other shapes and types, or damaged."""
    import torch

    if rng.randrange(2):
        return damaged(data, rng)
    payload = torch.load(io.BytesIO(data), weights_only=True)
    payload = changed(payload, rng) if rng.randrange(3) else payload
    if (
        isinstance(payload, dict)
        and isinstance(state := payload.get("state", payload), dict)
        and state
    ):
        name = rng.choice(list(state))
        tensor = state[name]
        if isinstance(tensor, torch.Tensor):
            state[name] = rng.choice((
                tensor.double(), tensor.to(torch.int8), tensor * math.nan, tensor.flatten(),
                tensor[None], torch.empty(0), tensor.to_sparse(), torch.tensor(1.0),
                tensor.to("meta"), tensor.to(torch.complex64),
            ))  # fmt: skip
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def onnx_graph(data: bytes, rng: random.Random) -> bytes:
    """Return an ONNX file whose fields are cleared, repeated, swapped or replaced, or damaged."""
    import onnx

    if rng.randrange(3) == 0:
        return damaged(data, rng)
    model = onnx.ModelProto.FromString(data)
    for _ in range(1 + rng.randrange(2)):
        pending, fields = [model], []
        while pending:
            message = pending.pop()
            for field, value in message.ListFields():
                fields.append((message, field.name, value))
                members = value if hasattr(value, "append") else [value]
                pending += [m for m in members if hasattr(m, "ListFields")]
        names = sorted({f"{type(m).__name__}.{name}" for m, name, _ in fields})
        chosen = rng.choice(names)  # or most changes would hit the many nodes' names
        message, name, value = rng.choice(
            [f for f in fields if f"{type(f[0]).__name__}.{f[1]}" == chosen]
        )
        if hasattr(value, "append"):
            at, other = rng.randrange(len(value)), rng.randrange(len(value))
            kind = rng.randrange(4)
            if kind == 0 or (kind == 1 and hasattr(value[at], "ListFields")):
                del value[at]
            elif hasattr(value[at], "ListFields"):
                value[at].CopyFrom(value[other]) if kind == 2 else value.add().CopyFrom(value[at])
            else:
                value[at] = _scalar(value[other if kind == 1 else at], rng)
        elif hasattr(value, "ListFields") or rng.randrange(3) == 0:
            message.ClearField(name)
        else:
            with contextlib.suppress(ValueError):  # an enum or a range that protobuf refuses
                setattr(message, name, _scalar(value, rng))
    return bytes(model.SerializeToString())


def _scalar(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bytes | str):
        choices = ("", "Relu", "Conv", "QuantizeLinear", "x" * 300, "\x1b]0;t\x07", "../x", "batch")
        text = rng.choice(choices)
        if isinstance(value, bytes):
            return damaged(value, rng) if rng.randrange(2) else text.encode()
        if value[:1] == "{" and rng.randrange(2):
            return json_text(value.encode(), rng).decode(errors="replace")
        return text
    if isinstance(value, float):
        return rng.choice((math.nan, math.inf, -1.0, 0.0, 1e38, 1e-45))
    return rng.choice((0, -1, 1, 2, 3, value + 1, value * 2, 10**6, 2**31 - 1))


def arrays(data: bytes, rng: random.Random) -> bytes:
    """Return an npz file with arrays of other shapes, types or names, or damaged."""
    if rng.randrange(2):
        return damaged(data, rng)
    entries = dict(np.load(io.BytesIO(data)))
    name = rng.choice(list(entries))
    value = entries.pop(name)
    with contextlib.suppress(ValueError, TypeError):
        entries[rng.choice((name, name, name, "other"))] = rng.choice((
            value[:0], value[:1], value[None], value[..., None], value.astype(np.float32),
            value.astype("U3"), value.astype(bool), np.array(7), value.astype(np.int8) - 100,
            np.full(value.shape, 2**62), np.array([{}], object), np.zeros((2, 0, 5, 3), np.uint8),
            value.astype(">u2"),
        ))  # fmt: skip
    buffer = io.BytesIO()
    np.savez(buffer, **entries)
    return buffer.getvalue()


def cifar_batch(data: bytes, rng: random.Random) -> bytes:
    """Return a pickle with other values, or damaged."""
    if rng.randrange(2):
        return damaged(data, rng)
    return pickle.dumps(changed(pickle.loads(data), rng))


def idx(data: bytes, rng: random.Random) -> bytes:
    """Return an idx file with another type, rank or sizes, or damaged."""
    if rng.randrange(2):
        return damaged(data, rng)
    head = [0, 0, rng.choice((8, 8, 9, 13)), rng.choice((0, 1, 2, 3, 4, 255))]
    sides = [rng.choice((0, 1, 2, 28, 2**16, 2**32 - 1)) for _ in range(head[3])]
    return bytes(head) + struct.pack(f">{len(sides)}I", *sides) + data[16:]


def text_lines(data: bytes, rng: random.Random) -> bytes:
    """Return a list with odd lines, or damaged."""
    odd = (b"", b".", b"..", b"/dev/null", b"\0", b"a\0b.png", b"\xff\xfe", b"x" * 5000, b"\x1b[2J")
    return damaged(data, rng) if rng.randrange(2) else data + rng.choice(odd) + b"\n"
