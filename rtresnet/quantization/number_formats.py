"""The number formats of quantized tensors, and scales with few significant bits. Pure NumPy.

INT8 is symmetric, [-127, 127]. FP8 is FLOAT8E4M3FN: 4 bits of exponent, 3 of mantissa, no infinity,
largest value 448 (Micikevicius et al., 2022, FP8 Formats for Deep Learning, table 1).

Scales with few significant bits make the sums of a convolution exact, in any order of addition. An
int8 value is an integer of at most 7 bits. If the scales of activation and weight have few
significant bits, every product and every partial sum is an integer times a power of two: exact
in float32 up to 2**24 such units, and always in int32. With other scales the float32 sums of two
libraries differ in the last bit, sometimes on the border between two quantized values, and a deep
net amplifies the difference. The cost: the scale of an activation differs by up to 1/9 from the
requested one (3 bits), that of a weight is up to 1/8 larger (4 bits). Use them for nets trained
with them (`training/qat.py`).

`round_to_bits` and `round_up_to_bits` work on bit patterns of positive float32 numbers as int32:
NumPy arrays here, tensors of torch in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rtresnet.core.precisions import PRECISIONS, CalibratedName

INT8_MAX = 127
# A scale outside these would be zero, subnormal or infinite in float32.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

ACTIVATION_BITS, WEIGHT_BITS = 3, 4
SIGNIFICANT = 24  # bits of a float32


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """A number format of quantized tensors.

    Attributes:
        name: As in the options: "int8" or "fp8".
        largest: The largest value; a clipping point over it is a scale.
    """

    name: CalibratedName
    largest: float

    @property
    def opset(self) -> int:
        """ONNX opset that a file needs at least."""
        return PRECISIONS[self.name].opset

    @property
    def dtype(self) -> Any:
        """The NumPy type of the stored values."""
        if self.name == "int8":
            return np.dtype(np.int8)
        assert self.name == "fp8", self.name
        import ml_dtypes  # a dependency of onnx

        return np.dtype(ml_dtypes.float8_e4m3fn)

    def round(self, values: np.ndarray) -> np.ndarray:
        """Round half to even to the nearest value of the format, clipped to its range."""
        clipped = np.clip(values, -self.largest, self.largest)
        if self.name == "int8":
            whole: np.ndarray = np.rint(clipped)
            return whole
        assert self.name == "fp8", self.name
        # frexp's mantissa is in [0.5, 1). Below 2**-6 the values are subnormal: equal steps.
        _, exponent = np.frexp(clipped)
        step = np.ldexp(1.0, np.maximum(exponent - 1, FP8_MIN_EXPONENT) - FP8_MANTISSA_BITS)
        rounded: np.ndarray = np.rint(clipped / step) * step
        return rounded


FP8_MIN_EXPONENT, FP8_MANTISSA_BITS = -6, 3
INT8 = NumberFormat(name="int8", largest=INT8_MAX)
FP8 = NumberFormat(name="fp8", largest=448)
FORMATS: dict[str, NumberFormat] = {entry.name: entry for entry in (INT8, FP8)}


def weight_scales(weight: np.ndarray, number_format: NumberFormat = INT8) -> np.ndarray:
    """Return one float32 scale per output channel (axis 0): largest magnitude over largest value.

    A channel of zeros, or with values too small for a float32 scale, gets scale 1 and becomes zero.
    """
    steps = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64)
    steps /= number_format.largest
    scales: np.ndarray = np.where(steps >= SMALLEST, steps, 1).astype(np.float32)
    return scales


def quantize_weight(
    weight: np.ndarray, scales: np.ndarray, number_format: NumberFormat = INT8
) -> np.ndarray:
    """Round half to even, as QuantizeLinear does, to int8 in [-127, 127] or to E4M3."""
    shape = (-1,) + (1,) * (weight.ndim - 1)
    quantized = number_format.round(weight / scales.reshape(shape))
    return quantized.astype(number_format.dtype)


def round_to_bits(pattern: Any, bits: int) -> Any:
    """Round to the nearest number of `bits` significant bits; the larger of two."""
    dropped = 1 << (SIGNIFICANT - bits)
    return (pattern + dropped // 2) & -dropped


def round_up_to_bits(pattern: Any, bits: int) -> Any:
    """Round up to a number of `bits` significant bits."""
    dropped = 1 << (SIGNIFICANT - bits)
    return (pattern + dropped - 1) & -dropped


def low_bit_scale(scale: float) -> float:
    """Round the scale of an activation to the nearest one with which sums are exact."""
    pattern = round_to_bits(np.array(scale, np.float32).view(np.int32), ACTIVATION_BITS)
    return float(np.array(pattern).view(np.float32))


def low_bit_weight_scales(scales: np.ndarray) -> np.ndarray:
    """Round float32 [out channels] scales of weights up, so that nothing more is clipped."""
    rounded: np.ndarray = round_up_to_bits(scales.view(np.int32), WEIGHT_BITS).view(np.float32)
    return rounded


def low_bit_bias(bias: np.ndarray, scale: float, scales: np.ndarray) -> np.ndarray:
    """Round a bias to whole units of the sums that it is added to.

    Args:
        bias: float32 [out channels].
        scale: Scale of the activation.
        scales: Scales of the weights, float32 [out channels].
    """
    steps = scale * scales.astype(np.float64)
    rounded: np.ndarray = (np.rint(bias / steps) * steps).astype(np.float32)
    return rounded
