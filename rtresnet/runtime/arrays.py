"""Arrays that a caller passes to a plan: NumPy arrays, or arrays of other libraries on the GPU.

Arrays on the GPU are used without a copy. They are read through DLPack
(https://dmlc.github.io/dlpack/latest/python_spec.html) or the CUDA Array Interface
(https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html). DLPack is preferred, because
its producer orders its own stream before ours. This module makes no CUDA calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtresnet.core.errors import InputError
from rtresnet.runtime.io_spec import IoSpec

ON_GPU = (2, 13)  # kDLCUDA, kDLCUDAManaged
LEGACY_DEFAULT = 1  # number of the default stream in both protocols (cudaStreamLegacy)
KINDS = {0: "i", 1: "u", 2: "f"}  # DLDataTypeCode to NumPy's kind
FIX_CONTIGUOUS = "copy it first: .contiguous() in torch, ascontiguousarray elsewhere"


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceArray:
    """Memory on the GPU, C-contiguous.

    Attributes:
        address: Address of the first byte.
        shape: Lengths of the dimensions.
        dtype: Type of the elements.
        after: A stream whose work must finish before the memory is used, or None.
        writable: Whether the owner allows writing.
        owner: Object that keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    after: int | None
    writable: bool
    owner: Any

    def __len__(self) -> int:
        return self.shape[0]


Array = np.ndarray | DeviceArray


def check_images(io: IoSpec, images: Any, stream: int) -> Array:
    """Check the images of a call and return them as an array.

    Args:
        io: The engine's input and outputs.
        images: A numpy array, or any object with DLPack or `__cuda_array_interface__`.
        stream: CUDA stream that will use images on the GPU.

    Raises:
        InputError: The images have the wrong type or shape.
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
        if is_on_gpu(images):
            array = view(images, stream)
        elif hasattr(images, "__dlpack__"):
            array = np.from_dlpack(images)
    shape = tuple(getattr(array, "shape", ()))
    dtype = getattr(array, "dtype", type(array).__name__)
    if dtype != io.input.dtype or shape[1:] != io.input.row or not shape[0]:
        row = ", ".join(map(str, io.input.row))
        raise InputError(
            f"images are {dtype} {list(shape)}, but the plan needs {io.input.dtype} [N, {row}]"
        )
    assert isinstance(array, np.ndarray | DeviceArray)
    return array


def make_results(io: IoSpec, out: Any, count: int, stream: int) -> Sequence[Array]:
    """Return the arrays for the outputs of a call: new ones, or the caller's `out` after a check.

    Args:
        io: The engine's input and outputs.
        out: None, an array, or a tuple with one array for each output.
        count: Number of images.
        stream: CUDA stream that will use arrays on the GPU.

    Raises:
        InputError: `out` has the wrong type or shape, or is read-only.
    """
    if out is None:
        return [np.empty((count, *o.row), o.returned_dtype) for o in io.outputs]
    arrays = out if isinstance(out, tuple) else (out,)
    if len(arrays) != len(io.outputs):
        raise InputError(
            f"out has {len(arrays)} arrays, but the plan has {len(io.outputs)} outputs"
        )
    results: list[Array] = []
    for array, output in zip(arrays, io.outputs, strict=True):
        result: Array
        if isinstance(array, np.ndarray):
            result, dtype, writable = array, output.returned_dtype, array.flags.writeable
        elif is_on_gpu(array):
            result, dtype = view(array, stream), output.dtype
            writable = result.writable
        else:
            raise InputError(f"out is a {type(array).__name__}, neither numpy nor on the GPU")
        if result.dtype != dtype or result.shape != (count, *output.row) or not writable:
            raise InputError(
                f"out is {'' if writable else 'read-only '}{result.dtype} {list(result.shape)}, "
                f"but {output.name} is {dtype} {[count, *output.row]}"
            )
        results.append(result)
    return results


def is_on_gpu(array: Any) -> bool:
    """Return whether an object provides memory on a GPU."""
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[0]) in ON_GPU
    return hasattr(array, "__cuda_array_interface__")


def view(array: Any, stream: int, device: int = 0) -> DeviceArray:
    """Describe an array on the GPU.

    Args:
        array: An object for which `is_on_gpu` is true.
        stream: The stream that will use the memory.
        device: Number of the GPU that the array must be on.

    Raises:
        InputError: The array is on another GPU, is not contiguous, has a type that NumPy lacks, or
            its owner does not export it (a tensor that requires a gradient).
    """
    if hasattr(array, "__dlpack_device__"):
        number = int(array.__dlpack_device__()[1])
        if number != device:
            raise InputError(f"the array is on GPU {number}, but the plan is on GPU {device}")
        try:
            capsule = array.__dlpack__(stream=stream)
        except (BufferError, RuntimeError, TypeError) as error:
            raise InputError(f"the array does not export its memory: {error}") from error
        return _from_dlpack(capsule)
    return _from_interface(array, array.__cuda_array_interface__)


def _from_interface(array: Any, interface: dict[str, Any]) -> DeviceArray:
    address, read_only = interface["data"]
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None:
        _require_contiguous(shape, tuple(stride // dtype.itemsize for stride in strides))
    # Before version 3 the protocol has no stream: wait for the default stream then.
    after = interface.get("stream") if interface.get("version", 0) >= 3 else LEGACY_DEFAULT
    return DeviceArray(
        address=int(address), shape=shape, dtype=dtype, after=after, writable=not read_only,
        owner=array,
    )  # fmt: skip


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _from_dlpack(capsule: Any) -> DeviceArray:
    """Read a capsule without consuming it: the capsule frees the tensor with itself."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = ctypes.cast(get(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents
    if tensor.code not in KINDS or tensor.lanes != 1:
        raise InputError(f"NumPy has no equivalent of the array's type (DLPack code {tensor.code})")
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        _require_contiguous(shape, tuple(tensor.strides[: tensor.ndim]))
    return DeviceArray(
        address=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        dtype=np.dtype(f"{KINDS[tensor.code]}{tensor.bits // 8}"),
        after=None,
        writable=True,  # an unversioned capsule is always writable
        owner=capsule,
    )


def _require_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Raise InputError if the array is not C-contiguous; strides count elements."""
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected and 0 not in shape:
            raise InputError(
                f"the array on the GPU is not contiguous (shape {list(shape)}, strides "
                f"{list(strides)})",
                fix=FIX_CONTIGUOUS,
            )
        expected *= length
