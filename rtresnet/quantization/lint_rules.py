"""The rules of `lint.py`: problems in TensorRT, and how to fix them."""

from __future__ import annotations

from dataclasses import dataclass

from rtresnet.core.serialization import json_name

SEVERITIES = ("error", "warning", "note")

# Rule: (severity, consequence, fix). An error is rejected by TensorRT, computes different values
# than in ONNX Runtime, or silently runs in float. A warning costs speed or accuracy. The first part
# is about scales, zero points and types, the second about placement, the third about the whole
# file.
RULES = {
    "unsigned": (
        "error",
        "uint8 with zero point 0: TensorRT has no unsigned INT8, reads it as int8, and computes "
        "different values than ONNX Runtime",
        "quantize activations to int8 with zero point 0",
    ),
    "zero-point": (
        "error",
        "a zero point other than 0: TensorRT rejects the file, or ignores the zero point in FP8",
        "quantize symmetrically to int8; --fix does it for a uint8 zero point of 128",
    ),
    "no-zero-point": (
        "error",
        "no zero point: TensorRT reads int8, ONNX Runtime uint8",
        "write a zero point of 0 in int8 (for FP8 in FLOAT8E4M3FN), and calibrate for that type",
    ),
    "scale-shape": (
        "error",
        "an activation scale of shape [1]: every checker accepts it, and TensorRT silently runs "
        "the node that reads it in float",
        "store the scale with rank 0; --fix does it",
    ),
    "activation-axis": (
        "error",
        "an activation with several scales: TensorRT silently runs the node that reads it in float",
        "quantize activations per tensor",
    ),
    "bad-scale": (
        "error",
        "a scale that is not a positive, finite constant",
        "calibrate again, with images that reach this tensor",
    ),
    "weight-type": (
        "error",
        "weights that are not symmetric int8: TensorRT rejects them or reads different values",
        "quantize weights to int8 with zero point 0",
    ),
    "weight-per-tensor": (
        "warning",
        "one scale for a complete weight: less accurate than one per output channel, and no faster",
        "quantize weights per channel, on axis 0",
    ),
    "weight-axis": (
        "error",
        "weight scales along another axis than the output channels: TensorRT dequantizes the "
        "weights and runs in float",
        "one scale per output channel: axis 0 of a Conv and of a Gemm with transB=1",
    ),
    "quantized-bias": (
        "error",
        "a bias behind a DequantizeLinear: TensorRT rejects the file",
        "keep biases float; --fix stores the output of the DequantizeLinear",
    ),
    "half-scale": (
        "error",
        "an FP16 scale below opset 19: not valid ONNX",
        "use opset 19 or later, or float32 scales between Casts",
    ),
    "mixed-half": (
        "error",
        "FP16 data with an FP32 scale, or the reverse: TensorRT rejects the file",
        "Cast to float32 before QuantizeLinear and back after DequantizeLinear",
    ),
    "fp8-type": (
        "error",
        "an 8-bit float other than E4M3: TensorRT cannot parse the file",
        "quantize to FLOAT8E4M3FN",
    ),
    "fp8-overflow": (
        "error",
        "an FP8 scale that does not fit its values: some become infinite or are clipped",
        "calibrate again, so that the largest magnitude is at most 448 times the scale",
    ),
    "other-type": (
        "note",
        "quantized to another type than INT8 and FP8: not checked",
        "for INT8 write an int8 zero point, for FP8 one of FLOAT8E4M3FN",
    ),
    "mixed-kernel": (
        "error",
        "data and weights are quantized to different types: TensorRT has no such kernel",
        "quantize both inputs to the same type",
    ),
    "mixed-add": (
        "warning",
        "the two inputs of a residual Add are quantized to different types: one more conversion",
        "quantize only the shortcut's input",
    ),
    "add-both": (
        "warning",
        "both inputs of a residual Add are quantized: one more rounding, and no gain in speed",
        "quantize only the shortcut's input, so that convolution, Add and ReLU can fuse",
    ),
    "float-shortcut": (
        "warning",
        "the shortcut's input of a residual Add is float: tensors between blocks stay float, "
        "and INT8 may be slower than FP16",
        "also quantize the shortcut's input",
    ),
    "before-relu": (
        "warning",
        "a pair between a convolution or Add and its ReLU keeps them from fusing",
        "quantize after the ReLU",
    ),
    "float-conv": (
        "warning",
        "a convolution with float data or weights runs in float",
        "quantize its data input and its weights",
    ),
    "float-gemm": (
        "warning",
        "a fully connected layer with float data or weights runs in float",
        "quantize its data input and its weights",
    ),
    "float-pool": (
        "note",
        "a MaxPool between float tensors runs in float",
        "quantize its input, or give all its readers one pair",
    ),
    "quantized-logits": (
        "warning",
        "a pair before an output: rounding without a speed-up",
        "leave outputs float",
    ),
    "dangling": (
        "warning",
        "a pair, or half of one, that no INT8 kernel reads",
        "remove it; --fix removes unread pairs",
    ),
    "integer-operator": (
        "error",
        "an operator that TensorRT does not support",
        "quantize in the Q/DQ format: QuantizeLinear and DequantizeLinear around float operators",
    ),
    "box-operator": (
        "error",
        "an operator that TensorRT-RTX does not build",
        "write boxes with plain operations, as rtresnet train --task detect and rtresnet export "
        "do, or let the net end before it",
    ),
    "opset": (
        "error",
        "an opset below 13, in which Q and DQ have no axis for per-channel weights",
        "export with opset 13 or later",
    ),
    "invalid": ("error", "the ONNX checker rejects the file", "export or quantize it again"),
    "fp8-targets": (
        "note",
        "FP8 builds only for GPUs that support it: Ada, Hopper and Blackwell, sm_89 and newer",
        "for other GPUs: rtresnet quantize --int8 or --fp16",
    ),
    "float-file": (
        "note",
        "no QuantizeLinear and no DequantizeLinear: a float model",
        "for INT8: rtresnet quantize",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A violation of one rule by one node.

    Attributes:
        rule: Key of RULES; stays the same in later versions.
        severity: "error", "warning" or "note".
        node: Its name, or its output's; the graph's name if the whole file is meant.
        consequence: Effect of the problem.
        fix: Instruction that fixes it.
    """

    rule: str
    severity: str
    node: str
    consequence: str
    fix: str = json_name("mend")


def finding(rule: str, node: str, severity: str | None = None, detail: str = "") -> Finding:
    """Create a finding of a rule; `detail` is appended to the consequence."""
    usual, consequence, fix = RULES[rule]
    return Finding(
        rule=rule,
        severity=severity or usual,
        node=node,
        consequence=f"{consequence} ({detail})" if detail else consequence,
        fix=fix,
    )
