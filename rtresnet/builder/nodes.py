"""The nodes of a parsed network: the operation of each, and its stage and block of a ResNet.

Stages are stem, layer1 to layer4, head (`onnxlib.graph.assign_blocks`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rtresnet.onnxlib.graph import assign_blocks

ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
CONVOLUTION, MATMUL, ADD, WEIGHTS = "conv", "matmul", "add", "weights"
WORDS = {
    "CONVOLUTION": CONVOLUTION,
    "MATRIX_MULTIPLY": MATMUL,
    "ACTIVATION": "relu",
    "POOLING": "pool",
    "REDUCE": "mean",
    "SHUFFLE": "reshape",
}


@dataclass(frozen=True, kw_only=True)
class NetworkNode:
    """One ONNX node.

    Attributes:
        operation: conv, matmul, add (a residual one), relu, quantize, ...; "weights" if the node
            depends on constants only.
        detail: Kernel size of a convolution, as in 3x3.
        stage: stem, layer1, ..., head.
        block: As in layer1.0; the stage's name in stem and head.
        dtype: Type of its output, as TensorRT names it.
        height: Height of its output in pixels; 0 if the output is not an image.
        source: The node that computes its first input.
        multiply_adds: Multiply-adds of a convolution or a matrix product, for one image.
    """

    name: str
    operation: str
    detail: str = ""
    stage: str = ""
    block: str = ""
    dtype: str
    height: int = 0
    source: str = ""
    multiply_adds: int = 0


def read(trt: Any, network: Any) -> dict[str, NetworkNode]:
    """Return every ONNX node of a parsed network by its name, in the order of the graph."""
    nodes: dict[str, NetworkNode] = {}
    constant: set[str] = set()
    makers: dict[str, str] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        is_constant = all(tensor is None or tensor.name in constant for tensor in inputs)
        out = layer.get_output(0)
        if out is None:
            continue
        if is_constant:
            constant.add(out.name)
        for name in ORIGIN.findall(layer.metadata or "") or [layer.name]:
            source = makers.get(inputs[0].name, "") if inputs and inputs[0] else ""
            makers[out.name] = name
            # The bias of a Gemm is a second layer of the same node; the first has the operation.
            if name not in nodes:
                operation, detail = _operation(trt, layer, inputs, is_constant, constant)
                shape = tuple(out.shape)
                nodes[name] = NetworkNode(
                    name=name, operation=operation, detail=detail, dtype=out.dtype.name,
                    height=shape[2] if len(shape) == 4 else 0, source=source,
                    multiply_adds=_multiply_adds(trt, layer, operation, inputs, shape),
                )  # fmt: skip
    operations = [node for node in nodes.values() if node.operation != "constant"]
    blocks = assign_blocks([(node.name, node.operation, node.height) for node in operations])
    return {
        node.name: replace(node, stage=stage, block=block)
        for node, (stage, block) in zip(operations, blocks, strict=True)
    }


def _operation(
    trt: Any, layer: Any, inputs: Sequence[Any], is_constant: bool, constant: set[str]
) -> tuple[str, str]:
    """Return the operation and the detail of a layer."""
    kind = layer.type.name
    if is_constant:
        return "constant" if kind == "CONSTANT" else WEIGHTS, ""
    if kind == "CONVOLUTION":
        layer.__class__ = trt.IConvolutionLayer  # the API returns the base class
        return CONVOLUTION, "x".join(str(side) for side in tuple(layer.kernel_size_nd))
    if kind == "ELEMENTWISE":
        layer.__class__ = trt.IElementWiseLayer
        if layer.op != trt.ElementWiseOperation.SUM:
            return layer.op.name.lower(), ""
        residual = not any(tensor.name in constant for tensor in inputs)
        return ADD if residual and len(tuple(layer.get_output(0).shape)) == 4 else "bias", ""
    return WORDS.get(kind, kind.lower()), ""


def _multiply_adds(
    trt: Any, layer: Any, operation: str, inputs: Sequence[Any], shape: tuple[int, ...]
) -> int:
    """Return the multiply-adds for one image; `shape` is the output's. The first side is N."""
    if operation == CONVOLUTION:
        each = math.prod(tuple(layer.kernel_size_nd)) * inputs[0].shape[1] // layer.num_groups
    elif operation == MATMUL:
        layer.__class__ = trt.IMatrixMultiplyLayer
        transposed = layer.op0 == trt.MatrixOperation.TRANSPOSE
        each = tuple(inputs[0].shape)[-2 if transposed else -1]
    else:
        return 0
    return max(0, int(each) * math.prod(shape[1:]))
