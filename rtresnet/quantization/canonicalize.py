"""Convert the residual net of any exporter to the folded form that quantization needs.

Before: an FP32 ONNX file of torchvision, timm, the ONNX zoo, or rtresnet. After: the same function
with

 1. constants as initializers that are not inputs and have one reader each; no Identity, no Dropout;
 2. every BatchNormalization behind a convolution folded into it, in float64, rounded once;
 3. the FC as a Gemm with weight [classes, features]: a MatMul and the Add behind it become one;
 4. a name for every node; its output's name if it had none.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from rtresnet.core.errors import ArtifactError
from rtresnet.onnxlib import metadata
from rtresnet.onnxlib.graph import GraphIndex, attribute, checked, copied, label, replace_nodes

OLDEST = 13  # older opsets have no per-channel scales in QuantizeLinear


def canonicalize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model in the folded form.

    Args:
        model: Not changed.

    Raises:
        ArtifactError: The opset is older than 13, or a batch norm cannot be folded.
    """
    opset = GraphIndex(model).opset
    if opset < OLDEST:
        raise ArtifactError(
            f"{model.graph.name}: opset {opset}, but INT8 needs {OLDEST} or later",
            fix="export it again, or convert it with onnx.version_converter",
        )
    prepared = copied(model)
    graph = prepared.graph
    _constants_to_initializers(graph)
    _remove(graph, "Identity", "Dropout")
    _separate_constants(graph)
    statistics = _fold_batch_norms(prepared)
    _normalize_fully_connected(prepared)
    for node in graph.node:
        node.name = node.name or node.output[0]
    if statistics and metadata.NORM_STATISTICS.key not in metadata.properties_of(prepared):
        metadata.NORM_STATISTICS.set(prepared, statistics)
    return checked(prepared)


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    nodes = []
    for node in graph.node:
        values = [entry.t for entry in node.attribute if entry.name == "value"]
        if node.op_type == "Constant" and values:
            tensor = graph.initializer.add()
            tensor.CopyFrom(values[0])
            tensor.name = node.output[0]
        else:
            nodes.append(node)
    replace_nodes(graph, nodes)
    constants = {tensor.name for tensor in graph.initializer}
    for entry in [entry for entry in graph.input if entry.name in constants]:
        graph.input.remove(entry)


def _remove(graph: onnx.GraphProto, *operators: str) -> None:
    """Remove operators that pass their input on; an output of the graph keeps its name."""
    outputs = {entry.name for entry in graph.output}
    renamed: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.op_type in operators and node.output[0] not in outputs:
            renamed[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    replace_nodes(graph, nodes)


def _separate_constants(graph: onnx.GraphProto) -> None:
    """Copy constants that several nodes share; exporters store equal weights once.

    Weights are folded, scaled and quantized in place, for one node each.
    """
    constants, used = {tensor.name: tensor for tensor in graph.initializer}, set[str]()
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name not in constants:
                continue
            if name in used:
                copy = graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = node.input[index] = f"{name}.of.{node.output[0]}.{index}"
            used.add(name)


def _fold_batch_norms(model: onnx.ModelProto) -> metadata.NormStatistics:
    """Fold every batch norm; return the statistics of the convolutions' outputs."""
    index = GraphIndex(model)
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    nodes = []
    for norm in index.nodes:
        if norm.op_type != "BatchNormalization":
            nodes.append(norm)
            continue
        if attribute(norm, "training_mode", 0):
            raise ArtifactError(
                f"{label(norm)}: a batch norm in training mode, whose results depend on the other "
                "images of a batch",
                fix="export the net in evaluation mode: net.eval()",
            )
        conv = index.producers.get(norm.input[0])
        if conv is None or conv.op_type != "Conv" or len(index.readers[norm.input[0]]) != 1:
            raise ArtifactError(
                f"{label(norm)}: cannot fold this batch norm, because its input is not the output "
                "of one convolution only"
            )
        mean, deviation = _fold(index, conv, norm)
        statistics[conv.name] = (mean.astype(np.float32), deviation.astype(np.float32))
    replace_nodes(model.graph, nodes)
    return statistics


def _fold(
    index: GraphIndex, conv: onnx.NodeProto, norm: onnx.NodeProto
) -> tuple[np.ndarray, np.ndarray]:
    """Fold one batch norm; return mean and deviation of its output, float64 [C]."""
    gamma, beta, mean, variance = (_float64(index, name) for name in norm.input[1:5])
    epsilon = next((entry.f for entry in norm.attribute if entry.name == "epsilon"), 1e-5)
    factor = gamma / np.sqrt(variance + epsilon)
    weight = _float64(index, conv.input[1]) * factor[:, None, None, None]
    index.set_constant(conv.input[1], weight.astype(np.float32))
    bias = np.zeros(len(mean))
    if len(conv.input) > 2 and conv.input[2]:
        bias = _float64(index, conv.input[2])
    bias = beta + (bias - mean) * factor
    name = index.add_constant(f"{label(conv)}.folded_bias", bias.astype(np.float32))
    conv.input[:] = [*conv.input[:2], name]
    conv.output[0] = norm.output[0]
    conv.name = conv.name or norm.output[0]
    return beta, np.abs(gamma)


def _float64(index: GraphIndex, name: str) -> np.ndarray:
    value = index.constant(name)
    if value is None or name not in index.initializers:
        raise ArtifactError(f"{name}: not a constant, so a batch norm cannot be folded")
    return value.astype(np.float64)


def _normalize_fully_connected(model: onnx.ModelProto) -> None:
    index = GraphIndex(model)
    merged: list[str] = []
    for node in index.nodes:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in index.initializers:
            continue
        weight = index.constant(node.input[1])
        assert weight is not None
        if node.op_type == "MatMul" and weight.ndim != 2:
            continue
        if node.op_type == "MatMul":
            node.op_type = "Gemm"
            add = index.only_reader(node.output[0])
            bias = [name for name in add.input if name in index.initializers] if add else []
            if add is not None and bias and add.op_type == "Add":
                merged.append(add.output[0])
                node.output[0] = add.output[0]
                node.input.append(bias[0])
        if not attribute(node, "transB", 0):
            index.set_constant(node.input[1], np.ascontiguousarray(weight.T))
            others = [entry for entry in node.attribute if entry.name != "transB"]
            del node.attribute[:]
            node.attribute.extend([*others, helper.make_attribute("transB", 1)])
    nodes = [n for n in index.nodes if n.op_type != "Add" or n.output[0] not in merged]
    replace_nodes(model.graph, nodes)
