"""What goes into an engine and comes out, in which batches, and how a call is cut to fit.

Knows TensorRT only as the module it is handed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtresnet.errors import ArtifactError
from rtresnet.sidecar import Profile


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One input or output: its name, type and shape without the batch."""

    name: str
    dtype: np.dtype[Any]
    row: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of one row."""
        return int(np.prod(self.row)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What goes into an engine and comes out, and in which batches.

    Attributes:
        scratch: Bytes of activation memory that a context needs.
    """

    input: Tensor
    outputs: tuple[Tensor, ...]
    profiles: tuple[Profile, ...]
    scratch: int

    @property
    def largest(self) -> int:
        """The largest batch of any profile."""
        return max(profile.max for profile in self.profiles)

    @property
    def lane_bytes(self) -> int:
        """Memory on the GPU that a lane allocates."""
        rows = self.input.bytes + sum(output.bytes for output in self.outputs)
        return 2 * rows * self.largest + self.scratch


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of a call that run at once: from where, how many, as a batch of what, which profile."""

    start: int
    rows: int
    run: int
    profile: int


@functools.lru_cache(maxsize=256)
def split(count: int, profiles: tuple[Profile, ...]) -> tuple[Part, ...]:
    """Cuts a call into parts that a profile holds; only what is below every profile is filled up.

    Of the profiles that hold a batch, the one that was tuned for the nearest size runs it, and of
    two as near the one with the smaller maximum.
    """
    largest = max(profile.max for profile in profiles)
    parts = []
    for start in range(0, count, largest):
        rows = min(largest, count - start)
        run = min(max(rows, profile.min) for profile in profiles if profile.max >= rows)
        held = [i for i, profile in enumerate(profiles) if profile.min <= run <= profile.max]
        best = min(held, key=lambda i: (abs(profiles[i].opt - run), profiles[i].max, i))
        parts.append(Part(start=start, rows=rows, run=run, profile=best))
    return tuple(parts)


def read(trt: Any, engine: Any, path: Path) -> Ends:
    """What goes in and out of an engine.

    Raises:
        ArtifactError: Not one input of images, or an output without a batch or a fixed size.
    """
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    modes = {n: engine.get_tensor_mode(n) for n in names}
    inputs = [n for n in names if modes[n] == trt.TensorIOMode.INPUT]
    outputs = [n for n in names if modes[n] == trt.TensorIOMode.OUTPUT]
    shapes = {n: tuple(engine.get_tensor_shape(n)) for n in names}
    rows = {n: shapes[n][1:] for n in names}
    images = [rows[n] for n in inputs if len(rows[n]) == 3 and 3 in (rows[n][0], rows[n][2])]
    fixed = all(shape and min(shape[1:], default=1) > 0 for shape in shapes.values())
    if len(inputs) != 1 or not images or not outputs or not fixed:
        told = ", ".join(f"{n} {list(shapes[n])}" for n in names)
        raise ArtifactError(f"{path}: not a net from a batch of images to logits: {told}")
    profiles = []
    for index in range(engine.num_optimization_profiles):
        low, best, high = engine.get_tensor_profile_shape(inputs[0], index)
        profiles.append(Profile(min=low[0], opt=best[0], max=high[0]))
    try:
        dtypes = {n: np.dtype(trt.nptype(engine.get_tensor_dtype(n))) for n in names}
    except TypeError as error:  # bfloat16, for one
        raise ArtifactError(f"{path}: an input or output of a type numpy lacks: {error}") from error
    tensors = {n: Tensor(name=n, dtype=dtypes[n], row=rows[n]) for n in names}
    outputs.sort(key=lambda n: dtypes[n].kind == "f")  # a top-K plan's indices come first
    return Ends(
        input=tensors[inputs[0]],
        outputs=tuple(tensors[n] for n in outputs),
        profiles=tuple(profiles),
        scratch=engine.device_memory_size_v2,
    )
