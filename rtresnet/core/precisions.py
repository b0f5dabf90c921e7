"""The precisions of files and plans, in one table.

A precision's tolerances are in `bench/consistency.py`, the rates of GPUs in `bench/roofline.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

PrecisionName = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
CalibratedName = Literal["int8", "fp8"]
HalfName = Literal["fp16", "bf16"]
QuantizedName = Literal[CalibratedName, HalfName]
"""The precisions that `quantize` writes."""


@dataclass(frozen=True, kw_only=True)
class PrecisionSpec:
    """A precision of convolutions.

    Attributes:
        name: As in options, sidecars and file names (MODEL-int8.onnx).
        title: Name for help texts.
        onnx: ONNX data type of the weights, a value of TensorProto.DataType.
        tensorrt: TensorRT's name of the data type in lists of layers.
        bits: Bits of a value.
        opset: ONNX opset that a file needs at least.
        calibrated: Whether values need scales.
        targets: Compute capabilities that have it; None: all.
    """

    name: PrecisionName
    title: str
    onnx: int
    tensorrt: str
    bits: int
    opset: int
    calibrated: bool = False
    targets: tuple[str, ...] | None = None


_AMPERE_ON = (
    "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121"
)  # fmt: skip
_ADA_ON = _AMPERE_ON[3:]

PRECISIONS: dict[str, PrecisionSpec] = {
    spec.name: spec
    for spec in (
        PrecisionSpec(name="fp32", title="FP32", onnx=1, tensorrt="Float", bits=32, opset=1),
        PrecisionSpec(name="fp16", title="FP16", onnx=10, tensorrt="Half", bits=16, opset=1),
        PrecisionSpec(
            name="bf16", title="BF16", onnx=16, tensorrt="BFloat16", bits=16, opset=22,
            targets=_AMPERE_ON,
        ),
        PrecisionSpec(
            name="int8", title="INT8", onnx=3, tensorrt="Int8", bits=8, opset=13, calibrated=True
        ),
        PrecisionSpec(
            name="fp8", title="FP8 (E4M3)", onnx=17, tensorrt="FP8", bits=8, opset=21,
            calibrated=True, targets=_ADA_ON,
        ),
    )
}  # fmt: skip

CALIBRATED = tuple(name for name, spec in PRECISIONS.items() if spec.calibrated)
FLOAT = tuple(name for name in PRECISIONS if name not in CALIBRATED)
BY_TENSORRT_TYPE = {spec.tensorrt: spec.name for spec in PRECISIONS.values()}


def unsupported(name: str, targets: Iterable[str]) -> list[str]:
    """Return the compute capabilities that do not have a precision."""
    supported = PRECISIONS[name].targets
    return [target for target in targets if supported is not None and target not in supported]
