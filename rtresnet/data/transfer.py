"""Copies from NumPy to the device that trains, without making the host wait for a GPU.

A GPU copies asynchronously from pinned memory only, and a tensor of constants that is created for
each batch is one more copy per batch. On a CPU all of this is a plain conversion.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device | str) -> Tensor:
    """Copy an array to a device; to a GPU through pinned memory, without waiting for the copy.

    Args:
        values: Any shape and a dtype that torch knows. On a CPU the result shares its memory.
        device: Where the result lies.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # torch keeps it until the copy is done
    return tensor.to(device, non_blocking=True)


def stack_to_device(arrays: Sequence[np.ndarray], device: torch.device | str) -> Tensor:
    """Stack arrays of one shape and dtype on a device, with a single copy on the host.

    Args:
        arrays: At least one.
        device: Where the result lies.
    """
    if torch.device(device).type != "cuda":
        return to_device(np.stack(arrays), device)
    dtype = torch.from_numpy(arrays[0][:0]).dtype
    pinned = torch.empty((len(arrays), *arrays[0].shape), dtype=dtype, pin_memory=True)
    np.stack(arrays, out=pinned.numpy())
    return pinned.to(device, non_blocking=True)


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A float32 vector that lies on a device, created once. Do not change it in place."""
    with torch.inference_mode(False):  # may be created in an evaluation and used in training
        return torch.tensor(values, device=device)
