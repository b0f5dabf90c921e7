"""Checks a call's arguments: numpy arrays, or arrays of other libraries on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rtresnet.core.errors import InputError
from rtresnet.runtime import device_array
from rtresnet.runtime.device_array import DeviceArray
from rtresnet.runtime.io_spec import IoSpec

Array = np.ndarray | DeviceArray


def check_images(io: IoSpec, images: Any, stream: int) -> Array:
    """Returns the images of a call as an array, after checking type and shape.

    Args:
        io: The engine's input and outputs.
        images: A numpy array, or any object with DLPack or `__cuda_array_interface__`.
        stream: CUDA stream on which images on the GPU will be used.

    Raises:
        InputError: Wrong type or shape.
    """
    if (
        type(images) is np.ndarray
        and images.dtype == io.input.dtype
        and images.shape[1:] == io.input.row
        and images.shape[0]
    ):  # the usual case, on every call
        return images
    array = images
    if not isinstance(images, np.ndarray):
        if device_array.is_on_gpu(images):
            array = device_array.view(images, stream)
        elif hasattr(images, "__dlpack__"):
            array = np.from_dlpack(images)
    shape = tuple(getattr(array, "shape", ()))
    dtype = getattr(array, "dtype", type(array).__name__)
    if dtype != io.input.dtype or shape[1:] != io.input.row or not shape[0]:
        row = ", ".join(map(str, io.input.row))
        raise InputError(
            f"images are {dtype} {list(shape)}, the plan takes {io.input.dtype} [N, {row}]"
        )
    assert isinstance(array, np.ndarray | DeviceArray)
    return array


def make_results(io: IoSpec, out: Any, count: int, stream: int) -> Sequence[Array]:
    """Returns the arrays that the outputs of a call go to: new ones, or the caller's `out`.

    Args:
        io: The engine's input and outputs.
        out: None, an array, or a tuple with one array an output.
        count: Number of images.
        stream: CUDA stream on which arrays on the GPU will be used.

    Raises:
        InputError: `out` has the wrong type or shape, or is read-only.
    """
    if out is None:
        return [np.empty((count, *o.row), o.returned_dtype) for o in io.outputs]
    arrays = out if isinstance(out, tuple) else (out,)
    if len(arrays) != len(io.outputs):
        raise InputError(f"out has {len(arrays)} arrays, the plan {len(io.outputs)} outputs")
    results: list[Array] = []
    for array, output in zip(arrays, io.outputs, strict=True):
        result: Array
        if isinstance(array, np.ndarray):
            result, dtype, writable = array, output.returned_dtype, array.flags.writeable
        elif device_array.is_on_gpu(array):
            result, dtype = device_array.view(array, stream), output.dtype
            writable = result.writable
        else:
            raise InputError(f"out is a {type(array).__name__}, neither numpy nor on the GPU")
        if result.dtype != dtype or result.shape != (count, *output.row) or not writable:
            raise InputError(
                f"out is {'' if writable else 'read-only '}{result.dtype} {list(result.shape)}, "
                f"{output.name} is {dtype} {[count, *output.row]}"
            )
        results.append(result)
    return results
