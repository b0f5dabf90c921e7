"""FP16 for a part of a graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from rtresnet.quantization.mixed import to_half_except


def test_to_half_except_constant_of_several_nodes_is_converted_once() -> None:
    """Two nodes in FP16 and one in float32 use the same constant."""
    nodes = [
        helper.make_node("Add", ["x", "c"], ["a"], name="a"),
        helper.make_node("Add", ["a", "c"], ["b"], name="b"),
        helper.make_node("Add", ["b", "c"], ["y"], name="wide"),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(np.arange(4, dtype=np.float32), "c")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    half = to_half_except(model, {"wide"})
    types = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert sorted(types.values()) == [TensorProto.FLOAT, TensorProto.FLOAT16]
    onnx.checker.check_model(half, full_check=True)
    session = onnxruntime.InferenceSession(half.SerializeToString())
    x = np.full(4, 0.5, np.float32)
    assert np.array_equal(session.run(None, {"x": x})[0], x + 3 * np.arange(4))
