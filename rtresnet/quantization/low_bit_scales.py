"""Scales with few significant bits, so that a convolution's sum is exact, whoever adds it up.

An int8 value is a whole number of at most 7 bits. Where an activation's scale has few significant
bits and a weight's as well, a product is a whole number times a power of two, and so is every
partial sum: exact in float32 up to 2**24 such units, and always in int32. Libraries then differ in
nothing, whatever order they add in; with other scales their float32 sums differ in the last bit,
now and then on the border between two steps, and a deep net makes many steps of one.

Price: an activation's scale is up to 1/9 off the one asked for (3 bits), a weight's up to 1/8
coarser (4 bits). That is for nets that learn with these scales (`train/qat.py`).

`nearest` and `at_least` work on bit patterns of positive float32 numbers, as int32: arrays of NumPy
here, tensors of torch in training.
"""

from __future__ import annotations

from typing import Any

import numpy as np

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


def scale(asked: float) -> float:
    """Of an activation: the nearest one with which sums are exact."""
    pattern = np.array(nearest(np.array(asked, np.float32).view(np.int32), ACTIVATION_BITS))
    return float(pattern.view(np.float32))


def weight_scales(asked: np.ndarray) -> np.ndarray:
    """Of weights, float32 [out channels]: the smallest with which nothing more is clipped."""
    scales: np.ndarray = at_least(asked.view(np.int32), WEIGHT_BITS).view(np.float32)
    return scales


def bias(asked: np.ndarray, scale: float, scales: np.ndarray) -> np.ndarray:
    """Rounded to whole steps of the sums that it is added to; float32 [out channels].

    Args:
        asked: float32 [out channels].
        scale: Of the activation.
        scales: Of the weights, one an output channel.
    """
    steps = scale * scales.astype(np.float64)
    rounded: np.ndarray = (np.rint(asked / steps) * steps).astype(np.float32)
    return rounded
