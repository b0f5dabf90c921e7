from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtresnet.quantization import autofix
from rtresnet.quantization.autofix import Repair, bitwise_equal, fix
from rtresnet.quantization.lint import lint
from rtresnet.quantization.lint_rules import Finding
from tests.onnx_outputs import run_model

pytest.importorskip("onnxruntime")

Exported = Callable[..., onnx.ModelProto]
Images = Callable[..., np.ndarray]


def outputs(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    return run_model(model, {"images": batch}, ["logits"], optimize=False)[0]


@pytest.fixture
def model(quantized: Exported) -> onnx.ModelProto:
    """A good file, to damage."""
    copy = onnx.ModelProto()
    copy.CopyFrom(quantized("resnet8", 32))
    del copy.graph.value_info[:]
    return copy


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def array(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def store(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    for tensor in list(model.graph.initializer):
        if tensor.name == name:
            model.graph.initializer.remove(tensor)
    model.graph.initializer.append(numpy_helper.from_array(value, name))


def activations(model: onnx.ModelProto) -> list[str]:
    return [n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]


def uint8_activations(model: onnx.ModelProto) -> None:
    for name in activations(model):
        store(model, f"{name}.zero_point", np.array(128, np.uint8))


def uint8_weights(model: onnx.ModelProto) -> None:
    shifted = (array(model, "fc.weight").astype(np.int16) + 128).astype(np.uint8)
    store(model, "fc.weight", shifted)
    store(model, "fc.weight.zero_point", np.full(10, 128, np.uint8))


def vector_scales(model: onnx.ModelProto) -> None:
    for name in activations(model):
        store(model, f"{name}.scale", array(model, f"{name}.scale").reshape(1))
        store(model, f"{name}.zero_point", np.zeros(1, np.int8))


def weight_zero_points_left_out(model: onnx.ModelProto) -> None:
    for name in ("conv1.weight.dq", "fc.weight.dq"):
        node(model, name).input.pop()


def int32_biases(model: onnx.ModelProto) -> None:
    rng = np.random.default_rng(0)
    for name in ("conv1", "fc"):
        count = len(array(model, f"{name}.bias"))
        store(model, f"{name}.b", rng.integers(-(2**28), 2**28, count).astype(np.int32))
        store(model, f"{name}.bs", rng.uniform(1e-9, 1e-8, count).astype(np.float32))
        inputs = [f"{name}.b", f"{name}.bs"]
        dequantize = helper.make_node(
            "DequantizeLinear", inputs, [f"{name}.bdq"], f"{name}.bdq", axis=0
        )
        model.graph.node.insert(0, dequantize)
        node(model, name).input[2] = f"{name}.bdq"


def unread(model: onnx.ModelProto) -> None:
    inputs = ["relu.scale", "relu.zero_point"]
    model.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", ["relu", *inputs], ["a"], "a"),
            helper.make_node("QuantizeLinear", ["relu", *inputs], ["b"], "b"),
            helper.make_node("DequantizeLinear", ["b", *inputs], ["c"], "c"),
            helper.make_node("DequantizeLinear", ["relu.q", *inputs], ["d"], "d"),
        ]
    )


MENDED = [
    (uint8_activations, "zero-point"), (uint8_weights, "zero-point"),
    (vector_scales, "scale-shape"), (weight_zero_points_left_out, "no-zero-point"),
    (int32_biases, "quantized-bias"), (unread, "dangling"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "rule"), MENDED, ids=lambda case: getattr(
    case, "__name__", ""))  # fmt: skip
def test_what_is_repaired_passes_and_gives_the_same_bits(
    model: onnx.ModelProto, images: Images, damage: Callable[[onnx.ModelProto], None], rule: str
) -> None:
    damage(model)
    assert lint(model)
    before = model.SerializeToString(deterministic=True)
    fixed, repaired, left = fix(model)
    assert left == [] == lint(fixed)
    assert {entry.rule for entry in repaired} == {rule}
    batch = images(5, 32, 3)
    assert outputs(fixed, batch).tobytes() == outputs(model, batch).tobytes()
    onnx.checker.check_model(fixed, full_check=True)
    assert model.SerializeToString(deterministic=True) == before


def test_all_of_it_at_once_leaves_nothing_and_no_unread_constant(
    model: onnx.ModelProto, images: Images
) -> None:
    for damage in (int32_biases, uint8_activations, unread):
        damage(model)
    fixed, repaired, left = fix(model)
    assert not left
    assert {entry.rule for entry in repaired} == {
        "zero-point", "quantized-bias", "dangling",
    }  # fmt: skip
    batch = images(5, 32, 3)
    assert outputs(fixed, batch).tobytes() == outputs(model, batch).tobytes()
    read = {name for entry in fixed.graph.node for name in entry.input}
    assert {tensor.name for tensor in fixed.graph.initializer} <= read


def test_a_constant_shared_by_a_pair_and_by_others_is_left_to_the_others(
    model: onnx.ModelProto, images: Images
) -> None:
    """One uint8 zero point for all pairs, as some exporters write it."""
    store(model, "z", np.array(128, np.uint8))
    for name in activations(model):
        for half in ("q", "dq"):
            node(model, f"{name}.{half}").input[2] = "z"
    fixed, _, left = fix(model)
    assert not left
    batch = images(5, 32, 3)
    assert outputs(fixed, batch).tobytes() == outputs(model, batch).tobytes()


def uint8_zero(model: onnx.ModelProto) -> None:
    store(model, "relu.zero_point", np.array(0, np.uint8))


def zero_point_left_out(model: onnx.ModelProto) -> None:
    for half in ("q", "dq"):
        node(model, f"relu.{half}").input.pop()


def skewed(model: onnx.ModelProto) -> None:
    store(model, "relu.zero_point", np.array(131, np.uint8))


def rounded_logits(model: onnx.ModelProto) -> None:
    node(model, "fc").output[0] = "out"
    inputs = ["relu.scale", "relu.zero_point"]
    model.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", ["out", *inputs], ["a"], "a"),
            helper.make_node("DequantizeLinear", ["a", *inputs], ["logits"], "b"),
        ]
    )


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (uint8_zero, "unsigned"), (zero_point_left_out, "no-zero-point"), (skewed, "zero-point"),
        (rounded_logits, "quantized-logits"),
    ],
)  # fmt: skip
def test_what_would_change_the_numbers_is_left_and_said(
    model: onnx.ModelProto, damage: Callable[[onnx.ModelProto], None], rule: str
) -> None:
    damage(model)
    fixed, repaired, left = fix(model)
    assert [entry.rule for entry in left] == [rule] and not repaired
    assert fixed.SerializeToString(True) == model.SerializeToString(True)


def test_a_repair_that_changes_a_bit_is_not_done(
    model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(candidate: onnx.ModelProto) -> list[Repair]:
        store(candidate, "fc.bias", array(candidate, "fc.bias") + np.float32(1e-3))
        return [Repair(rule="quantized-bias", node="fc", change="rounded")]

    monkeypatch.setattr(autofix, "STEPS", (careless, *autofix.STEPS))
    unread(model)
    fixed, repaired, left = fix(model)
    assert {entry.rule for entry in repaired} == {"dangling"} and not left
    np.testing.assert_array_equal(array(fixed, "fc.bias"), array(model, "fc.bias"))


def test_a_file_that_cannot_be_run_is_not_repaired(model: onnx.ModelProto) -> None:
    vector_scales(model)
    node(model, "avgpool").op_type = "GlobalAveragePoll"
    fixed, repaired, left = fix(model)
    assert fixed is model and not repaired
    assert all(isinstance(entry, Finding) for entry in left) and left


def test_two_zeros_of_different_sign_are_not_the_same_bits() -> None:
    def constant(value: float) -> onnx.ModelProto:
        graph = helper.make_graph(
            [helper.make_node("Mul", ["x", "c"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
            [numpy_helper.from_array(np.array([value], np.float32), "c")],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)

    assert bitwise_equal(constant(0.0), constant(0.0))
    assert not bitwise_equal(constant(0.0), constant(-0.0))
