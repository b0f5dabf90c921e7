"""What a caller of a plan hands over and gets back: numpy arrays, or arrays that lie on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rtresnet.errors import InputError
from rtresnet.runtime import device_array
from rtresnet.runtime.device_array import DeviceArray
from rtresnet.runtime.ends import Ends

Array = np.ndarray | DeviceArray


def take(ends: Ends, images: Any, stream: int) -> Array:
    """The images of a call, checked.

    Args:
        ends: What the engine takes.
        images: A numpy array, or anything with DLPack or `__cuda_array_interface__`.
        stream: Where images on the GPU will be used.

    Raises:
        InputError: Another type or shape.
    """
    found = images
    if not isinstance(images, np.ndarray):
        if device_array.is_on_gpu(images):
            found = device_array.view(images, stream)
        elif hasattr(images, "__dlpack__"):
            found = np.from_dlpack(images)
    shape = tuple(getattr(found, "shape", ()))
    dtype = getattr(found, "dtype", type(found).__name__)
    if dtype != ends.input.dtype or shape[1:] != ends.input.row or not shape[0]:
        row = ", ".join(map(str, ends.input.row))
        raise InputError(
            f"images are {dtype} {list(shape)}, the plan takes {ends.input.dtype} [N, {row}]"
        )
    assert isinstance(found, np.ndarray | DeviceArray)
    return found


def make_results(ends: Ends, out: Any, count: int, stream: int) -> Sequence[Array]:
    """Where the outputs of a call go: new arrays, or the caller's `out`, checked.

    Args:
        ends: What the engine gives.
        out: None, an array, or as many as there are outputs in a tuple.
        count: Number of images.
        stream: Where arrays on the GPU will be used.

    Raises:
        InputError: `out` is of another type or shape, or read-only.
    """
    if out is None:
        return [np.empty((count, *o.row), _returned(o.dtype)) for o in ends.outputs]
    given = out if isinstance(out, tuple) else (out,)
    if len(given) != len(ends.outputs):
        raise InputError(f"out has {len(given)} arrays, the plan {len(ends.outputs)} outputs")
    results: list[Array] = []
    for array, output in zip(given, ends.outputs, strict=True):
        found: Array
        if isinstance(array, np.ndarray):
            found, wanted, writable = array, _returned(output.dtype), array.flags.writeable
        elif device_array.is_on_gpu(array):
            found, wanted = device_array.view(array, stream), output.dtype
            writable = found.writable
        else:
            raise InputError(f"out is a {type(array).__name__}, neither numpy nor on the GPU")
        if found.dtype != wanted or found.shape != (count, *output.row) or not writable:
            raise InputError(
                f"out is {'' if writable else 'read-only '}{found.dtype} {list(found.shape)}, "
                f"{output.name} is {wanted} {[count, *output.row]}"
            )
        results.append(found)
    return results


def _returned(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Indices are int64, whatever integer an engine computes; the rest is as it comes."""
    return np.dtype(np.int64) if dtype.kind == "i" else dtype
