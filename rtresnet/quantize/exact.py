"""Scales with few significant bits, so that a convolution's sum is exact, whoever adds it up.

An int8 value is a whole number of at most 7 bits. Where an activation's scale has few significant
bits and a weight's as well, a product is a whole number times a power of two, and so is every
partial sum: exact in float32 up to 2**24 such units, and always in int32. Libraries then differ in
nothing, whatever order they add in; with other scales their float32 sums differ in the last bit,
now and then on the border between two steps, and a deep net makes many steps of one.

Price: an activation's scale is up to 1/9 off the one asked for (3 bits), a weight's up to 1/8
coarser (4 bits). That is for nets that learn with these scales (`train/qat.py`).

Works on bit patterns of positive float32 numbers: int32 arrays of NumPy, tensors of torch, ints.
"""

from __future__ import annotations

from typing import Any

ACTIVATION_BITS, WEIGHT_BITS = 3, 4
SIGNIFICANT = 24  # of a float32


def nearest(pattern: Any, bits: int) -> Any:
    """The number of so many significant bits that is nearest; the larger of two."""
    dropped = 1 << (SIGNIFICANT - bits)
    return (pattern + dropped // 2) & -dropped


def at_least(pattern: Any, bits: int) -> Any:
    """The smallest number of so many significant bits that is not smaller."""
    dropped = 1 << (SIGNIFICANT - bits)
    return (pattern + dropped - 1) & -dropped
