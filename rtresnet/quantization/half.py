"""Convert the float tensors of a model to FP16 or BF16, between two Casts.

A Cast follows the input, and another precedes the output.

Batch norm is already folded in FP32 (`exporter/fold.py`), so this rounds once. Input and output
stay float32: the two Casts cost no layer in the engine, and every artifact keeps one signature.

BF16 has the range of float32 and 8 significant bits. Its convolutions need opset 22.

In a Q/DQ file the tensors between the quantized kernels become FP16. Scales stay float32, and each
Q/DQ pair is placed between a Cast to float32 and one back: TensorRT rejects FP16 data with FP32
scales, and rounding a scale to FP16 would change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


def to_half(model: onnx.ModelProto, precision: HalfName = "fp16") -> onnx.ModelProto:
    """Return the same graph in FP16, with float32 input and output.

    Args:
        model: Folded FP32 model, for FP16 with Q/DQ pairs or without. Not changed.
        precision: Type of the new tensors.

    Raises:
        ArtifactError: A weight is outside FP16's range; the message names it.
    """
    spec = PRECISIONS[precision]
    half, kind = with_opset(copied(model), spec.opset), spec.onnx
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    graph, index = half.graph, GraphIndex(half)
    scales = {node.input[1] for node in index.quantizers()}
    for name, tensor in index.initializers.items():
        if tensor.data_type != TensorProto.FLOAT or name in scales:
            continue
        values = index.constant(name)
        assert values is not None
        if precision == "fp16":
            require_fp16(
                name, values,
                fix="use BF16, which has the range of FP32 (--bf16), or keep it in FP32 (--fp32)",
            )  # fmt: skip
        index.set_constant(name, values.astype(dtype))
    source, result = graph.input[0].name, graph.output[0].name
    renamed = {name: f"{name}_half" for name in (source, result)}
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    first = _cast(source, renamed[source], renamed[source], kind)
    last = _cast(renamed[result], result, f"{result}_float", TensorProto.FLOAT)
    replace_nodes(graph, [first, *_with_casts(graph.node), last])
    return checked(half)


def require_fp16(name: str, values: np.ndarray, *, fix: str) -> None:
    """Raise ArtifactError with `fix` if values of a tensor are outside FP16's range."""
    largest = np.abs(values).max(initial=0)
    if largest > LARGEST:
        raise ArtifactError(
            f"{name} reaches {largest:.3g}, but the largest FP16 value is {LARGEST:.0f}", fix=fix
        )


def _cast(source: str, result: str, name: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=name, to=to)


def _with_casts(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield the nodes with Casts before each QuantizeLinear and after each DequantizeLinear."""
    for node in nodes:
        if node.op_type == QUANTIZE:
            wide = f"{node.output[0]}.float"
            yield _cast(node.input[0], wide, wide, TensorProto.FLOAT)
            node.input[0] = wide
        yield node
        if node.op_type == DEQUANTIZE:
            narrow = node.output[0]
            node.output[0] = f"{narrow}.float"
            yield _cast(node.output[0], narrow, f"{narrow}.half", TensorProto.FLOAT16)
