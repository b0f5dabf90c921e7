"""Each lint rule, with a valid file broken in one way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtresnet.quantization.half import to_half
from rtresnet.quantization.lint import Finding, lint
from rtresnet.quantization.lint_rules import RULES

quantization = pytest.importorskip("onnxruntime.quantization")

Exported = Callable[..., onnx.ModelProto]


class Editor:
    """A copy of a model, to break."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        del self.graph.value_info[:]

    def node(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.graph.node if node.name == name)

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(next(t for t in self.graph.initializer if t.name == name))

    def store(self, name: str, value: np.ndarray) -> str:
        for tensor in list(self.graph.initializer):
            if tensor.name == name:
                self.graph.initializer.remove(tensor)
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def retype(self, tensor: str, zero: np.ndarray) -> None:
        """Return another zero point, with its type, for the pair on an activation."""
        self.store(f"{tensor}.zero_point", zero)

    def before(self, name: str, *nodes: onnx.NodeProto) -> None:
        index = list(self.graph.node).index(self.node(name))
        for node in reversed(nodes):
            self.graph.node.insert(index, node)

    def remove(self, *names: str) -> None:
        for name in names:
            self.graph.node.remove(self.node(name))

    def pair(self, tensor: str, name: str) -> list[onnx.NodeProto]:
        scale = self.store(f"{name}.scale", np.array(0.1, np.float32))
        zero = self.store(f"{name}.zero_point", np.array(0, np.int8))
        return [
            helper.make_node("QuantizeLinear", [tensor, scale, zero], [f"{name}.q"], f"{name}.q"),
            helper.make_node(
                "DequantizeLinear", [f"{name}.q", scale, zero], [f"{name}.dq"], f"{name}.dq"
            ),
        ]

    def insert_pair(self, reader: str, index: int, name: str = "extra") -> None:
        node = self.node(reader)
        self.before(reader, *self.pair(node.input[index], name))
        node.input[index] = f"{name}.dq"

    def bypass(self, pair: str) -> None:
        """Remove a Q/DQ pair: its readers read its input."""
        for node in self.graph.node:
            node.input[:] = [pair if name == f"{pair}.dq" else name for name in node.input]
        self.remove(f"{pair}.q", f"{pair}.dq")


@pytest.fixture
def good(quantized: Exported) -> Editor:
    return Editor(quantized("resnet8", 32))


Findings = list[tuple[str, str, str]]


def findings_of(model: onnx.ModelProto) -> Findings:
    return [(entry.severity, entry.rule, entry.node) for entry in lint(model)]


@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("resnet18", 64), ("resnet50", 32)])
@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_our_own_files_are_flawless(quantized: Exported, name: str, size: int, rest: str) -> None:
    model = quantized(name, size)
    assert lint(to_half(model) if rest == "fp16" else model) == []


def test_a_float_file_gets_a_note(exported: Exported) -> None:
    assert findings_of(exported("resnet8", 32)) == [("note", "float-file", "resnet8")]


def unsigned(e: Editor) -> None:
    e.retype("relu", np.array(0, np.uint8))


def uint8_128(e: Editor) -> None:
    e.retype("relu", np.array(128, np.uint8))


def int8_5(e: Editor) -> None:
    e.retype("relu", np.array(5, np.int8))


def without_zero_point(e: Editor) -> None:
    for half in ("q", "dq"):
        e.node(f"relu.{half}").input.pop()


def weight_without_zero_point(e: Editor) -> None:
    e.node("fc.weight.dq").input.pop()


def vector_scale(e: Editor) -> None:
    e.store("relu.scale", e.array("relu.scale").reshape(1))
    e.store("relu.zero_point", np.zeros(1, np.int8))


def channel_scales(e: Editor) -> None:
    e.store("relu.scale", np.full(16, 0.1, np.float32))
    e.store("relu.zero_point", np.zeros(16, np.int8))


def scale(value: float) -> Callable[[Editor], None]:
    def change(e: Editor) -> None:
        e.store("relu.scale", np.array(value, np.float32))

    return change


def weight_scale_of_zero(e: Editor) -> None:
    scales = e.array("fc.weight.scale").copy()
    scales[3] = 0
    e.store("fc.weight.scale", scales)


def computed_scale(e: Editor) -> None:
    e.before("images.q", helper.make_node("ReduceMax", ["images"], ["m"], "m", keepdims=0))
    e.node("images.q").input[1] = e.node("images.dq").input[1] = "m"


def uint8_weight(e: Editor) -> None:
    e.store("fc.weight", (e.array("fc.weight").astype(np.int16) + 128).astype(np.uint8))
    e.store("fc.weight.zero_point", np.full(10, 128, np.uint8))


def skewed_weight(e: Editor) -> None:
    e.store("fc.weight.zero_point", np.full(10, 3, np.int8))


def per_tensor_weight(e: Editor) -> None:
    e.store("layer1.0.conv1.weight.scale", np.array(0.01, np.float32))
    e.store("layer1.0.conv1.weight.zero_point", np.array(0, np.int8))


def conv_axis_1(e: Editor) -> None:
    e.node("layer1.0.conv1.weight.dq").attribute[0].i = 1


def gemm_axis_1(e: Editor) -> None:
    e.store("fc.weight.scale", np.full(64, 0.01, np.float32))
    e.store("fc.weight.zero_point", np.zeros(64, np.int8))
    e.node("fc.weight.dq").attribute[0].i = 1


def gemm_not_transposed(e: Editor) -> None:
    e.store("fc.weight", e.array("fc.weight").T.copy())
    e.node("fc.weight.dq").attribute[0].i = 1
    next(a for a in e.node("fc").attribute if a.name == "transB").i = 0


def gemm_not_transposed_axis_0(e: Editor) -> None:
    gemm_not_transposed(e)
    e.store("fc.weight.scale", np.full(64, 0.01, np.float32))
    e.store("fc.weight.zero_point", np.zeros(64, np.int8))
    e.node("fc.weight.dq").attribute[0].i = 0


def int32_bias(e: Editor) -> None:
    rng = np.random.default_rng(0)
    e.store("b", rng.integers(-(2**20), 2**20, 16).astype(np.int32))
    e.store("b.scale", rng.uniform(1e-4, 1e-3, 16).astype(np.float32))
    e.store("b.zero", np.zeros(16, np.int32))
    node = helper.make_node(
        "DequantizeLinear", ["b", "b.scale", "b.zero"], ["b.dq"], "b.dq", axis=0
    )
    e.before("conv1", node)
    e.node("conv1").input[2] = "b.dq"


def both_inputs(e: Editor) -> None:
    e.insert_pair("layer1.0.add", 0)


def float_shortcut(e: Editor) -> None:
    e.node("layer1.0.add").input[1] = "relu"


def main_branch_instead(e: Editor) -> None:
    float_shortcut(e)
    both_inputs(e)


def before_relu(e: Editor) -> None:
    e.insert_pair("layer1.0.relu1", 0)


def after_add(e: Editor) -> None:
    e.insert_pair("layer1.0.relu2", 0)


def float_input(e: Editor) -> None:
    e.bypass("images")


def float_weight(e: Editor) -> None:
    weight = e.array("conv1.weight").astype(np.float32)
    e.node("conv1").input[1] = e.store("conv1.float", weight)
    e.remove("conv1.weight.dq")


def float_gemm(e: Editor) -> None:
    e.bypass("flatten")


def float_gemm_of_a_fixed_batch(e: Editor) -> None:
    e.bypass("flatten")
    e.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def quantized_logits(e: Editor) -> None:
    e.node("fc").output[0] = "fc.out"
    pair = e.pair("fc.out", "extra")
    pair[1].output[0] = "logits"
    e.graph.node.extend(pair)


def lone_q(e: Editor) -> None:
    e.graph.node.append(e.pair("relu", "extra")[0])


def unread_pair(e: Editor) -> None:
    e.graph.node.extend(e.pair("relu", "extra"))


def unread_dq(e: Editor) -> None:
    inputs = ["relu.q", "relu.scale", "relu.zero_point"]
    e.graph.node.append(helper.make_node("DequantizeLinear", inputs, ["extra.dq"], "extra.dq"))


def pair_for_softmax(e: Editor) -> None:
    e.node("fc").output[0] = "fc.out"
    e.graph.node.append(helper.make_node("Softmax", ["fc.out"], ["logits"], "softmax"))
    e.insert_pair("softmax", 0)


def dynamic_quantize(e: Editor) -> None:
    e.graph.node.append(
        helper.make_node("DynamicQuantizeLinear", ["relu"], ["x", "y", "z"], "dynamic")
    )


def opset_12(e: Editor) -> None:
    e.model.opset_import[0].version = 12


def half_scale(e: Editor) -> None:
    e.store("relu.scale", e.array("relu.scale").astype(np.float16))


def int16(e: Editor) -> None:
    e.model.opset_import[0].version = 21
    e.retype("relu", np.array(0, np.int16))


def unknown_operator(e: Editor) -> None:
    e.node("avgpool").op_type = "GlobalAveragePoll"


CASES: list[tuple[Callable[[Editor], None], Findings]] = [
    (unsigned, [("error", "unsigned", "relu.q")]),
    (uint8_128, [("error", "zero-point", "relu.q")]),
    (int8_5, [("error", "zero-point", "relu.q")]),
    (without_zero_point, [("error", "no-zero-point", "relu.q")]),
    (weight_without_zero_point, [("note", "no-zero-point", "fc.weight.dq")]),
    (vector_scale, [("error", "scale-shape", "relu.q")]),
    (channel_scales, [("error", "activation-axis", "relu.q")]),
    (scale(0), [("error", "bad-scale", "relu.q")]),
    (scale(-1), [("error", "bad-scale", "relu.q")]),
    (scale(np.nan), [("error", "bad-scale", "relu.q")]),
    (scale(np.inf), [("error", "bad-scale", "relu.q")]),
    (weight_scale_of_zero, [("error", "bad-scale", "fc.weight.dq")]),
    (computed_scale, [("error", "bad-scale", "images.q")]),
    (uint8_weight, [("error", "weight-type", "fc.weight.dq")]),
    (skewed_weight, [("error", "weight-type", "fc.weight.dq")]),
    (per_tensor_weight, [("warning", "weight-per-tensor", "layer1.0.conv1.weight.dq")]),
    (conv_axis_1, [("error", "weight-axis", "layer1.0.conv1.weight.dq")]),
    (gemm_axis_1, [("error", "weight-axis", "fc.weight.dq")]),
    (gemm_not_transposed, []),
    (gemm_not_transposed_axis_0, [("error", "weight-axis", "fc.weight.dq")]),
    (int32_bias, [("error", "quantized-bias", "b.dq")]),
    (both_inputs, [("warning", "add-both", "layer1.0.add")]),
    (float_shortcut, [("warning", "float-shortcut", "layer1.0.add")]),
    (main_branch_instead, [("warning", "float-shortcut", "layer1.0.add")]),
    (before_relu, [("warning", "before-relu", "extra.q")]),
    (after_add, [("warning", "before-relu", "extra.q")]),
    (float_input, [("warning", "float-conv", "conv1")]),
    (float_weight, [("warning", "float-conv", "conv1")]),
    (float_gemm, [("note", "float-gemm", "fc")]),
    (float_gemm_of_a_fixed_batch, [("warning", "float-gemm", "fc")]),
    (quantized_logits, [("warning", "quantized-logits", "extra.q")]),
    (lone_q, [("warning", "dangling", "extra.q")]),
    (unread_pair, [("warning", "dangling", "extra.q")]),
    (unread_dq, [("warning", "dangling", "extra.dq")]),
    (pair_for_softmax, [("warning", "dangling", "extra.q")]),
    (dynamic_quantize, [("error", "integer-operator", "dynamic")]),
    (opset_12, [("error", "opset", "resnet8")]),
    (half_scale, [("error", "half-scale", "relu.q"), ("error", "mixed-half", "relu.q")]),
    (int16, [("error", "other-type", "relu.q")]),
    (unknown_operator, [("error", "invalid", "resnet8")]),
]


@pytest.mark.parametrize(("damage", "expected"), CASES, ids=lambda case: getattr(
    case, "__name__", ""))  # fmt: skip
def test_one_flaw_is_one_finding(
    good: Editor, damage: Callable[[Editor], None], expected: Findings
) -> None:
    damage(good)
    assert findings_of(good.model) == expected


def test_every_rule_is_tried_here() -> None:
    tried = {rule for _, expected in CASES for _, rule, _ in expected}
    in_fp8 = {"fp8-type", "fp8-overflow", "fp8-targets", "mixed-kernel", "mixed-add"}  # test_fp8.py
    elsewhere = {"box-operator", "float-file", "float-pool", *in_fp8}  # tests/detection
    assert tried | elsewhere == set(RULES)


def test_half_data_with_float_scales_and_no_cast_is_an_error(quantized: Exported) -> None:
    e = Editor(to_half(quantized("resnet8", 32)))
    e.node("relu.q").input[0] = "relu"
    e.remove("relu.float")
    assert findings_of(e.model) == [("error", "mixed-half", "relu.q")]


def test_a_max_pool_is_int8_where_only_a_q_reads_it(quantized: Exported) -> None:
    e = Editor(quantized("resnet18", 64))
    assert lint(e.model) == []
    for name in ("layer1.0.conv1", "layer1.0.add"):
        node = e.node(name)
        node.input[:] = ["maxpool" if x == "maxpool.dq" else x for x in node.input]
    e.remove("maxpool.q", "maxpool.dq")
    assert [rule for _, rule, _ in findings_of(e.model)] == [
        "float-conv", "float-shortcut", "float-pool",
    ]  # fmt: skip


def test_constant_nodes_and_nodes_without_names_are_read_alike(good: Editor) -> None:
    unsigned(good)
    for tensor in list(good.graph.initializer):
        if tensor.name.endswith(("scale", "zero_point")):
            good.graph.initializer.remove(tensor)
            constant = helper.make_node("Constant", [], [tensor.name], value=tensor)
            good.graph.node.insert(0, constant)
    for node in good.graph.node:
        node.name = ""
    assert findings_of(good.model) == [("error", "unsigned", "relu.q")]


def test_q_and_dq_on_float_weights_are_as_good_as_stored_int8(good: Editor) -> None:
    scales = good.array("fc.weight.scale")
    good.store("fc.weight", (good.array("fc.weight") * scales[:, None]).astype(np.float32))
    inputs = ["fc.weight", "fc.weight.scale", "fc.weight.zero_point"]
    good.before("fc.weight.dq", helper.make_node("QuantizeLinear", inputs, ["w.q"], "w.q", axis=0))
    good.node("fc.weight.dq").input[0] = "w.q"
    assert lint(good.model) == []


def test_a_finding_says_what_happens_and_what_mends_it(good: Editor) -> None:
    unsigned(good)
    (entry,) = lint(good.model)
    assert isinstance(entry, Finding)
    assert "int8" in entry.consequence and "int8" in entry.fix


class Noise(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Two batches for onnxruntime.quantization."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.batches: Iterator[dict[str, np.ndarray]] = iter(
            [{"images": rng.standard_normal((2, 3, 32, 32)).astype(np.float32)}] * 2
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


@pytest.mark.parametrize("signed", [False, True])
def test_what_onnx_runtime_quantizes_by_default_does_not_pass(
    exported: Exported, tmp_path: Path, signed: bool
) -> None:
    source, out = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    onnx.save(exported("resnet8", 32), source)
    kind = quantization.QuantType.QInt8 if signed else quantization.QuantType.QUInt8
    quantization.quantize_static(source, out, Noise(), activation_type=kind)
    rules = {rule for severity, rule, _ in findings_of(onnx.load(out)) if severity == "error"}
    assert {"quantized-bias", "zero-point"} <= rules


def test_integer_operators_of_onnx_runtime_are_errors(exported: Exported, tmp_path: Path) -> None:
    source, out = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    onnx.save(exported("resnet8", 32), source)
    quantization.quantize_static(
        source, out, Noise(), quant_format=quantization.QuantFormat.QOperator
    )
    assert ("error", "integer-operator") in {entry[:2] for entry in findings_of(onnx.load(out))}


def test_the_model_is_not_changed(good: Editor) -> None:
    before = good.model.SerializeToString(deterministic=True)
    lint(good.model)
    assert good.model.SerializeToString(deterministic=True) == before


def test_types_are_stated_by_output_dtype_too(good: Editor) -> None:
    good.model.opset_import[0].version = 21
    without_zero_point(good)
    attribute = helper.make_attribute("output_dtype", TensorProto.INT8)
    good.node("relu.q").attribute.append(attribute)
    assert findings_of(good.model) == [("note", "no-zero-point", "relu.q")]
