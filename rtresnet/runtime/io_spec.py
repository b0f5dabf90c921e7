"""Input, outputs and batch sizes of an engine, and how a batch is split to fit them.

Receives the TensorRT module as an argument and never imports it.
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
"""Larger batches run at their own size, because padding them costs more than launching kernels."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, type, and shape without the batch dimension of one input or output."""

    name: str
    dtype: np.dtype[Any]
    row: tuple[int, ...]

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.row)) * self.dtype.itemsize

    @functools.cached_property
    def returned_dtype(self) -> np.dtype[Any]:
        """Type of the array that a caller gets: int64 for integers, else the engine's type."""
        return np.dtype(np.int64) if self.dtype.kind == "i" else self.dtype


@dataclass(frozen=True, kw_only=True)
class IoSpec:
    """An engine's input, outputs and optimization profiles.

    Attributes:
        input: The images.
        outputs: Logits, or indices and probabilities of a top-K engine.
        profiles: Optimization profiles.
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
        """Bytes of GPU memory of one `ExecutionStream`: two sets of buffers and one scratch."""
        rows = self.input.row_bytes + sum(output.row_bytes for output in self.outputs)
        return 2 * rows * self.largest + self.scratch


@dataclass(frozen=True, kw_only=True)
class BatchChunk:
    """Rows of a batch that run in one execution.

    Attributes:
        start: First row.
        rows: Number of rows.
        run: Batch size of the execution, `rows` plus padding.
        profile: Index of the optimization profile.
    """

    start: int
    rows: int
    run: int
    profile: int


def padded_size(count: int) -> int:
    """Return the batch size for `count` rows where each size costs a context and a graph.

    The sizes are 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32 and every larger one. At most a sixth of a
    batch is padding, where powers of two would compute up to twice as many rows (17 as 32).
    """
    if count > PADDED_UP_TO:
        return count
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // step) * step


def split_batch(
    count: int, profiles: tuple[Profile, ...], *, pad: bool = False
) -> tuple[BatchChunk, ...]:
    """Split a batch into chunks that fit a profile.

    A chunk is padded if it is smaller than every profile's minimum and, with `pad`, to the next
    `padded_size`. The profile with the nearest optimum runs it; of two that are equally near, the
    one with the smaller maximum.

    Args:
        count: Number of rows, at least 1.
        profiles: Optimization profiles of the engine.
        pad: Whether to pad to `padded_size`.
    """
    largest = max(profile.max for profile in profiles)
    chunks = []
    for start in range(0, count, largest):
        rows = min(largest, count - start)
        padded = min(largest, padded_size(rows)) if pad else rows
        run = min(max(padded, profile.min) for profile in profiles if profile.max >= padded)
        fitting = [i for i, profile in enumerate(profiles) if profile.min <= run <= profile.max]
        best = min(fitting, key=lambda i: (abs(profiles[i].opt - run), profiles[i].max, i))
        chunks.append(BatchChunk(start=start, rows=rows, run=run, profile=best))
    return tuple(chunks)


def read_io_spec(trt: Any, engine: Any, path: Path) -> IoSpec:
    """Read an engine's input, outputs and profiles.

    Raises:
        ArtifactError: The engine does not have one input of images, or an output has no batch
            dimension, a variable size, or a type that NumPy lacks.
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
        raise ArtifactError(
            f"{path}: expected a net from a batch of images to logits, got: {tensors_text}"
        )
    profiles = []
    for index in range(engine.num_optimization_profiles):
        low, best, high = engine.get_tensor_profile_shape(inputs[0], index)
        profiles.append(Profile(min=low[0], opt=best[0], max=high[0]))
    try:
        dtypes = {n: np.dtype(trt.nptype(engine.get_tensor_dtype(n))) for n in names}
    except TypeError as error:  # bfloat16, for one
        raise ArtifactError(
            f"{path}: an input or output has a type that NumPy does not support: {error}"
        ) from error
    tensors = {n: TensorSpec(name=n, dtype=dtypes[n], row=rows[n]) for n in names}
    outputs.sort(key=lambda n: dtypes[n].kind == "f")  # a top-K plan's indices come first
    return IoSpec(
        input=tensors[inputs[0]],
        outputs=tuple(tensors[n] for n in outputs),
        profiles=tuple(profiles),
        scratch=engine.device_memory_size_v2,
    )
