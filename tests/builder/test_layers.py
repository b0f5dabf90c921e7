from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from rtresnet.builder import engine, layers, nodes
from rtresnet.core.artifacts import read_sidecar
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.sidecar import Profile, Sidecar


def test_layers_say_what_they_do_and_where(fake: SimpleNamespace) -> None:
    result = layers.read_dump(
        fake.dump(
            fake.dumped("kgen", ["Float"], [], "__myl_CastTran_myl0_0"),
            fake.dumped("kgen", ["Float"], ["conv1", "q"], "__myl_MulRoun_myl0_1", out="Int8"),
            fake.dumped("correlation", ["Int8"], ["conv1"]),
            fake.dumped("kgen", ["Float"], ["conv1", "relu"], "__myl_MulRelu_myl0_3"),
            fake.dumped(
                "correlation", ["Half", "Half"], ["layer1.0.conv2", "layer1.0.add"], out="Half"
            ),
        ),
        fake.nodes_of(
            q="quantize", conv1="conv", relu="relu", layer1_0_conv2="conv", layer1_0_add="add"
        ),
    )
    shown = [(layer.role, layer.operation, layer.block) for layer in result]
    assert shown == [
        ("idle", "shape_call", "stem"),
        ("reformat", "convert + transpose", "stem"),
        ("requantize", "quantize", "stem"),
        ("conv", "conv", "stem"),
        ("pointwise", "scale + relu", "stem"),
        ("conv", "conv + add", "layer1.0"),
    ]
    assert result[3].weights == 2 * 16 * 16 * 9 + 4 * 16
    assert result[3].outputs[0].bytes(8) == 4 * 8 * 16 * 32 * 32


def test_a_type_of_unknown_width_has_no_size() -> None:
    assert layers.LayerTensor(name="t", shape=(-1, 3), dtype="Odd").bytes(8) is None


def test_the_layers_are_kept_beside_the_plan(plan: Path) -> None:
    loaded = layers.load(plan, read_sidecar(plan))
    assert loaded.batches == (4,) and len(loaded.convolutions) == 7 and len(loaded.adds) == 3
    assert {layer.stage for layer in loaded.layers} == {
        "stem",
        "layer1",
        "layer2",
        "layer3",
        "head",
    }
    assert sum(layer.role == "conv" for layer in loaded.layers) == 7


def test_layers_of_another_build_are_refused(plan: Path, tmp_path: Path) -> None:
    copy = tmp_path / plan.name
    for path in (plan, Path(f"{plan}.json"), layers.path_for(plan)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    place = layers.path_for(copy)
    place.write_text(place.read_text().replace("Int8", "Half", 1))
    with pytest.raises(ArtifactError, match=r"belong to .*; build it again"):
        layers.load(copy, read_sidecar(copy))
    place.unlink()
    with pytest.raises(InputError, match="no such file; build it again"):
        layers.load(copy, read_sidecar(copy))
    with pytest.raises(InputError, match="it has no sidecar"):
        layers.load(copy, None)


def read_nodes(model: onnx.ModelProto) -> dict[str, nodes.NetworkNode]:
    trt = pytest.importorskip("tensorrt_rtx")
    log = engine.make_log(trt)
    maker = trt.Builder(log)
    network = maker.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(model.SerializeToString())
    return nodes.read(trt, network)


@pytest.mark.parametrize("names", ["{op}_{i}", "", "/layer{stage}/layer{stage}.{block}/c{i}/Conv"])
@pytest.mark.parametrize(
    ("net", "size", "precision"), [("resnet8", 32, "int8"), ("resnet18", 64, "fp16")]
)
def test_foreign_names_give_the_same_stages(
    onnx_file: Callable[..., Path], net: str, size: int, precision: str, names: str
) -> None:
    """By the names of torch's exporters where they tell, else by counting."""
    model = onnx.load(onnx_file(net, precision, size))
    own = read_nodes(model)
    places = [node.block for node in own.values() if node.operation in ("conv", "add", "matmul")]
    for index, node in enumerate(model.graph.node):
        block = own[node.name].block
        stage, _, number = block.removeprefix("layer").partition(".")
        torch_like = "{stage}" in names and not block.startswith("layer")
        pattern = "/{op}{i}" if torch_like else names
        node.name = pattern.format(op=node.op_type, i=index, stage=stage, block=number)
    results = [
        n.block for n in read_nodes(model).values() if n.operation in ("conv", "add", "matmul")
    ]
    assert results == places


def test_a_plan_without_a_dump_has_no_layer_file(
    onnx_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorRT builds; an earlier file of layers must not seem to belong to it."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "net.plan"
    options = {"profiles": [Profile(min=1, opt=4, max=8)], "builder": "rtx"}
    engine.build(onnx_file("resnet8", "fp16"), out, **options)  # type: ignore[arg-type]
    assert json.loads(layers.path_for(out).read_text())["schema"] == layers.SCHEMA
    monkeypatch.setattr(layers, "read_dump", lambda *_: ())
    sidecar: Sidecar = engine.build(onnx_file("resnet8", "fp16"), out, **options)  # type: ignore[arg-type]
    assert sidecar.plan is not None and sidecar.plan.attested is sidecar.plan.layers is None
    assert not layers.path_for(out).exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_layers_multiply_adds_are_those_of_the_net_in_every_profile(
    onnx_file: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from rtresnet.bench import kernels

    source, out = onnx_file("resnet8", precision), tmp_path / "net.plan"
    profiles = [Profile(min=1, opt=1, max=1), Profile(min=2, opt=4, max=8)]
    sidecar = engine.build(source, out, profiles=profiles, builder="rtx")
    loaded = layers.load(out, sidecar).layers
    expected = sum(kernel.multiply_adds for kernel in kernels.count(source).kernels)
    for profile in (0, 1):
        own = [layer for layer in loaded if layer.profile == profile]
        assert sum(layer.multiply_adds or 0 for layer in own) == expected
        assert sum(bool(layer.multiply_adds) for layer in own) == 8


@pytest.mark.parametrize("weight_first", [False, True])
def test_nodes_multiply_adds_of_a_product_count_each_output_once(weight_first: bool) -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    left, right = ("w", "x") if weight_first else ("x", "w")
    shape = ["N", 6, 10] if weight_first else ["N", 10, 6]
    weight = onnx.numpy_helper.from_array(
        np.zeros((4, 6) if weight_first else (6, 4), np.float32), "w"
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", [left, right], ["y"], name="product")],
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [weight],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    assert read_nodes(model)["product"].multiply_adds == 4 * 6 * 10
