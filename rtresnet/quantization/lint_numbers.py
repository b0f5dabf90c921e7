"""Rules 1 to 13 of `lint.py`: the scales, zero points and types of Q/DQ pairs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto

from rtresnet.onnxlib.graph import DEQUANTIZE, QUANTIZE, WEIGHTED, GraphIndex, attribute, label
from rtresnet.quantization.lint_rules import Finding, finding

WIDE = (TensorProto.INT16, TensorProto.UINT16)
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def numbers(view: GraphIndex) -> Iterator[Finding]:
    """The findings; a pair that breaks a rule with both its halves is named once, by its Q."""
    said: set[tuple[str, str]] = set()  # (output of the Q, rule)
    for node in view.quantizers():
        pair = view.quantizer(node) if node.op_type == DEQUANTIZE else node
        key = (pair or node).output[0]
        for entry in _of_node(view, node):
            if (key, entry.rule) not in said:
                yield entry
            said.add((key, entry.rule))


def role(view: GraphIndex, node: onnx.NodeProto) -> str:
    """What a Q or DQ stands at: activation, weight or bias."""
    pair = view.quantizer(node) if node.op_type == DEQUANTIZE else node
    if view.constant(view.origin((pair or node).input[0])) is None:
        return "activation"
    uses = list(readers(view, node))
    if stored_type(view, node) == TensorProto.INT32:
        return "bias"
    at_bias = [user.op_type in WEIGHTED and index == 2 for user, index in uses]
    return "bias" if at_bias and all(at_bias) else "weight"


def readers(view: GraphIndex, node: onnx.NodeProto) -> Iterator[tuple[onnx.NodeProto, int]]:
    """The inputs that read what a pair gives, from either half of it."""
    if node.op_type == DEQUANTIZE:
        yield from view.uses(node.output[0])
        return
    for reader, _ in view.uses(node.output[0]):
        if reader.op_type == DEQUANTIZE:
            yield from view.uses(reader.output[0])


def zero_point(node: onnx.NodeProto) -> str:
    """The name of the zero point; empty where it is left out."""
    return node.input[2] if len(node.input) > 2 else ""


def stored_type(view: GraphIndex, node: onnx.NodeProto) -> int:
    """The type a Q writes or a DQ reads, as ONNX defines it."""
    if zero_point(node) in view.types and zero_point(node):
        return view.types[zero_point(node)]
    if node.op_type == QUANTIZE:
        return attribute(node, "output_dtype", 0) or TensorProto.UINT8
    pair = view.quantizer(node)
    return stored_type(view, pair) if pair is not None else view.types.get(node.input[0], 0)


def _of_node(view: GraphIndex, node: onnx.NodeProto) -> Iterator[Finding]:
    name, what = label(node), role(view, node)
    scale, zero = view.constant(node.input[1]), _zero(view, node)
    if what == "bias":
        yield finding("quantized-bias", name)
        return
    yield from _float_types(view, node)
    if scale is None or not (np.isfinite(scale) & (scale > 0)).all():
        yield finding("bad-scale", name)
        return
    stored = stored_type(view, node)
    if stored not in (TensorProto.INT8, TensorProto.UINT8):
        kind = TensorProto.DataType.Name(stored)
        yield finding("other-type", name, "error" if stored in WIDE else None, kind.lower())
        return
    if not zero_point(node):
        yield from _omitted(view, node, stored)
    if what == "weight":
        if (stored == TensorProto.UINT8 and zero_point(node)) or zero is None or zero.any():
            yield finding("weight-type", name)
        yield from _weight_scales(view, node, scale)
        return
    if zero is None or zero.any():
        yield finding("zero-point", name)
    elif stored == TensorProto.UINT8 and zero_point(node):
        yield finding("unsigned", name)
    if scale.size > 1:
        yield finding("activation-axis", name)
    elif scale.ndim:
        yield finding("scale-shape", name)


def _omitted(view: GraphIndex, node: onnx.NodeProto, stored: int) -> Iterator[Finding]:
    if stored == TensorProto.INT8:
        yield finding("no-zero-point", label(node), "note", "the type is still int8")
    else:
        yield finding("no-zero-point", label(node))


def _zero(view: GraphIndex, node: onnx.NodeProto) -> np.ndarray | None:
    """The zero point; 0 where it is left out, None where it is not a constant."""
    return view.constant(zero_point(node)) if zero_point(node) else np.zeros((), np.int8)


def _float_types(view: GraphIndex, node: onnx.NodeProto) -> Iterator[Finding]:
    """FP16: what scales may be, and what they may be mixed with."""
    scale = view.types.get(node.input[1], 0)
    if scale == TensorProto.FLOAT16 and view.opset < 19:
        yield finding("half-scale", label(node), detail=f"opset {view.opset}")
    if node.op_type == QUANTIZE:
        neighbours = {view.types.get(node.input[0], 0)}
    else:
        scale = attribute(node, "output_dtype", 0) or scale
        neighbours = {
            view.types.get(name, 0)
            for reader, _ in view.readers[node.output[0]]
            if reader.op_type in (*WEIGHTED, "Add")
            for name in reader.input
            if name != node.output[0] and view.dequantized(name, ()) is None
        }
    if scale in FLOATS and any(kind in FLOATS and kind != scale for kind in neighbours):
        yield finding("mixed-half", label(node))


def _weight_scales(view: GraphIndex, node: onnx.NodeProto, scale: np.ndarray) -> Iterator[Finding]:
    users = [user for user, index in readers(view, node) if user.op_type in WEIGHTED and index == 1]
    if not users:
        return
    weight = view.constant(view.origin(_stored(view, node)))
    assert weight is not None  # or it were an activation
    if scale.size == 1 and weight.shape[_output_axis(users[0])] > 1:
        yield finding("weight-per-tensor", label(node))
    elif scale.ndim == 1:
        axis = attribute(node, "axis", 1) % weight.ndim
        if any(axis != _output_axis(user) for user in users):
            yield finding("weight-axis", label(node), detail=f"axis {axis} of {users[0].op_type}")


def _stored(view: GraphIndex, node: onnx.NodeProto) -> str:
    pair = view.quantizer(node) if node.op_type == DEQUANTIZE else node
    name: str = (pair or node).input[0]
    return name


def _output_axis(node: onnx.NodeProto) -> int:
    """The axis of a weight that its node's output channels lie along."""
    if node.op_type == "Gemm":
        return 1 - attribute(node, "transB", 0)
    return 1 if node.op_type == "MatMul" else 0
