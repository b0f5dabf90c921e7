"""Convert the float tensors of a model to FP16 or BF16, between two Casts.

A Cast follows the input, and another precedes the output.

Batch norm is already folded in FP32 (`exporter/fold.py`), so this rounds once. Input and output
stay float32: the two Casts cost no layer in the engine, and every artifact keeps one signature.

BF16 has the range of float32 and 8 significant bits. Its convolutions need opset 22.

In a Q/DQ file the tensors between the quantized kernels become FP16. Scales stay float32, and each
Q/DQ pair is placed between a Cast to float32 and one back: TensorRT rejects FP16 data with FP32
scales, and rounding a scale to FP16 would change it.

Some nodes may stay in float32, between Casts: a detector's boxes and coordinates need it, because
FP16 has a step of half a pixel above 512.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper

from rtresnet.core.errors import ArtifactError
from rtresnet.core.precisions import PRECISIONS, HalfName
from rtresnet.onnxlib.graph import (
    DEQUANTIZE,
    QUANTIZE,
    GraphIndex,
    checked,
    copied,
    replace_nodes,
    with_opset,
)

LARGEST = float(np.finfo(np.float16).max)  # 65504


def to_half(
    model: onnx.ModelProto, precision: HalfName = "fp16", float_nodes: Collection[str] = ()
) -> onnx.ModelProto:
    """Return the same graph in FP16 or BF16, with float32 input and output.

    Args:
        model: Folded FP32 model, for FP16 with Q/DQ pairs or without. Not changed.
        precision: Type of the new tensors.
        float_nodes: Names of nodes that stay in float32.

    Returns:
        The converted model, checked.

    Raises:
        ArtifactError: A weight is outside FP16's range; the message names it.
    """
    spec = PRECISIONS[precision]
    half = with_opset(copied(model), spec.opset)
    float32, results = _float_tensors(half), {entry.name for entry in half.graph.output}
    wide = {  # by the first output
        node.output[0]
        for node in half.graph.node
        if node.name in float_nodes or node.op_type in (QUANTIZE, DEQUANTIZE)
    }
    constants = _converted_constants(half, precision, wide)
    converted: set[str] = set()  # outputs of nodes in FP16 or BF16
    casts: dict[tuple[str, int], str] = {}
    nodes: list[onnx.NodeProto] = []

    def cast(tensor: str, kind: int, suffix: str) -> str:
        """Return a tensor's copy of another type; its Cast precedes the first node that uses it."""
        if (tensor, kind) not in casts:
            casts[tensor, kind] = name = f"{tensor}.{suffix}"
            nodes.append(_cast(tensor, name, name, kind))
        return casts[tensor, kind]

    for node in half.graph.node:
        is_wide = node.output[0] in wide
        for position, name in enumerate(node.input):
            if is_wide and name in converted:
                node.input[position] = cast(name, TensorProto.FLOAT, "float")
            elif not is_wide and name in constants:
                node.input[position] = constants[name]
            elif not is_wide and name in float32 and name not in converted:
                node.input[position] = cast(name, spec.onnx, "half")
        nodes.append(node)
        if is_wide:
            continue
        for position, name in enumerate(node.output):
            if name not in float32:
                continue
            converted.add(name)
            if name in results:
                node.output[position] = casts[name, spec.onnx] = f"{name}.half"
                converted.remove(name)
                nodes.append(_cast(f"{name}.half", name, f"{name}.float", TensorProto.FLOAT))
    replace_nodes(half.graph, nodes)
    return checked(half)


def _converted_constants(
    model: onnx.ModelProto, precision: HalfName, wide: Collection[str]
) -> dict[str, str]:
    """Convert the constants of the nodes whose first output is not in `wide`.

    Returns:
        Float32 constants and their converted form: the same one, or a copy if a node that stays in
        float32 has it too.
    """
    index = GraphIndex(model)
    dtype = helper.tensor_dtype_to_np_dtype(PRECISIONS[precision].onnx)
    kept = {name for node in model.graph.node if node.output[0] in wide for name in node.input}
    used = {name for node in model.graph.node if node.output[0] not in wide for name in node.input}
    names: dict[str, str] = {}
    for name, tensor in list(index.initializers.items()):
        if tensor.data_type != TensorProto.FLOAT or name not in used:
            continue
        values = index.constant(name)
        assert values is not None
        if precision == "fp16":
            _require_fp16(name, values)
        if name in kept:
            names[name] = f"{name}.half"
            index.add_constant(f"{name}.half", values.astype(dtype))
        else:
            names[name] = name
            index.set_constant(name, values.astype(dtype))
    return names


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """Return the names of all float32 inputs and results."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    entries = (*inferred.input, *inferred.output, *inferred.value_info)
    return {e.name for e in entries if e.type.tensor_type.elem_type == TensorProto.FLOAT}


def _require_fp16(name: str, values: np.ndarray) -> None:
    """Raise ArtifactError if values of a tensor are outside FP16's range."""
    largest = np.abs(values).max(initial=0)
    if largest > LARGEST:
        raise ArtifactError(
            f"{name} reaches {largest:.3g}, but the largest FP16 value is {LARGEST:.0f}",
            fix="use BF16, which has the range of FP32 (--bf16), or keep it in FP32 (--fp32)",
        )


def _cast(source: str, result: str, name: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=name, to=to)
