from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtresnet.onnxlib.graph import GraphIndex, assign_blocks, branch_depths, copied


def blocks(*nodes: tuple[str, str] | tuple[str, str, int]) -> list[str]:
    described = [(name, op, *height) if height else (name, op, 0) for name, op, *height in nodes]
    return [block for _, block in assign_blocks(described)]  # type: ignore[misc]


def model(nodes: list[onnx.NodeProto], **constants: np.ndarray) -> onnx.ModelProto:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "net", [image], [result], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


class TestBlocks:
    def test_names_state_the_block(self) -> None:
        assert blocks(
            ("conv1", "Conv"), ("relu", "Relu"), ("layer1.0.conv1", "Conv"),
            ("layer1.0.add", "Add"), ("layer2.1.conv1", "Conv"), ("avgpool", "GlobalAveragePool"),
            ("flatten", "Flatten"), ("fc", "Gemm"),
        ) == ["stem", "stem", "layer1.0", "layer1.0", "layer2.1", *["head"] * 3]  # fmt: skip

    @pytest.mark.parametrize(
        "form", ["layer{}/{}/conv", "/layer{0}/layer{0}.{1}/conv", "stage{}_{}"]
    )
    def test_names_of_other_exporters_state_the_block(self, form: str) -> None:
        names = [form.format(stage, block) for stage in (1, 2) for block in (0, 1)]
        nodes = [("conv1", "Conv"), *((name, "Conv") for name in names), ("fc", "Gemm")]
        assert blocks(*nodes) == ["stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "head"]

    def test_stages_that_are_counted_from_zero_begin_at_one(self) -> None:
        assert blocks(("stage0.0.conv", "Conv"), ("stage1.0.conv", "Conv")) == [
            "layer1.0", "layer2.0",
        ]  # fmt: skip

    def test_a_weight_before_its_layer_does_not_begin_the_block(self) -> None:
        assert blocks(
            ("layer1.0.conv1.weight.dq", "DequantizeLinear"), ("conv1", "Conv"),
            ("fc.weight.dq", "DequantizeLinear"), ("layer1.0.conv1", "Conv"), ("fc", "Gemm"),
        ) == ["layer1.0", "stem", "stem", "layer1.0", "head"]  # fmt: skip

    def test_without_names_an_add_ends_a_block_and_a_smaller_output_a_stage(self) -> None:
        ops = [("Conv", 16), ("Relu", 16), ("MaxPool", 8),
               ("Conv", 8), ("Relu", 8), ("Conv", 8), ("Add", 8), ("Relu", 8),
               ("Conv", 4), ("Relu", 4), ("Conv", 4), ("Conv", 4), ("Add", 4), ("Relu", 4),
               ("GlobalAveragePool", 1), ("Flatten", 0), ("Gemm", 0)]  # fmt: skip
        result = blocks(*((f"n{i}", op, height) for i, (op, height) in enumerate(ops)))
        assert result == ["stem"] * 3 + ["layer1.0"] * 5 + ["layer2.0"] * 6 + ["head"] * 3

    def test_a_net_without_a_convolution_is_stem_and_head(self) -> None:
        assert blocks(("a", "Relu"), ("b", "Relu"), ("c", "Gemm")) == ["stem", "stem", "head"]

    def test_names_of_tensorrt_and_of_onnx_give_the_same_blocks(self) -> None:
        onnx_ops = ["Conv", "Relu", "Conv", "Add", "Relu", "Gemm"]
        words = ["conv", "relu", "conv", "add", "relu", "matmul"]
        heights = [8, 8, 8, 8, 8, 0]
        first, second = (
            blocks(*((f"n{i}", op, heights[i]) for i, op in enumerate(ops)))
            for ops in (onnx_ops, words)
        )
        assert first == second == ["stem", "stem"] + ["layer1.0"] * 3 + ["head"]

    def test_an_added_constant_ends_no_block(self) -> None:
        weight = np.zeros((3, 3, 1, 1), np.float32)
        nodes = [
            helper.make_node("Add", ["x", "shift"], ["shifted"]),
            helper.make_node("Conv", ["shifted", "w"], ["a"]),
            helper.make_node("Conv", ["a", "w"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ]
        index = GraphIndex(model(nodes, shift=np.zeros((1, 3, 1, 1), np.float32), w=weight))
        assert [block for _, block in index.blocks()] == ["stem", "stem", "layer1.0", "layer1.0"]


class TestBranchDepths:
    @staticmethod
    def depths(nodes: list[onnx.NodeProto]) -> tuple[int, int] | None:
        index = GraphIndex(model(nodes))
        return branch_depths(index.producers, nodes[-1])

    def test_the_shortcut_has_fewer_convolutions(self) -> None:
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Conv", ["b", "w"], ["c"]),
            helper.make_node("Conv", ["x", "w"], ["d"]),
            helper.make_node("Add", ["d", "c"], ["y"]),
        ]
        assert self.depths(nodes) == (1, 2)

    def test_branches_without_a_common_origin_are_no_block(self) -> None:
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["a"]),
            helper.make_node("Add", ["a", "other"], ["y"]),
        ]
        assert self.depths(nodes) is None


class TestConstants:
    def test_initializers_constant_nodes_and_identities_are_constants(self) -> None:
        value = np.array([1.5], np.float32)
        nodes = [
            helper.make_node("Constant", [], ["node"], value=numpy_helper.from_array(value)),
            helper.make_node("Constant", [], ["number"], value_float=1.5),
            helper.make_node("Identity", ["stored"], ["same"]),
            helper.make_node("Relu", ["x"], ["y"]),
        ]
        index = GraphIndex(model(nodes, stored=value))
        for name in ("stored", "node", "same"):
            assert np.array_equal(index.constant(name), value)  # type: ignore[arg-type]
        assert index.constant("number") == 1.5 and index.scalar("number") == 1.5
        assert index.constant("y") is None and index.scalar("stored") is None

    def test_a_name_that_is_taken_gets_a_number_unless_the_value_is_equal(self) -> None:
        index = GraphIndex(model([helper.make_node("Relu", ["x"], ["y"])]))
        one, two = np.array(1, np.float32), np.array(2, np.float32)
        assert [index.add_constant("c", value) for value in (one, one, two, two)] == [
            "c", "c", "c.1", "c.1",
        ]  # fmt: skip
        assert index.constant("c") == 1 and index.constant("c.1") == 2
        index.set_constant("c", two)
        assert index.constant("c") == 2 and len(index.graph.initializer) == 2


def test_inserted_nodes_stand_around_those_named() -> None:
    relu, more = helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["y"])
    index = GraphIndex(model([relu, more]))
    new = {name: helper.make_node("Neg", ["x"], [name]) for name in ("first", "before", "after")}
    index.insert(
        before={"y": [new["before"]]}, after={"x": [new["first"]], "a": [new["after"]]},
        removed=["y"],
    )  # fmt: skip
    assert [node.output[0] for node in index.graph.node] == ["first", "a", "after", "before"]


def test_a_copy_leaves_the_original_alone() -> None:
    net = model([helper.make_node("Relu", ["x"], ["y"])])
    copied(net).graph.node[0].op_type = "Neg"
    assert net.graph.node[0].op_type == "Relu"


def test_the_block_namer_needs_no_onnx() -> None:
    code = "import sys, rtresnet.onnxlib.graph; sys.exit('onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
