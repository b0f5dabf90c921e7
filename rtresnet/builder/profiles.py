"""Optimization profiles from the command line: `1:8:32` is the smallest, best and largest batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rtresnet.core.errors import InputError
from rtresnet.core.sidecar import Profile

DEFAULT = "1:8:32"


def parse(text: str) -> Profile:
    """Reads MIN:OPT:MAX, or one number for a fixed batch.

    Raises:
        InputError: Not whole numbers, below 1, or not in ascending order.
    """
    parts = text.split(":")
    try:
        values = [int(part) for part in parts]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 3
    if len(values) != 3 or not 1 <= values[0] <= values[1] <= values[2]:
        raise InputError(
            f"--batch {text}: needs MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX",
            fix=f"as in --batch {DEFAULT}",
        )
    return Profile(min=values[0], opt=values[1], max=values[2])


def parse_all(texts: Sequence[str]) -> tuple[Profile, ...]:
    """Reads every --batch, each once, in the order given; nothing where there is none.

    Raises:
        InputError: As `parse`.
    """
    return tuple(dict.fromkeys(parse(text) for text in texts))


def fitting(source: Path, given: Sequence[Profile], batch: int | None) -> tuple[Profile, ...]:
    """The profiles to build a file with.

    Args:
        source: The ONNX file, for the message.
        given: From `parse_all`; where there is none, DEFAULT or the file's batch.
        batch: The only batch size that the file takes; None where it is open.

    Raises:
        InputError: A profile has other batches than the file's.
    """
    if batch is None:
        return tuple(given) or (parse(DEFAULT),)
    only = Profile(min=batch, opt=batch, max=batch)
    other = next((profile for profile in given if profile != only), None)
    if other is not None:
        raise InputError(
            f"{source}: takes batches of {batch}, not --batch {other}",
            fix="leave --batch out, or export it with an open batch (torch.onnx.export: "
            "dynamic_shapes)",
        )
    return (only,)
