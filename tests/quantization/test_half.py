from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtresnet.core.errors import ArtifactError
from rtresnet.quantization.half import to_half
from tests.onnx_outputs import run_logits

onnxruntime = pytest.importorskip("onnxruntime")

Exported = Callable[..., onnx.ModelProto]
Images = Callable[..., np.ndarray]


@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("resnet18", 64)])
def test_everything_between_the_two_casts_is_half(name: str, size: int, exported: Exported) -> None:
    model = exported(name, size)
    half = to_half(model)
    types = {v.name: v.type.tensor_type.elem_type for v in half.graph.value_info}
    assert set(types.values()) == {TensorProto.FLOAT16}
    assert {t.data_type for t in half.graph.initializer} <= {TensorProto.FLOAT16, TensorProto.INT64}
    convolutions = [node for node in half.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == sum(node.op_type == "Conv" for node in model.graph.node)
    constants = {t.name: t.data_type for t in half.graph.initializer}
    for node in convolutions:
        assert {types[node.output[0]], types[node.input[0]]} == {TensorProto.FLOAT16}
        assert {constants[name] for name in node.input[1:]} == {TensorProto.FLOAT16}
    operations = [node.op_type for node in half.graph.node]
    assert operations == ["Cast", *(node.op_type for node in model.graph.node), "Cast"]


def test_input_and_output_stay_float32(exported: Exported, images: Images) -> None:
    model = exported("resnet8", 32)
    half = to_half(model)
    assert list(half.graph.input) == list(model.graph.input)
    assert list(half.graph.output) == list(model.graph.output)
    logits = run_logits(half, images(3, 32))
    assert logits.dtype == np.float32 and logits.shape == (3, 10)


@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("resnet18", 64), ("plain8", 32)])
def test_the_logits_are_near_those_of_fp32_and_rounded(
    name: str, size: int, exported: Exported, images: Images
) -> None:
    model, batch = exported(name, size), images(8, size)
    reference = run_logits(model, batch)
    error = np.linalg.norm(run_logits(to_half(model), batch) - reference) / np.linalg.norm(
        reference
    )
    assert 1e-5 < error < 5e-3


def test_weights_are_rounded_to_the_nearest_half(exported: Exported) -> None:
    model = exported("resnet8", 32)
    originals = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for tensor in to_half(model).graph.initializer:
        expected = originals[tensor.name]
        if expected.dtype == np.float32:
            expected = expected.astype(np.float16)
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected)


def test_the_source_is_not_changed(exported: Exported) -> None:
    model = exported("resnet8", 32)
    before = model.SerializeToString(deterministic=True)
    to_half(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("value", [7e4, -7e4, np.inf])
def test_a_weight_beyond_the_range_is_named(exported: Exported, value: float) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported("resnet8", 32))
    tensor = next(t for t in model.graph.initializer if t.name == "layer2.0.conv1.weight")
    weight = numpy_helper.to_array(tensor).copy()
    weight[1, 2, 0, 0] = value
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    with pytest.raises(ArtifactError, match=r"layer2\.0\.conv1\.weight.*65504.*--fp32"):
        to_half(model)


def test_the_largest_half_is_within_the_range(exported: Exported) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported("resnet8", 32))
    tensor = next(t for t in model.graph.initializer if t.name == "fc.bias")
    tensor.CopyFrom(numpy_helper.from_array(np.full(10, 65504, np.float32), tensor.name))
    stored = {t.name: numpy_helper.to_array(t) for t in to_half(model).graph.initializer}
    assert np.isfinite(stored["fc.bias"]).all()


def test_to_half_constant_of_several_nodes_is_converted_once() -> None:
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
    half = to_half(model, float_nodes={"wide"})
    types = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert sorted(types.values()) == [TensorProto.FLOAT, TensorProto.FLOAT16]
    onnx.checker.check_model(half, full_check=True)
    session = onnxruntime.InferenceSession(half.SerializeToString())
    x = np.full(4, 0.5, np.float32)
    assert np.array_equal(session.run(None, {"x": x})[0], x + 3 * np.arange(4))
