"""FP16: every float constant and every tensor between a Cast at the input and one at the output.

Batch norm is already folded in FP32 (`export/fold.py`), so this rounds once. Input and output
stay float32: the two Casts cost no layer in the engine, and every artifact keeps one signature.

In an INT8 file it is the rest that becomes FP16, the tensors between the kernels. Scales stay
float32, and so each Q/DQ pair stands between a Cast to float32 and one back: TensorRT refuses FP16
data with FP32 scales, and a scale rounded to FP16 would be another scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rtresnet.core.errors import ArtifactError

PAIR = ("QuantizeLinear", "DequantizeLinear")
LARGEST = float(np.finfo(np.float16).max)  # 65504


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in FP16, with float32 input and output.

    Args:
        model: Folded FP32 model, with Q/DQ pairs or without. Not changed.

    Raises:
        ArtifactError: A weight is outside FP16's range; the message names it.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    scales = {n.input[1] for n in graph.node if n.op_type in PAIR}
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name in scales:
            continue
        values = numpy_helper.to_array(tensor)
        if np.abs(values).max(initial=0) > LARGEST:
            raise ArtifactError(
                f"{tensor.name} reaches {np.abs(values).max():.3g}, beyond FP16's {LARGEST:.0f}",
                fix="keep this net in FP32: --fp32",
            )
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
    source, result = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name in (source, result):
                    names[index] = f"{name}_half"
    into = helper.make_node(
        "Cast", [source], [f"{source}_half"], name=f"{source}_half", to=TensorProto.FLOAT16
    )
    back = helper.make_node(
        "Cast", [f"{result}_half"], [result], name=f"{result}_float", to=TensorProto.FLOAT
    )
    nodes = [into, *_with_float_pairs(graph.node), back]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    onnx.checker.check_model(half, full_check=True)
    return onnx.shape_inference.infer_shapes(half, strict_mode=True, data_prop=True)


def _with_float_pairs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes with Casts around QuantizeLinear and DequantizeLinear."""
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            wide = f"{node.output[0]}.float"
            yield helper.make_node("Cast", [node.input[0]], [wide], name=wide, to=TensorProto.FLOAT)
            node.input[0] = wide
        yield node
        if node.op_type == "DequantizeLinear":
            narrow = node.output[0]
            node.output[0] = f"{narrow}.float"
            yield helper.make_node(
                "Cast", [node.output[0]], [narrow], name=f"{narrow}.half", to=TensorProto.FLOAT16
            )
