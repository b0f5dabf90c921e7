"""Whether TensorRT will run a quantized ONNX file as it says: for files made by anybody.

`rtresnet lint FILE.onnx` needs neither a GPU nor TensorRT; what TensorRT does with each form was
tried beforehand. An error is refused, computed otherwise than ONNX Runtime does, or run in float
where the file says INT8. A warning costs speed or accuracy. A note is for information.

Numbers, each with its reason:

 1. unsigned: TensorRT has no unsigned INT8. uint8 with zero point 0 is read as int8.
 2. zero-point: TensorRT takes symmetric quantization only, and refuses any other zero point.
 3. no-zero-point: left out, TensorRT reads int8 and ONNX Runtime uint8. Where the type is said
    in another way (int8 data, output_dtype) the two agree, and it is a note.
 4. scale-shape: an activation scale of shape [1] passes every check, and the convolution that
    reads it then runs in float without a word. It has to be of rank 0.
 5. activation-axis: activations take one scale a tensor.
 6. bad-scale: zero, negative, not finite, or not known before the graph runs.
 7. weight-type: weights have to be int8 and symmetric.
 8. weight-per-tensor: one scale for a whole weight loses accuracy, and wins nothing.
 9. weight-axis: kernels take one scale an output channel, of axis 0 ([out, in, h, w] and, with
    transB, [classes, features]; without it axis 1); along another axis weights are dequantized
    and run in float.
10. quantized-bias: an int32 bias behind a DequantizeLinear is refused. It has to be float.
11. half-scale: FP16 scales came with opset 19.
12. mixed-half: FP16 data with FP32 scales needs a Cast to FP32 before Q and one back after DQ.
13. other-type: 16-bit types are refused; of other types than INT8 this file knows nothing.

Places:

14. add-both: both inputs of a residual Add are quantized. The branch that ends in a convolution
    should stay as it is, so that convolution, addition and ReLU fuse: one rounding less.
15. float-shortcut: the shortcut's input of a residual Add is float. tensors between blocks
    then stays float, and INT8 may be slower than FP16.
16. before-relu: a pair between a convolution or Add and its ReLU keeps them from fusing.
17. float-conv: a convolution whose data or weights are float runs in float.
18. float-gemm: the same for the FC; a note where the batch is dynamic (ModelOpt's default).
19. float-pool: a MaxPool between float tensors. It could run in INT8.
20. quantized-logits: a pair in front of an output rounds it, and wins nothing.
21. dangling: Q that no DQ reads, DQ that nothing reads, or a pair in front of what has no INT8
    kernel.

The file:

22. integer-operator: QLinearConv, ConvInteger, DynamicQuantizeLinear and the like are not
    supported.
23. opset: below 13 Q and DQ know no axis.
24. invalid: the ONNX checker refuses the file for another reason.
25. float-file: no Q/DQ at all, a note.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from rtresnet.onnxlib.graph import DEQUANTIZE, MOVES, QUANTIZE, WEIGHTED, GraphIndex, label
from rtresnet.quantization.lint_numbers import numbers
from rtresnet.quantization.lint_rules import SEVERITIES, Finding, finding

# What has an INT8 kernel, or passes INT8 on.
SERVED = (
    *WEIGHTED, "ConvTranspose", "Add", "Mul", "Concat", "Resize", "MaxPool", "AveragePool",
    "GlobalAveragePool", "ReduceMean",
)  # fmt: skip
FUSED = ("Relu", "Clip", "BatchNormalization")
INTEGER = (
    "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QGemm",
    "MatMulIntegerToFloat",
)  # fmt: skip


def lint(model: onnx.ModelProto) -> list[Finding]:
    """Everything about a file's quantization that TensorRT or accuracy would suffer from.

    Args:
        model: Any ONNX model, quantized by anything. Not changed.

    Returns:
        Errors first, then warnings, then notes; each in graph order.
    """
    view, name = GraphIndex(model), model.graph.name or "graph"
    found = list(_operators(view))
    if view.quantizers():
        if view.opset < 13:
            found.append(finding("opset", name, detail=f"opset {view.opset}"))
        found += [*numbers(view), *_placed(view)]
    elif not found:
        found.append(finding("float-file", name))
    if not any(entry.severity == "error" for entry in found):
        try:
            onnx.checker.check_model(model)
        except (onnx.checker.ValidationError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:120]
            found.append(finding("invalid", name, detail=reason))
    return sorted(found, key=lambda entry: SEVERITIES.index(entry.severity))


def _operators(view: GraphIndex) -> Iterator[Finding]:
    for node in view.nodes:
        if node.op_type in INTEGER or node.op_type.startswith("QLinear"):
            yield finding("integer-operator", label(node), detail=node.op_type)


def _placed(view: GraphIndex) -> Iterator[Finding]:
    """Rules 14 to 21."""
    batch = view.graph.input[0].type.tensor_type.shape.dim if view.graph.input else ()
    dynamic = not batch or not batch[0].HasField("dim_value")
    for node in view.nodes:
        if node.op_type == "Add":
            yield from _residual(view, node)
        elif node.op_type == "Conv" and _runs_in_float(view, node):
            yield finding("float-conv", label(node))
        elif node.op_type in ("Gemm", "MatMul") and _runs_in_float(view, node):
            yield finding("float-gemm", label(node), "note" if dynamic else None)
        elif node.op_type == "MaxPool" and not _pools_int8(view, node):
            yield finding("float-pool", label(node))
        elif node.op_type == QUANTIZE:
            yield from _serves(view, node)
        elif node.op_type == DEQUANTIZE and _unread(view, node):
            yield finding("dangling", label(node), detail="nothing reads this DQ")


def _residual(view: GraphIndex, add: onnx.NodeProto) -> Iterator[Finding]:
    index = view.shortcut(add)
    if index is None:
        return
    if view.dequantized(add.input[index], MOVES) is None:
        yield finding("float-shortcut", label(add))
    elif view.dequantized(add.input[1 - index]) is not None:
        yield finding("add-both", label(add))


def _runs_in_float(view: GraphIndex, node: onnx.NodeProto) -> bool:
    if node.op_type == "MatMul" and not _weight_is_constant(view, node):
        return False  # a product of two activations, as in attention: nothing to say
    return any(view.dequantized(name, MOVES) is None for name in node.input[:2])


def _weight_is_constant(view: GraphIndex, node: onnx.NodeProto) -> bool:
    behind = (*MOVES, QUANTIZE, DEQUANTIZE)
    return view.constant(view.origin(node.input[1], behind)) is not None


def _pools_int8(view: GraphIndex, pool: onnx.NodeProto) -> bool:
    """A DQ before it, or one Q as the only reader, which TensorRT moves in front of it."""
    readers = list(view.uses(pool.output[0]))
    alone = len(readers) == 1 and readers[0][0].op_type == QUANTIZE
    return alone or view.dequantized(pool.input[0], MOVES) is not None


def _unread(view: GraphIndex, dequantize: onnx.NodeProto) -> bool:
    """Whether nothing reads a DQ; one that stands alone behind its Q is named by the Q."""
    name = dequantize.output[0]
    alone = view.quantizer(dequantize) is not None and len(view.readers[dequantize.input[0]]) == 1
    return not (alone or view.readers[name] or name in view.outputs)


def _serves(view: GraphIndex, quantize: onnx.NodeProto) -> Iterator[Finding]:
    """What reads a QuantizeLinear's tensor, and whether that is of use."""
    name, values = label(quantize), quantize.output[0]
    pairs = [node for node, _ in view.uses(values, MOVES) if node.op_type == DEQUANTIZE]
    if view.reaches_output(values) or any(view.reaches_output(p.output[0]) for p in pairs):
        yield finding("quantized-logits", name)
        return
    if not pairs:
        yield finding("dangling", name, detail="no DQ reads this Q")
        return
    served = [use for pair in pairs for use in view.uses(pair.output[0], MOVES)]
    before = view.maker(quantize.input[0])
    fusing = before is not None and before.op_type in ("Conv", "Gemm", "Add", "BatchNormalization")
    if fusing and any(reader.op_type in FUSED for reader, _ in served):
        yield finding("before-relu", name)
    elif not served and not any(_pools(view, pair) for pair in pairs):
        yield finding("dangling", name, detail="nothing reads its DQ")
    elif served and not any(r.op_type in SERVED or r.op_type == QUANTIZE for r, _ in served):
        kinds = ", ".join(sorted({reader.op_type for reader, _ in served}))
        yield finding("dangling", name, detail=f"feeds {kinds} only")


def _pools(view: GraphIndex, pair: onnx.NodeProto) -> bool:
    return any(node.op_type == "MaxPool" for node, _ in view.readers[pair.output[0]])
