"""Embedded pre- and post-processing, run by ONNX Runtime without optimization."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rtresnet.core import metrics
from rtresnet.core.errors import ArtifactError, CheckFailedError, InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.exporter import embed_io
from rtresnet.models.resnet import ResNet
from rtresnet.quantization import calibrate, half, qdq
from tests.onnx_outputs import run_model

pytest.importorskip("onnxruntime")

Exported = Callable[..., tuple[ResNet, onnx.ModelProto]]
CONTRACT = Preprocess.for_size(32, mean=(0.1, 0.5, 0.9), std=(0.2, 1.0, 0.05))
PRECISIONS = ("fp32", "fp16", "int8", "int8 with fp16")


@pytest.fixture(scope="module")
def models(exported: Exported) -> dict[str, onnx.ModelProto]:
    plain = exported("resnet8", 32)[1]
    batch = np.random.default_rng(9).standard_normal((16, 3, 32, 32)).astype(np.float32)
    scales = calibrate.calibrate(plain, list(qdq.placement(plain)), lambda: [batch], "max").scales
    quantized = qdq.insert(plain, scales)
    made = (plain, half.to_half(plain), quantized, half.to_half(quantized))
    return dict(zip(PRECISIONS, made, strict=True))


def run(model: onnx.ModelProto, images: np.ndarray, *also: str) -> list[np.ndarray]:
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in also)
    return run_model(watched, {"images": images}, optimize=False)


def forward(model: onnx.ModelProto) -> metrics.Forward:
    return lambda images: run(model, images)[0]


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_every_level_of_every_channel_is_normalized_bit_for_bit(
    models: dict[str, onnx.ModelProto],
) -> None:
    changed = embed_io.rewrite(models["fp32"], CONTRACT, pixels=True, topk=None)
    levels = np.arange(256, dtype=np.uint8)
    images = np.resize(levels, (3, 32, 32, 3))
    images[1] = images[0][::-1, ::-1, ::-1]  # each level in other channels too
    images[2] = np.resize(levels[:, None].repeat(3, 1), (32, 32, 3))
    _, normalized = run(changed, images, "normalized")
    np.testing.assert_array_equal(normalized, CONTRACT.normalize(images))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pixels_give_the_logits_of_the_plain_file_bit_for_bit(
    precision: str, models: dict[str, onnx.ModelProto]
) -> None:
    plain = models[precision]
    changed = embed_io.rewrite(plain, CONTRACT, pixels=True, topk=None)
    images = pixels(3)
    (logits,) = run(changed, images)
    np.testing.assert_array_equal(logits, run(plain, CONTRACT.normalize(images))[0])
    entry = changed.graph.input[0].type.tensor_type
    assert entry.elem_type == TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in entry.shape.dim] == ["batch", 32, 32, 3]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("topk", [1, 3, 10])
def test_the_best_classes_come_with_their_probabilities(
    precision: str, topk: int, models: dict[str, onnx.ModelProto]
) -> None:
    plain = models[precision]
    changed = embed_io.rewrite(plain, CONTRACT, pixels=False, topk=topk)
    assert [output.name for output in changed.graph.output] == ["indices", "probabilities"]
    images = CONTRACT.normalize(pixels(4))
    indices, probabilities = run(changed, images)
    rows = metrics.softmax(run(plain, images)[0].astype(np.float64))
    assert (indices.dtype, probabilities.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(indices, np.argsort(-rows, axis=1)[:, :topk])
    np.testing.assert_allclose(
        probabilities, np.take_along_axis(rows, indices, axis=1), rtol=1e-5, atol=1e-7
    )


def test_the_first_quantizer_stays_on_the_normalized_input(
    models: dict[str, onnx.ModelProto],
) -> None:
    plain = models["int8"]
    changed = embed_io.rewrite(plain, CONTRACT, pixels=True, topk=5)
    before = [node for node in plain.graph.node if node.op_type == "QuantizeLinear"]
    after = [node for node in changed.graph.node if node.op_type == "QuantizeLinear"]
    assert len(before) == len(after)
    assert (before[0].input[0], after[0].input[0]) == ("images", "normalized")
    assert before[0].input[1:] == after[0].input[1:] and before[0].output == after[0].output
    tensors = {tensor.name: tensor for tensor in changed.graph.initializer}
    assert all(tensors[tensor.name] == tensor for tensor in plain.graph.initializer)


def test_the_file_given_is_not_changed(models: dict[str, onnx.ModelProto]) -> None:
    before = models["fp32"].SerializeToString()
    embed_io.rewrite(models["fp32"], CONTRACT, pixels=True, topk=2)
    assert models["fp32"].SerializeToString() == before


@pytest.mark.parametrize("topk", [0, 11])
def test_more_classes_than_there_are_is_refused(
    topk: int, models: dict[str, onnx.ModelProto]
) -> None:
    with pytest.raises(InputError, match=f"--topk {topk}: resnet8 has 10 classes"):
        embed_io.rewrite(models["fp32"], CONTRACT, pixels=False, topk=topk)


@pytest.mark.parametrize(("takes", "topk"), [(True, None), (False, 3)])
def test_ends_are_changed_once(
    takes: bool, topk: int | None, models: dict[str, onnx.ModelProto]
) -> None:
    once = embed_io.rewrite(models["fp32"], CONTRACT, pixels=takes, topk=topk)
    with pytest.raises(ArtifactError, match="already has an embedded"):
        embed_io.rewrite(once, CONTRACT, pixels=not takes, topk=None if topk else 3)


def odd(shape: list[object], out: list[object], opset: int = 18) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["logits"])],
        "odd",
        [value("images", TensorProto.FLOAT, shape)],
        [value("logits", TensorProto.FLOAT, out)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (odd(["n", 1, 8, 8], ["n", 64]), "expected a net"),
        (odd(["n", 3, 8, 8], ["n", 192, 1, 1]), "expected a net"),
        (odd(["n", 3, 8, 8], ["n", "classes"]), "expected a net"),
        (odd(["n", 3, 8, 8], ["n", 192], opset=11), "opset 11"),
    ],
)
def test_what_is_no_plain_net_is_refused(model: onnx.ModelProto, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        embed_io.rewrite(model, CONTRACT, pixels=True, topk=1)


@pytest.mark.parametrize(("takes", "topk"), [(True, None), (True, 3), (False, 3)])
def test_both_files_are_held_against_each_other(
    takes: bool, topk: int | None, models: dict[str, onnx.ModelProto]
) -> None:
    plain = models["fp32"]
    options = {"pixels": takes, "topk": topk}
    changed = embed_io.rewrite(plain, CONTRACT, **options)  # type: ignore[arg-type]

    def through(model: onnx.ModelProto) -> Callable[[np.ndarray], object]:
        return lambda images: result if len(result := run(model, images)) > 1 else result[0]

    assert embed_io.check(forward(plain), through(changed), CONTRACT, **options)["relative"] < 1e-6  # type: ignore[arg-type]
    if takes:
        wrong = Preprocess.for_size(32, mean=(0.11, 0.5, 0.9), std=CONTRACT.std)
    else:
        wrong, plain = CONTRACT, models["int8"]
    other = embed_io.rewrite(plain, wrong, **options)  # type: ignore[arg-type]
    with pytest.raises(CheckFailedError, match="differs by"):
        embed_io.check(forward(models["fp32"]), through(other), CONTRACT, **options)  # type: ignore[arg-type]


def test_swapped_classes_are_found_out(models: dict[str, onnx.ModelProto]) -> None:
    plain = models["fp32"]
    changed = embed_io.rewrite(plain, CONTRACT, pixels=False, topk=2)

    def swapped(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices, probabilities = run(changed, images)
        return indices[:, ::-1], probabilities

    with pytest.raises(CheckFailedError):
        embed_io.check(forward(plain), swapped, CONTRACT, pixels=False, topk=2)


def test_no_torch_is_imported() -> None:
    code = "import sys, rtresnet.exporter.embed_io; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "torch" not in Path(embed_io.__file__).read_text().replace("no torch", "")
