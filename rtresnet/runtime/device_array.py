"""Arrays of other libraries that lie on the GPU: where they are and what is in them, no copy.

Two protocols, DLPack (https://dmlc.github.io/dlpack/latest/python_spec.html) and the CUDA Array
Interface (https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html). DLPack comes first:
its producer orders its own stream before ours. Deliberately unaware of CUDA: it only reads what
the array says of itself.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtresnet.core.errors import InputError

ON_GPU = (2, 13)  # kDLCUDA, kDLCUDAManaged
LEGACY_DEFAULT = 1  # the default stream, as both protocols and cudaStreamLegacy number it
KINDS = {0: "i", 1: "u", 2: "f"}  # DLDataTypeCode to NumPy's kind


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceArray:
    """Memory on the GPU, C-contiguous.

    Attributes:
        address: Of its first byte.
        after: A stream whose work must be done before the memory is touched, or None.
        writable: Whether its owner lets it be written to.
        owner: Keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    after: int | None
    writable: bool
    owner: Any

    def __len__(self) -> int:
        return self.shape[0]


def is_on_gpu(array: Any) -> bool:
    """Whether an object offers its memory on a GPU."""
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[0]) in ON_GPU
    return hasattr(array, "__cuda_array_interface__")


def view(array: Any, stream: int, device: int = 0) -> DeviceArray:
    """Looks at an array on the GPU.

    Args:
        array: An object that `is_on_gpu`.
        stream: The stream that the memory will be used on.
        device: Number of the GPU it has to be on.

    Raises:
        InputError: On another GPU, not contiguous, a type NumPy has no name for, or its owner
            does not give it out (a tensor that requires a gradient).
    """
    if hasattr(array, "__dlpack_device__"):
        where = int(array.__dlpack_device__()[1])
        if where != device:
            raise InputError(f"the array is on GPU {where}, the plan on GPU {device}")
        try:
            capsule = array.__dlpack__(stream=stream)
        except (BufferError, RuntimeError, TypeError) as error:
            raise InputError(f"the array does not give out its memory: {error}") from error
        return _from_dlpack(capsule)
    return _from_interface(array, array.__cuda_array_interface__)


def _from_interface(array: Any, interface: dict[str, Any]) -> DeviceArray:
    address, read_only = interface["data"]
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None:
        _hold_contiguous(shape, tuple(stride // dtype.itemsize for stride in strides))
    # Before version 3 nothing is said of streams: then what the default one does comes first.
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
    """Reads a capsule without consuming it: its owner frees it when the capsule goes."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = ctypes.cast(get(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents
    if tensor.code not in KINDS or tensor.lanes != 1:
        raise InputError(f"the array's type (DLPack code {tensor.code}) is none that NumPy has")
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        _hold_contiguous(shape, tuple(tensor.strides[: tensor.ndim]))
    return DeviceArray(
        address=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        dtype=np.dtype(f"{KINDS[tensor.code]}{tensor.bits // 8}"),
        after=None,
        writable=True,  # the unversioned capsule gives out writable memory only
        owner=capsule,
    )


def _hold_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Raises where elements do not lie one after the other; strides count elements."""
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected and 0 not in shape:
            raise InputError(
                f"the array on the GPU is not contiguous (shape {list(shape)}, strides "
                f"{list(strides)})",
                fix="make it so first: .contiguous() in torch, ascontiguousarray elsewhere",
            )
        expected *= length
