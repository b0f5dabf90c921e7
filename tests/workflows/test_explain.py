"""Class activation maps of checkpoints and ONNX files in every precision."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from rtresnet.cli.main import main
from rtresnet.core.errors import DataError, InputError
from rtresnet.models import checkpoint
from rtresnet.workflows.explain import activation_map, explain
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import load
from rtresnet.workflows.quantize import QuantizeConfig, quantize
from tests.conftest import tinted_noise


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, pixels in enumerate(tinted_noise(4, seed=5)[0]):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


FILES = ("checkpoint", "resnet8.onnx", "resnet8-fp16.onnx", "resnet8-int8.onnx")


@pytest.mark.parametrize("name", FILES)
def test_explain_map_averages_to_the_logit_minus_the_bias(
    name: str, trained: Path, engines: Path, images: Path, tmp_path: Path
) -> None:
    artifact = trained / "best.pt" if name == "checkpoint" else engines / name
    result = explain(images, artifact, tmp_path / "out")
    assert len(result.images) == 4 and not result.skipped
    with load(artifact) as session:
        pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(images.iterdir())])
        logits = session(session.prepare(pixels))
    assert not isinstance(logits, tuple)
    for number, entry in enumerate(result.images):
        heat = np.array(entry.map)
        assert heat.shape == (8, 8) and np.ptp(heat) > 0
        assert heat.mean() == pytest.approx(entry.logit - entry.bias, rel=1e-6, abs=1e-6)
        # The logits are those of the artifact as it runs, up to its own kernels' rounding.
        assert entry.logit == pytest.approx(float(logits[number].max()), abs=0.15)
        assert Image.open(entry.overlay).size == (224, 224)


def test_explain_bf16_file_has_the_map_of_the_fp32_file(
    engines: Path, images: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bf16.onnx"
    quantize(engines / "resnet8.onnx", QuantizeConfig(precision="bf16"), out=path)
    wide = explain(images, engines / "resnet8.onnx", tmp_path / "out")
    for entry, other in zip(explain(images, path, tmp_path / "o").images, wide.images, strict=True):
        assert entry.label == other.label and entry.logit == pytest.approx(other.logit, abs=0.1)
        assert np.array(entry.map).mean() == pytest.approx(entry.logit - entry.bias, abs=1e-6)
        assert np.corrcoef(np.ravel(entry.map), np.ravel(other.map))[0, 1] > 0.99


def test_explain_linear_layer_without_a_bias_has_bias_0(
    engines: Path, images: Path, tmp_path: Path
) -> None:
    model = onnx.load(engines / "resnet8.onnx")
    (gemm,) = [node for node in model.graph.node if node.op_type == "Gemm"]
    del gemm.input[2:]
    onnx.save(model, tmp_path / "net.onnx")
    result = explain(images, tmp_path / "net.onnx", tmp_path / "out")
    assert {entry.bias for entry in result.images} == {0.0}


def test_explain_raw_map_of_a_float_net_is_exact_without_the_correction(
    trained: Path, images: Path, tmp_path: Path
) -> None:
    from rtresnet.workflows import explain as module

    saved = checkpoint.load(trained / "best.pt")
    with load(trained / "best.pt") as session:
        maps, weight, bias = module._parts(session)
        features, logits = maps(session.prepare(tinted_noise(3)[0]))
    for row, values in zip(features, logits, strict=True):
        for label in range(4):
            raw = np.tensordot(weight[label], row, 1)
            assert raw.mean() == pytest.approx(values[label] - bias[label], rel=1e-4, abs=1e-4)
    assert np.array_equal(weight, saved.state["fc.weight"].numpy())


def test_explain_int8_correction_is_at_most_half_a_step_of_each_feature(
    engines: Path, images: Path, tmp_path: Path
) -> None:
    from rtresnet.onnxlib.graph import GraphIndex
    from rtresnet.workflows import explain as module

    path = engines / "resnet8-int8.onnx"
    with load(path) as session:
        maps, weight, bias = module._parts(session)
        features, logits = maps(session.prepare(tinted_noise(8)[0]))
    index = GraphIndex(onnx.load(path))
    (gemm,) = [node for node in index.nodes if node.op_type == "Gemm"]
    pair = index.dequantized(gemm.input[0], ("Flatten", "Cast", "Identity"))
    step = 0.0 if pair is None else float(np.asarray(index.constant(pair.input[1])))
    raw = np.einsum("kc,nchw->nkhw", weight, features).mean(axis=(2, 3))
    bound = step / 2 * np.abs(weight).sum(axis=1) + 1e-3
    assert (np.abs(raw - (logits - bias)) <= bound).all()


def test_activation_map_finds_where_the_feature_is() -> None:
    features = np.zeros((2, 3, 3), np.float32)
    features[1, 0, 2] = 9.0
    heat = activation_map(features, np.array([1.0, 2.0]), 2.0)
    assert np.unravel_index(heat.argmax(), heat.shape) == (0, 2) and heat.mean() == 2.0


def test_predict_explain_prints_and_writes(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.png").write_bytes(b"no image")
    out, file = tmp_path / "maps", tmp_path / "explain.json"
    arguments = ["predict", str(trained / "best.pt"), str(images), "--explain", str(out)]
    assert main([*arguments, "--json", str(file)]) == 0
    assert len(list(out.glob("*.png"))) == 4
    printed = capsys.readouterr()
    assert str(out) in printed.out and "broken.png" in printed.err
    assert len(json.loads(file.read_text())["result"]["images"]) == 4
    assert main([*arguments, "--top", "2"]) == 2


def test_explain_net_without_global_pooling_is_refused(images: Path, tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    weights = [
        numpy_helper.from_array(np.ones((2, 192), np.float32), "w"),
        numpy_helper.from_array(np.zeros(2, np.float32), "b"),
    ]
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    stated = InputConfig(size=8, preset="imagenet")
    with pytest.raises(InputError, match="global average pooling"):
        explain(images, tmp_path / "net.onnx", tmp_path / "out", stated=stated)


def test_explain_no_readable_image_is_an_error(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError):
        explain(tmp_path / "a.png", trained / "best.pt", tmp_path / "out")
