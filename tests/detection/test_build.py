"""Operators that TensorRT-RTX does not support are reported before the build."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtresnet.builder import engine, targets
from rtresnet.core.errors import ArtifactError
from rtresnet.quantization.lint import lint

onnx = pytest.importorskip("onnx")


def one_operator(op: str) -> onnx.ModelProto:
    helper, kind = onnx.helper, onnx.TensorProto
    image = helper.make_tensor_value_info("images", kind.FLOAT, [1, 3, 8, 8])
    if op == "RoiAlign":
        nodes = [helper.make_node(op, ["images", "rois", "batch"], ["y"], name="crops")]
        inputs = [image, helper.make_tensor_value_info("rois", kind.FLOAT, [2, 4])]
        constants = [helper.make_tensor("batch", kind.INT64, [2], [0, 0])]
        outputs = [helper.make_tensor_value_info("y", kind.FLOAT, [2, 3, 1, 1])]
    elif op == "NonMaxSuppression":
        nodes = [helper.make_node(op, ["boxes", "scores", "most", "iou"], ["y"], name="nms")]
        inputs = [
            helper.make_tensor_value_info("boxes", kind.FLOAT, [1, 10, 4]),
            helper.make_tensor_value_info("scores", kind.FLOAT, [1, 1, 10]),
        ]
        constants = [
            helper.make_tensor("most", kind.INT64, [], [5]),
            helper.make_tensor("iou", kind.FLOAT, [], [0.5]),
        ]
        outputs = [helper.make_tensor_value_info("y", kind.INT64, ["n", 3])]
    else:
        nodes = [helper.make_node(op, ["images"], ["y"], name="where")]
        inputs, constants = [image], []
        outputs = [helper.make_tensor_value_info("y", kind.INT64, [4, "n"])]
    graph = helper.make_graph(nodes, op, inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("op", ["RoiAlign", "NonMaxSuppression", "NonZero"])
def test_build_box_operator_is_refused_by_name(op: str, tmp_path: Path) -> None:
    if not targets.available():
        pytest.skip("no TensorRT builder")
    path = tmp_path / "box.onnx"
    onnx.save(one_operator(op), path)
    with pytest.raises(ArtifactError, match=op) as caught:
        engine.check(path, builder="rtx")
    assert caught.value.fix is not None and "rtresnet export" in caught.value.fix


@pytest.mark.parametrize("op", ["RoiAlign", "NonMaxSuppression", "NonZero"])
def test_lint_box_operator_is_an_error(op: str) -> None:
    findings = lint(one_operator(op))
    assert [(entry.rule, entry.severity) for entry in findings] == [("box-operator", "error")]
    assert op in findings[0].consequence
