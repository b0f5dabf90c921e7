"""FP16 for a part of a graph; the other nodes, inputs and outputs stay float32.

A detector's boxes and coordinates need float32: FP16 has a step of half a pixel above 512.

Before: a model in float32, with Q/DQ pairs or without. After: the same graph, in which the nodes
outside `float_nodes` compute in FP16, with Casts on the tensors between both parts. Scales and the
data of Q/DQ pairs stay float32, as in `half.py`.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rtresnet.quantization.half import require_fp16

PAIR = ("QuantizeLinear", "DequantizeLinear")


def to_half_except(model: onnx.ModelProto, float_nodes: Collection[str]) -> onnx.ModelProto:
    """Convert all nodes but some to FP16.

    Args:
        model: A model in float32. Not changed.
        float_nodes: Names of nodes that stay in float32.

    Returns:
        The converted model, checked.

    Raises:
        ArtifactError: A weight is outside FP16's range; the message names it.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types = _float_tensors(model)
    halves: dict[str, str] = {}  # a float32 tensor and its FP16 copy
    floats: dict[str, str] = {}  # output of an FP16 node, and its float32 copy
    nodes: list[onnx.NodeProto] = []

    def cast(tensor: str, to: int, suffix: str) -> str:
        name = f"{tensor}.{suffix}"
        nodes.append(helper.make_node("Cast", [tensor], [name], name=name, to=to))
        return name

    made_half: set[str] = set()
    outputs = {entry.name for entry in graph.output}
    for node in graph.node:
        is_float = node.name in float_nodes or node.op_type in PAIR
        for index, name in enumerate(node.input):
            if name in constants:
                if not is_float and constants[name].data_type == TensorProto.FLOAT:
                    if name not in halves:
                        halves[name] = _half_constant(graph, constants[name])
                    node.input[index] = halves[name]
            elif is_float and name in made_half:
                if name not in floats:
                    floats[name] = cast(name, TensorProto.FLOAT, "float")
                node.input[index] = floats[name]
            elif not is_float and name in types and name not in made_half:
                if name not in halves:
                    halves[name] = cast(name, TensorProto.FLOAT16, "half")
                node.input[index] = halves[name]
        nodes.append(node)
        if is_float:
            continue
        for index, name in enumerate(node.output):
            if name in types:
                made_half.add(name)
                if name in outputs:
                    node.output[index] = f"{name}.half"
                    nodes.append(
                        helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}.float",
                                         to=TensorProto.FLOAT)
                    )  # fmt: skip
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    used = {name for node in copies for name in node.input}
    initializers = [
        onnx.TensorProto.FromString(tensor.SerializeToString())
        for tensor in graph.initializer
        if tensor.name in used
    ]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(copies)
    graph.initializer.extend(initializers)
    onnx.checker.check_model(half, full_check=True)
    return onnx.shape_inference.infer_shapes(half, strict_mode=True, data_prop=True)


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """Return the names of all float32 tensors: inputs, constants and results."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    entries = (*inferred.input, *inferred.output, *inferred.value_info)
    return {e.name for e in entries if e.type.tensor_type.elem_type == TensorProto.FLOAT}


def _half_constant(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> str:
    values = numpy_helper.to_array(tensor)
    require_fp16(tensor.name, values, fix="keep this net in FP32: --fp32")
    name = f"{tensor.name}.half"
    graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), name))
    return name
