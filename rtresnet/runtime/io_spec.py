"""An engine's input, outputs and batch sizes, and how a batch is split to fit them.

Knows TensorRT only as the module it is handed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtresnet.core.errors import ArtifactError
from rtresnet.core.sidecar import Profile

PADDED_UP_TO = 32
"""Larger batches run at their own size: there, padding costs more than launching kernels does."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output: its name, type, and shape without the batch dimension."""

    name: str
    dtype: np.dtype[Any]
    row: tuple[int, ...]

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.row)) * self.dtype.itemsize

    @functools.cached_property
    def returned_dtype(self) -> np.dtype[Any]:
        """Type of the array a caller gets: int64 for any integer, else the engine's own type."""
        return np.dtype(np.int64) if self.dtype.kind == "i" else self.dtype


@dataclass(frozen=True, kw_only=True)
class IoSpec:
    """An engine's input, outputs and optimization profiles.

    Attributes:
        scratch: Activation memory that an execution context needs, in bytes.
    """

    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    scratch: int

    @functools.cached_property
    def largest(self) -> int:
        """The largest batch of any profile."""
        return max(profile.max for profile in self.profiles)

    @property
    def stream_bytes(self) -> int:
        """GPU memory that one `ExecutionStream` allocates: two sets of buffers, one scratch."""
        rows = self.input.row_bytes + sum(output.row_bytes for output in self.outputs)
        return 2 * rows * self.largest + self.scratch


@dataclass(frozen=True, kw_only=True)
class BatchChunk:
    """Rows of a batch that run in one execution.

    Attributes:
        start: First row.
        rows: Number of rows.
        run: Batch size of the execution; above `rows`, the rest is padding.
        profile: Index of the optimization profile.
    """

    start: int
    rows: int
    run: int
    profile: int


def padded_size(count: int) -> int:
    """The batch size that `count` rows run at where each size costs a context and a graph.

    1 to 8, 10, 12, 14, 16, 20, 24, 28 and 32: at most a sixth of a batch is padding, where powers
    of two would compute nearly twice the rows that were asked for (17 as 32).
    """
    if count > PADDED_UP_TO:
        return count
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // step) * step


def split_batch(
    count: int, profiles: tuple[Profile, ...], *, pad: bool = False
) -> tuple[BatchChunk, ...]:
    """Splits a batch into chunks that fit a profile.

    A chunk is padded where it is smaller than every profile's minimum and, with `pad`, to the next
    `padded_size`. Of the profiles that fit, the one whose optimum is nearest runs it, and of two
    that are equally near the one with the smaller maximum.
    """
    largest = max(profile.max for profile in profiles)
    chunks = []
    for start in range(0, count, largest):
        rows = min(largest, count - start)
        wanted = min(largest, padded_size(rows)) if pad else rows
        run = min(max(wanted, profile.min) for profile in profiles if profile.max >= wanted)
        fitting = [i for i, profile in enumerate(profiles) if profile.min <= run <= profile.max]
        best = min(fitting, key=lambda i: (abs(profiles[i].opt - run), profiles[i].max, i))
        chunks.append(BatchChunk(start=start, rows=rows, run=run, profile=best))
    return tuple(chunks)


def read_io_spec(trt: Any, engine: Any, path: Path) -> IoSpec:
    """Reads an engine's input, outputs and profiles.

    Raises:
        ArtifactError: The engine has more than one input or none of images, or an output without a
            batch dimension or of variable size.
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
        tensors_text = ", ".join(f"{n} {list(shapes[n])}" for n in names)
        raise ArtifactError(f"{path}: not a net from a batch of images to logits: {tensors_text}")
    profiles = []
    for index in range(engine.num_optimization_profiles):
        low, best, high = engine.get_tensor_profile_shape(inputs[0], index)
        profiles.append(Profile(min=low[0], opt=best[0], max=high[0]))
    try:
        dtypes = {n: np.dtype(trt.nptype(engine.get_tensor_dtype(n))) for n in names}
    except TypeError as error:  # bfloat16, for one
        raise ArtifactError(f"{path}: an input or output of a type numpy lacks: {error}") from error
    tensors = {n: TensorSpec(name=n, dtype=dtypes[n], row=rows[n]) for n in names}
    outputs.sort(key=lambda n: dtypes[n].kind == "f")  # a top-K plan's indices come first
    return IoSpec(
        input=tensors[inputs[0]],
        outputs=tuple(tensors[n] for n in outputs),
        profiles=tuple(profiles),
        scratch=engine.device_memory_size_v2,
    )
