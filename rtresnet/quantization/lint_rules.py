"""What `lint.py` can find, in words: what happens, and what mends it."""

from __future__ import annotations

from dataclasses import dataclass

SEVERITIES = ("error", "warning", "note")

# rule: (severity, consequence, mend)
RULES = {
    "unsigned": (
        "error",
        "uint8 with zero point 0: TensorRT reads it as int8, and computes other numbers than ONNX "
        "Runtime",
        "quantize activations to int8 with zero point 0",
    ),
    "zero-point": (
        "error",
        "a zero point that is not 0: TensorRT refuses the file",
        "quantize symmetrically to int8; --fix does it where the zero point is uint8 128",
    ),
    "no-zero-point": (
        "error",
        "no zero point: TensorRT reads int8, ONNX Runtime uint8",
        "write an int8 zero point of 0, and calibrate for int8",
    ),
    "scale-shape": (
        "error",
        "an activation scale of shape [1]: whatever reads it runs in float, without a word",
        "store the scale with rank 0; --fix does it",
    ),
    "activation-axis": (
        "error",
        "an activation with several scales: whatever reads it runs in float, without a word",
        "quantize activations per tensor",
    ),
    "bad-scale": (
        "error",
        "a scale that is not a positive, finite constant",
        "calibrate again, with images that reach this tensor",
    ),
    "weight-type": (
        "error",
        "weights that are not symmetric int8: TensorRT refuses them or reads other numbers",
        "quantize weights to int8 with zero point 0",
    ),
    "weight-per-tensor": (
        "warning",
        "one scale for a whole weight: less accurate than one an output channel, and no faster",
        "quantize weights per channel, on axis 0",
    ),
    "weight-axis": (
        "error",
        "weight scales along another axis than the output channels': TensorRT dequantizes the "
        "weights and runs in float",
        "one scale an output channel: axis 0 of a Conv and of a Gemm with transB=1",
    ),
    "quantized-bias": (
        "error",
        "a bias behind a DequantizeLinear: TensorRT refuses the file",
        "keep biases float; --fix stores what the DequantizeLinear gives",
    ),
    "half-scale": (
        "error",
        "an FP16 scale below opset 19: not valid ONNX",
        "use opset 19 or later, or float32 scales between Casts",
    ),
    "mixed-half": (
        "error",
        "FP16 data with an FP32 scale, or the reverse: TensorRT refuses the file",
        "Cast to float32 before QuantizeLinear and back after DequantizeLinear",
    ),
    "other-type": (
        "note",
        "quantized to another type than INT8: not judged here",
        "for INT8 write an int8 zero point",
    ),
    "add-both": (
        "warning",
        "both inputs of a residual Add are quantized: one rounding more, and nothing is faster",
        "quantize the shortcut's input only, so that convolution, Add and ReLU fuse",
    ),
    "float-shortcut": (
        "warning",
        "the shortcut's input of a residual Add is float: tensors between blocks are float, "
        "and INT8 may be slower than FP16",
        "quantize the shortcut's input too",
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
        "quantize its input, or all that reads it by one pair",
    ),
    "quantized-logits": (
        "warning",
        "a pair in front of an output: rounding, and no gain",
        "leave outputs float",
    ),
    "dangling": (
        "warning",
        "a pair or half of one that serves nothing with an INT8 kernel",
        "leave it out; --fix removes what nothing reads",
    ),
    "integer-operator": (
        "error",
        "an operator that TensorRT does not support",
        "quantize in the Q/DQ format: QuantizeLinear and DequantizeLinear around float operators",
    ),
    "opset": (
        "error",
        "an opset below 13, in which Q and DQ have no axis for per-channel weights",
        "export with opset 13 or later",
    ),
    "invalid": ("error", "the ONNX checker refuses the file", "make the file again"),
    "float-file": (
        "note",
        "no QuantizeLinear and no DequantizeLinear: a float model",
        "for INT8: rtresnet quantize",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule that one node does not keep.

    Attributes:
        rule: A short name, the same in every version.
        severity: error, warning or note.
        node: Its name, or its output's; the graph's where the file as a whole is meant.
    """

    rule: str
    severity: str
    node: str
    consequence: str
    mend: str


def finding(rule: str, node: str, severity: str | None = None, detail: str = "") -> Finding:
    """A finding with the rule's own words; `detail` is added to the consequence."""
    usual, consequence, mend = RULES[rule]
    return Finding(
        rule=rule,
        severity=severity or usual,
        node=node,
        consequence=f"{consequence} ({detail})" if detail else consequence,
        mend=mend,
    )
