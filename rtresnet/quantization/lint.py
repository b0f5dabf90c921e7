"""Check whether TensorRT runs a quantized ONNX file of any tool as the file specifies.

Needs neither a GPU nor TensorRT: TensorRT's behaviour for each case was tested beforehand. The
rules are in `lint_rules.py`. `rtresnet lint` calls this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import TensorProto

from rtresnet.onnxlib.graph import (
    DEQUANTIZE,
    MOVES,
    QUANTIZE,
    WEIGHTED,
    GraphIndex,
    attribute,
    branch_depths,
    label,
)
from rtresnet.quantization.lint_rules import SEVERITIES, Finding, finding

# Operators that have an INT8 kernel or pass INT8 on.
INT8_OPERATORS = (
    *WEIGHTED, "ConvTranspose", "Add", "Mul", "Concat", "Resize", "MaxPool", "AveragePool",
    "GlobalAveragePool", "ReduceMean",
)  # fmt: skip
FUSED = ("Relu", "Clip", "BatchNormalization")
INTEGER_OPERATORS = (
    "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QGemm",
    "MatMulIntegerToFloat",
)  # fmt: skip
BOX_OPERATORS = ("RoiAlign", "NonMaxSuppression", "NonZero")
FP8 = TensorProto.FLOAT8E4M3FN
FP8_LARGEST = 448.0
OTHER_FP8 = (
    TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ, TensorProto.FLOAT8E4M3FNUZ,
)  # fmt: skip
WIDE = (TensorProto.INT16, TensorProto.UINT16)
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def lint(model: onnx.ModelProto) -> list[Finding]:
    """Return the problems that TensorRT or the accuracy would have.

    Args:
        model: Any ONNX model, quantized by any tool. Not changed.

    Returns:
        Errors, then warnings, then notes; each in graph order.

    Raises:
        ArtifactError: The types of its tensors contradict each other.
    """
    index, name = GraphIndex(model), model.graph.name or "graph"
    _ = index.types  # contradicting types are also an error in a float file
    findings = [
        finding("integer-operator", label(node), detail=node.op_type)
        for node in index.nodes
        if node.op_type in INTEGER_OPERATORS or node.op_type.startswith("QLinear")
    ]
    findings += [
        finding("box-operator", label(node), detail=node.op_type)
        for node in index.nodes
        if node.op_type in BOX_OPERATORS
    ]
    if index.quantizers():
        if index.opset < 13:
            findings.append(finding("opset", name, detail=f"opset {index.opset}"))
        findings += [*_numbers(index), *_placement(index)]
        if _is_fp8(index):
            findings.append(finding("fp8-targets", name))
    elif not findings:
        findings.append(finding("float-file", name))
    if not any(entry.severity == "error" for entry in findings):
        try:
            onnx.checker.check_model(model)
        except (onnx.checker.ValidationError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:120]
            findings.append(finding("invalid", name, detail=reason))
    return sorted(findings, key=lambda entry: SEVERITIES.index(entry.severity))


def _is_fp8(index: GraphIndex) -> bool:
    return any(stored_type(index, node) == FP8 for node in index.quantizers())


def role(index: GraphIndex, node: onnx.NodeProto) -> str:
    """Return the kind of tensor that a Q or DQ is for: "activation", "weight" or "bias"."""
    if index.constant(index.origin(_source(index, node))) is None:
        return "activation"
    if stored_type(index, node) == TensorProto.INT32:
        return "bias"
    at_bias = [user.op_type in WEIGHTED and i == 2 for user, i in _readers(index, node)]
    return "bias" if at_bias and all(at_bias) else "weight"


def zero_point(node: onnx.NodeProto) -> str:
    """Return the name of the zero point; empty if it is omitted."""
    return node.input[2] if len(node.input) > 2 else ""


def stored_type(index: GraphIndex, node: onnx.NodeProto) -> int:
    """Return the type that a Q writes or a DQ reads, as ONNX defines it."""
    if zero_point(node) in index.types and zero_point(node):
        return index.types[zero_point(node)]
    if node.op_type == QUANTIZE:
        return attribute(node, "output_dtype", 0) or TensorProto.UINT8
    pair = index.quantizer(node)
    return stored_type(index, pair) if pair is not None else index.types.get(node.input[0], 0)


def _quantize_of(index: GraphIndex, node: onnx.NodeProto) -> onnx.NodeProto:
    """Return the Q of a pair, given either half; a DQ without a Q is returned itself."""
    return (index.quantizer(node) if node.op_type == DEQUANTIZE else node) or node


def _source(index: GraphIndex, node: onnx.NodeProto) -> str:
    """Return the tensor that a pair quantizes, or that a DQ without a Q reads."""
    name: str = _quantize_of(index, node).input[0]
    return name


def _readers(index: GraphIndex, node: onnx.NodeProto) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Return the inputs that read the output of a pair, given either half."""
    pairs = [node]
    if node.op_type == QUANTIZE:
        pairs = [user for user, _ in index.uses(node.output[0]) if user.op_type == DEQUANTIZE]
    for pair in pairs:
        yield from index.uses(pair.output[0])


def _numbers(index: GraphIndex) -> Iterator[Finding]:
    """Check scales, zero points and types. A problem of both halves of a pair is reported once."""
    reported: set[tuple[str, str]] = set()  # (output of the Q, rule)
    for node in index.quantizers():
        key = _quantize_of(index, node).output[0]
        for entry in _numbers_of(index, node):
            if (key, entry.rule) not in reported:
                yield entry
            reported.add((key, entry.rule))


def _numbers_of(index: GraphIndex, node: onnx.NodeProto) -> Iterator[Finding]:
    name, kind = label(node), role(index, node)
    scale, zero = index.constant(node.input[1]), _zero(index, node)
    if kind == "bias":
        yield finding("quantized-bias", name)
        return
    yield from _float_types(index, node)
    if scale is None or not (np.isfinite(scale) & (scale > 0)).all():
        yield finding("bad-scale", name)
        return
    stored = stored_type(index, node)
    type_name = TensorProto.DataType.Name(stored)
    if stored in OTHER_FP8:
        yield finding("fp8-type", name, detail=type_name.lower())
        return
    if stored not in (TensorProto.INT8, TensorProto.UINT8, FP8):
        yield finding("other-type", name, "error" if stored in WIDE else None, type_name.lower())
        return
    if not zero_point(node):
        is_safe = stored != TensorProto.UINT8
        detail = f"the type is {'FP8' if stored == FP8 else 'int8'} in both" if is_safe else ""
        yield finding("no-zero-point", name, "note" if is_safe else None, detail)
    unsigned = stored == TensorProto.UINT8 and zero_point(node)
    asymmetric = zero is None or zero.astype(np.float32).any()
    if stored == FP8:
        yield from _fp8_range(index, node, scale)
    if kind == "weight":
        if unsigned or asymmetric:
            yield finding("weight-type", name)
        yield from _weight_scales(index, node, scale)
        return
    if asymmetric:
        yield finding("zero-point", name)
    elif unsigned:
        yield finding("unsigned", name)
    if scale.size > 1:
        yield finding("activation-axis", name)
    elif scale.ndim:
        yield finding("scale-shape", name)


def _fp8_range(index: GraphIndex, node: onnx.NodeProto, scale: np.ndarray) -> Iterator[Finding]:
    """Check for values that FP8 clips, and FP8 values that are not finite after dequantization."""
    reached = float(scale.astype(np.float64).max()) * FP8_LARGEST
    half = TensorProto.FLOAT16 in (
        index.types.get(name, 0) for name in _tensors_around(index, node)
    )
    largest = float(np.finfo(np.float16 if half else np.float32).max)
    if reached > largest:
        dtype = "FP16" if half else "FP32"
        detail = f"448 times the scale is {reached:.3g}, and {dtype} ends at {largest:.3g}"
        yield finding("fp8-overflow", label(node), detail=detail)
    values = index.constant(_source(index, node)) if node.op_type == QUANTIZE else None
    if values is None:
        return
    axis = attribute(node, "axis", 1) % max(1, values.ndim)
    shape = [-1 if dim == axis else 1 for dim in range(values.ndim)]
    steps = np.abs(values.astype(np.float64)) / (scale.reshape(shape) if scale.ndim else scale)
    # The values up to 464 round to 448.
    if steps.max(initial=0) > 464:
        detail = f"a weight of {steps.max():.3g} times its scale becomes 448 times"
        yield finding("fp8-overflow", label(node), "warning", detail)


def _tensors_around(index: GraphIndex, node: onnx.NodeProto) -> list[str]:
    """Return the float tensors before a Q and after a DQ, also those behind a Cast."""
    if node.op_type == QUANTIZE:
        return [node.input[0], index.origin(node.input[0])]
    following = [out for reader, _ in index.readers[node.output[0]] for out in reader.output
                 if reader.op_type == "Cast"]  # fmt: skip
    return [node.output[0], *following]


def _zero(index: GraphIndex, node: onnx.NodeProto) -> np.ndarray | None:
    """Return the zero point; 0 if it is omitted, None if it is not a constant."""
    return index.constant(zero_point(node)) if zero_point(node) else np.zeros((), np.int8)


def _float_types(index: GraphIndex, node: onnx.NodeProto) -> Iterator[Finding]:
    """Check for FP16 scales, and for FP16 mixed with FP32."""
    scale = index.types.get(node.input[1], 0)
    if scale == TensorProto.FLOAT16 and index.opset < 19:
        yield finding("half-scale", label(node), detail=f"opset {index.opset}")
    if node.op_type == QUANTIZE:
        neighbours = {index.types.get(node.input[0], 0)}
    else:
        scale = attribute(node, "output_dtype", 0) or scale
        neighbours = {
            index.types.get(name, 0)
            for reader, _ in index.readers[node.output[0]]
            if reader.op_type in (*WEIGHTED, "Add")
            for name in reader.input
            if name != node.output[0] and index.dequantized(name, ()) is None
        }
    if scale in FLOATS and any(kind in FLOATS and kind != scale for kind in neighbours):
        yield finding("mixed-half", label(node))


def _weight_scales(index: GraphIndex, node: onnx.NodeProto, scale: np.ndarray) -> Iterator[Finding]:
    users = [user for user, i in _readers(index, node) if user.op_type in WEIGHTED and i == 1]
    if not users:
        return
    weight = index.constant(index.origin(_source(index, node)))
    assert weight is not None  # otherwise it would be an activation
    if scale.size == 1 and weight.shape[_output_axis(users[0])] > 1:
        yield finding("weight-per-tensor", label(node))
    elif scale.ndim == 1:
        axis = attribute(node, "axis", 1) % weight.ndim
        if any(axis != _output_axis(user) for user in users):
            yield finding("weight-axis", label(node), detail=f"axis {axis} of {users[0].op_type}")


def _output_axis(node: onnx.NodeProto) -> int:
    """Return the axis of the output channels in a node's weight."""
    if node.op_type == "Gemm":
        return 1 - attribute(node, "transB", 0)
    return 1 if node.op_type == "MatMul" else 0


def _placement(index: GraphIndex) -> Iterator[Finding]:
    """Return which nodes read quantized tensors, and where pairs stand."""
    batch = index.graph.input[0].type.tensor_type.shape.dim if index.graph.input else ()
    dynamic = not batch or not batch[0].HasField("dim_value")
    images = {entry.name for entry in index.inputs}
    fp8 = _is_fp8(index)
    for node in index.nodes:
        if node.op_type == "Add":
            yield from _residual(index, node)
        elif node.op_type == "Conv" and _runs_in_float(index, node):
            # TensorRT has no FP8 kernel for the three channels of an image.
            if not fp8 or index.origin(node.input[0]) not in images:
                yield finding("float-conv", label(node))
        elif fp8 and node.op_type in WEIGHTED:
            if len(kinds := _kinds(index, node.input[:2])) > 1:
                yield finding("mixed-kernel", label(node), detail=" and ".join(kinds))
        elif node.op_type in ("Gemm", "MatMul") and _runs_in_float(index, node):
            # ModelOpt leaves the FC of a dynamic batch in float.
            yield finding("float-gemm", label(node), "note" if dynamic else None)
        elif node.op_type == "MaxPool" and not _pools_int8(index, node):
            yield finding("float-pool", label(node))
        elif node.op_type == QUANTIZE:
            yield from _useless(index, node)
        elif node.op_type == DEQUANTIZE and _unread(index, node):
            yield finding("dangling", label(node), detail="nothing reads this DQ")


def _residual(index: GraphIndex, add: onnx.NodeProto) -> Iterator[Finding]:
    if any(index.constant(name) is not None for name in add.input):
        return
    depths = branch_depths(index.producers, add)
    if depths is None or depths[0] == depths[1]:  # not a residual block
        return
    if len(kinds := _kinds(index, add.input)) > 1:
        yield finding("mixed-add", label(add), detail=" and ".join(kinds))
    shortcut, branch = add.input if depths[0] < depths[1] else reversed(add.input)
    if index.dequantized(shortcut, MOVES) is None:
        yield finding("float-shortcut", label(add))
    elif index.dequantized(branch) is not None:
        yield finding("add-both", label(add))


def _kinds(index: GraphIndex, names: Iterable[str]) -> list[str]:
    """Return the types that some tensors are quantized to."""
    pairs = [index.dequantized(name, MOVES) for name in names]
    kinds = {stored_type(index, pair) for pair in pairs if pair is not None}
    return sorted(TensorProto.DataType.Name(kind).lower() for kind in kinds)


def _runs_in_float(index: GraphIndex, node: onnx.NodeProto) -> bool:
    if node.op_type == "MatMul":
        weight = index.origin(node.input[1], (*MOVES, QUANTIZE, DEQUANTIZE))
        if index.constant(weight) is None:
            return False  # a product of two activations, as in attention
    return any(index.dequantized(name, MOVES) is None for name in node.input[:2])


def _pools_int8(index: GraphIndex, pool: onnx.NodeProto) -> bool:
    """Return a DQ before it, or a Q as the only reader, which TensorRT moves before it."""
    readers = list(index.uses(pool.output[0]))
    only_quantize = len(readers) == 1 and readers[0][0].op_type == QUANTIZE
    return only_quantize or index.dequantized(pool.input[0], MOVES) is not None


def _unread(index: GraphIndex, dequantize: onnx.NodeProto) -> bool:
    """Return whether nothing reads a DQ; if it is the only reader of its Q, the Q is reported."""
    name, stored = dequantize.output[0], dequantize.input[0]
    pair = index.quantizer(dequantize) is not None and len(index.readers[stored]) == 1
    return not (pair or index.readers[name] or name in index.outputs)


def _useless(index: GraphIndex, quantize: onnx.NodeProto) -> Iterator[Finding]:
    """Return a pair that nothing reads, that no INT8 kernel reads, or that prevents fusion."""
    name, values = label(quantize), quantize.output[0]
    pairs = [node for node, _ in index.uses(values, MOVES) if node.op_type == DEQUANTIZE]
    if index.reaches_output(values) or any(index.reaches_output(p.output[0]) for p in pairs):
        yield finding("quantized-logits", name)
        return
    if not pairs:
        yield finding("dangling", name, detail="no DQ reads this Q")
        return
    readers = {user.op_type for pair in pairs for user, _ in index.uses(pair.output[0], MOVES)}
    pools = any(
        user.op_type == "MaxPool" for pair in pairs for user, _ in index.readers[pair.output[0]]
    )
    before = index.maker(quantize.input[0])
    fuses = before is not None and before.op_type in ("Conv", "Gemm", "Add", "BatchNormalization")
    if fuses and readers & set(FUSED):
        yield finding("before-relu", name)
    elif not readers and not pools:
        yield finding("dangling", name, detail="nothing reads its DQ")
    elif readers and not readers & {*INT8_OPERATORS, QUANTIZE}:
        yield finding("dangling", name, detail=f"only {', '.join(sorted(readers))} reads it")
