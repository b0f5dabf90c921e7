"""Anybody's residual net as the folded graph that the rest of this room takes.

Before: an FP32 ONNX file of torchvision, timm, the ONNX zoo, or ours. After: the same function with

 1. constants as initializers, none of them listed as an input, each with one reader, no Identity
    and no Dropout;
 2. every BatchNormalization behind a convolution folded into it, in float64, rounded once;
 3. the FC as Gemm with its weight [classes, features]: MatMul, and an Add behind it, become one;
 4. a name for every node, its output's where it had none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rtresnet.core.errors import ArtifactError
from rtresnet.onnxlib import metadata

OLDEST = 13  # before it, QuantizeLinear has no scale a channel


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in that form. The one given is not changed.

    Raises:
        ArtifactError: Older than opset 13, or a batch norm that no convolution precedes.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST:
        raise ArtifactError(
            f"{model.graph.name}: opset {opset}; INT8 needs {OLDEST} or later",
            fix="export it again, or convert it with onnx.version_converter",
        )
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    graph = _Graph(prepared.graph)
    graph.constants_out_of_nodes()
    graph.without("Identity", "Dropout")
    graph.constants_of_their_own()
    graph.fold_batch_norms()
    graph.fully_connected()
    for node in prepared.graph.node:
        node.name = node.name or node.output[0]
    if graph.known and metadata.NORM_STATISTICS.key not in metadata.properties_of(prepared):
        metadata.NORM_STATISTICS.set(prepared, graph.known)
    del prepared.graph.value_info[:]
    onnx.checker.check_model(prepared, full_check=True)
    return onnx.shape_inference.infer_shapes(prepared, strict_mode=True, data_prop=True)


class _Graph:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def constants(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.graph.initializer}

    def keep(self, nodes: list[onnx.NodeProto]) -> None:
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(kept)

    def constants_out_of_nodes(self) -> None:
        nodes = []
        for node in self.graph.node:
            values = [entry.t for entry in node.attribute if entry.name == "value"]
            if node.op_type == "Constant" and values:
                tensor = self.graph.initializer.add()
                tensor.CopyFrom(values[0])
                tensor.name = node.output[0]
            else:
                nodes.append(node)
        self.keep(nodes)
        constants = self.constants()
        inputs = [entry for entry in self.graph.input if entry.name not in constants]
        kept = [onnx.ValueInfoProto.FromString(entry.SerializeToString()) for entry in inputs]
        del self.graph.input[:]
        self.graph.input.extend(kept)

    def constants_of_their_own(self) -> None:
        """Copies what several nodes share, as exporters store equal weights once.

        Weights are folded, scaled and quantized in place, for one node each.
        """
        constants, taken = self.constants(), set[str]()
        for node in self.graph.node:
            for index, name in enumerate(node.input):
                if name not in constants:
                    continue
                if name in taken:
                    own = self.graph.initializer.add()
                    own.CopyFrom(constants[name])
                    own.name = node.input[index] = f"{name}.of.{node.output[0]}.{index}"
                taken.add(name)

    def without(self, *operations: str) -> None:
        """Leaves out what passes its input on; a graph's output keeps its name."""
        outputs = {entry.name for entry in self.graph.output}
        renamed: dict[str, str] = {}
        nodes = []
        for node in self.graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = renamed.get(name, name)
            if node.op_type in operations and node.output[0] not in outputs:
                renamed[node.output[0]] = node.input[0]
            else:
                nodes.append(node)
        self.keep(nodes)

    def fold_batch_norms(self) -> None:
        constants = self.constants()
        producers = {out: node for node in self.graph.node for out in node.output}
        reads: dict[str, int] = {}
        for node in self.graph.node:
            for name in node.input:
                reads[name] = reads.get(name, 0) + 1
        gone = []
        for node in self.graph.node:
            if node.op_type != "BatchNormalization":
                continue
            if any(a.name == "training_mode" and a.i for a in node.attribute):
                raise ArtifactError(
                    f"{node.name or node.output[0]}: a batch norm in training mode, whose answers "
                    "depend on the other images of a batch",
                    fix="export the net in evaluation mode: net.eval()",
                )
            conv = producers.get(node.input[0])
            if conv is None or conv.op_type != "Conv" or reads[node.input[0]] != 1:
                raise ArtifactError(
                    f"{node.name or node.output[0]}: a batch norm without a convolution of its own "
                    "before it cannot be folded"
                )
            self._fold(conv, node, constants)
            gone.append(node.output[0])
        self.keep([node for node in self.graph.node if node.output[0] not in gone or
                   node.op_type != "BatchNormalization"])  # fmt: skip

    def _fold(
        self, conv: onnx.NodeProto, norm: onnx.NodeProto, constants: dict[str, onnx.TensorProto]
    ) -> None:
        gamma, beta, mean, variance = (
            numpy_helper.to_array(constants[name]).astype(np.float64) for name in norm.input[1:5]
        )
        epsilon = next((entry.f for entry in norm.attribute if entry.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        weight = constants[conv.input[1]]
        values = numpy_helper.to_array(weight).astype(np.float64) * factor[:, None, None, None]
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float32), weight.name))
        bias = np.zeros(len(mean))
        if len(conv.input) > 2 and conv.input[2]:
            bias = numpy_helper.to_array(constants[conv.input[2]]).astype(np.float64)
        bias = beta + (bias - mean) * factor
        name = f"{conv.name or conv.output[0]}.folded_bias"
        self.graph.initializer.append(numpy_helper.from_array(bias.astype(np.float32), name))
        del conv.input[2:]
        conv.input.append(name)
        conv.output[0] = norm.output[0]
        conv.name = conv.name or norm.output[0]
        self.known[conv.name] = (beta.astype(np.float32), np.abs(gamma).astype(np.float32))

    def fully_connected(self) -> None:
        constants = self.constants()
        nodes = list(self.graph.node)
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        gone: list[int] = []
        for node in nodes:
            if node.op_type == "MatMul" and node.input[1] in constants:
                if len(constants[node.input[1]].dims) != 2:
                    continue
                node.op_type = "Gemm"
                behind = readers.get(node.output[0], [])
                bias = [n for n in behind[0].input if n in constants] if len(behind) == 1 else []
                if bias and behind[0].op_type == "Add":
                    gone.append(id(behind[0]))
                    node.output[0] = behind[0].output[0]
                    node.input.append(bias[0])
                self._transposed(node, constants)
            elif node.op_type == "Gemm" and node.input[1] in constants:
                attributes: dict[str, Any] = {
                    entry.name: helper.get_attribute_value(entry) for entry in node.attribute
                }
                if not attributes.get("transB"):
                    self._transposed(node, constants)
        self.keep([node for node in nodes if id(node) not in gone])

    def _transposed(self, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
        weight = constants[node.input[1]]
        values = np.ascontiguousarray(numpy_helper.to_array(weight).T)
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        others = [entry for entry in node.attribute if entry.name != "transB"]
        del node.attribute[:]
        node.attribute.extend([*others, helper.make_attribute("transB", 1)])
