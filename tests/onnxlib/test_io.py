from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from rtresnet.cli.main import main
from rtresnet.core.errors import ArtifactError
from rtresnet.onnxlib import io


def _break_weights(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"\0"


def _break_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = -1


def _overflow_stride(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    strides = next(entry for entry in node.attribute if entry.name == "strides")
    strides.ints[:] = [2, 2**31 - 1]


@pytest.mark.parametrize(
    "damage",
    [
        _overflow_stride,
        _break_weights,
        _break_type,
        lambda model: model.ClearField("opset_import"),
        lambda model: model.graph.ClearField("output"),
        lambda model: model.graph.node[0].ClearField("output"),
    ],
)
def test_load_damaged_model_is_refused_by_every_command(
    damage: Callable[[onnx.ModelProto], None], engines: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = onnx.load(engines / "resnet8-int8.onnx")
    damage(model)
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"net\.onnx"):
        io.load(path)
    for command in (["inspect"], ["lint"], ["quantize", "--size", "32"], ["check"]):
        assert main([command[0], str(path), *command[1:]]) == 2
        assert "net.onnx" in capsys.readouterr().err
