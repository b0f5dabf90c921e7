from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rtresnet.core.errors import ArtifactError
from rtresnet.models import zoo
from rtresnet.onnxlib import metadata
from rtresnet.quantization import qdq
from rtresnet.quantization.canonicalize import canonicalize
from rtresnet.quantization.lint import lint
from rtresnet.quantization.sensitivity import blocks
from rtresnet.quantization.simulate import make_session

Exported = Callable[..., onnx.ModelProto]
Images = Callable[..., np.ndarray]


def strange(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """Return the net as others write it: batch norms, Constant nodes, no names, MatMul and Add."""
    rng = np.random.default_rng(seed)
    foreign = onnx.ModelProto()
    foreign.CopyFrom(model)
    del foreign.metadata_props[:]
    del foreign.graph.value_info[:]
    graph, nodes = foreign.graph, []
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for number, node in enumerate(graph.node):
        node.name = ""
        if node.op_type == "Conv":
            out, channels = node.output[0], constants[node.input[1]].dims[0]
            node.output[0] = f"{number}.bare"
            values = [rng.uniform(0.5, 2, channels), rng.normal(0, 1, channels),
                      rng.normal(0, 1, channels), rng.uniform(0.5, 2, channels)]  # fmt: skip
            names = [f"{number}.{part}" for part in ("gamma", "beta", "mean", "variance")]
            for name, value in zip(names, values, strict=True):
                graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
            norm = helper.make_node("BatchNormalization", [node.output[0], *names], [f"{number}.n"])
            nodes += [node, norm, helper.make_node("Identity", [f"{number}.n"], [out])]
        elif node.op_type == "Gemm":
            weight = numpy_helper.to_array(constants[node.input[1]]).T
            nodes += [
                helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight)),
                helper.make_node("MatMul", [node.input[0], "w"], ["product"]),
                helper.make_node("Add", [node.input[2], "product"], [node.output[0]]),
            ]
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    # Old exporters list the weights as inputs.
    graph.input.append(helper.make_tensor_value_info("0.gamma", TensorProto.FLOAT, [None]))
    return foreign


@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("resnet18", 64), ("resnet50", 64)])
def test_a_foreign_net_becomes_a_folded_one_of_the_same_function(
    exported: Exported, images: Images, name: str, size: int
) -> None:
    foreign = strange(exported(name, size))
    prepared, batch = canonicalize(foreign), images(2, size)
    kinds = {node.op_type for node in prepared.graph.node}
    assert not kinds & {"BatchNormalization", "Identity", "Constant", "MatMul"} and "Gemm" in kinds
    assert all(node.name for node in prepared.graph.node) and len(prepared.graph.input) == 1
    first, second = (make_session(m).run(None, {"images": batch})[0] for m in (foreign, prepared))
    assert np.linalg.norm(first - second) < 1e-4 * np.linalg.norm(first)
    places = qdq.placement(prepared)
    assert len(places) == len(qdq.placement(exported(name, size)))
    quantized = qdq.insert(prepared, dict.fromkeys(places, 0.1))
    assert make_session(quantized).run(None, {"images": batch})[0].shape == first.shape


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("folded", [True, False])
def test_what_torch_exports_without_us_becomes_one_too(
    opset: int, folded: bool, images: Images, tmp_path: Path
) -> None:
    """torchvision's names (layer1.0.conv1, downsample.0), as torch.onnx writes them itself."""
    torch.manual_seed(0)
    net = zoo.build(zoo.spec("resnet18")).eval()
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    path, batch = tmp_path / "net.onnx", images(2, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter of TorchScript is deprecated, and used
        torch.onnx.export(
            net, (torch.from_numpy(batch),), path, dynamo=False, opset_version=opset,
            training=torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=folded, input_names=["images"],
            dynamic_axes={"images": {0: "n"}},
        )  # fmt: skip
    foreign = onnx.load(path)
    norms_there = any(node.op_type == "BatchNormalization" for node in foreign.graph.node)
    assert norms_there != folded
    prepared = canonicalize(foreign)
    first, second = (make_session(m).run(None, {"images": batch})[0] for m in (foreign, prepared))
    assert np.linalg.norm(first - second) < 1e-4 * np.linalg.norm(first)
    places = qdq.placement(prepared)
    assert len(places) == 21  # 20 convolutions, the FC; three of 8 blocks' inputs feed two
    quantized = qdq.insert(prepared, dict.fromkeys(places, 0.1))
    assert not [entry for entry in lint(quantized) if entry.severity != "note"]


def test_weights_that_several_nodes_share_are_changed_for_each_alone(images: Images) -> None:
    """Two convolutions of equal weights, stored once, with batch norms that differ."""
    rng = np.random.default_rng(0)
    nodes, constants = [], {"w": rng.normal(0, 1, (3, 3, 1, 1)), "zeros": np.zeros(3)}
    constants |= {"g1": np.full(3, 2.0), "g2": np.full(3, 0.1), "ones": np.ones(3)}
    constants["fc"] = rng.normal(0, 1, (3, 3))
    source = "images"
    for number in (1, 2):
        nodes += [
            helper.make_node("Conv", [source, "w"], [f"c{number}"], name=f"conv{number}"),
            helper.make_node(
                "BatchNormalization", [f"c{number}", f"g{number}", "zeros", "zeros", "ones"],
                [f"n{number}"],
            ),
            helper.make_node("Relu", [f"n{number}"], [f"r{number}"]),
        ]  # fmt: skip
        source = f"r{number}"
    nodes += [
        helper.make_node("GlobalAveragePool", [source], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "fc"], ["logits"]),  # and no bias
    ]
    graph = helper.make_graph(
        nodes, "shared",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [None, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, 3])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    prepared, batch = canonicalize(model), images(2, 8)
    assert [node.op_type for node in prepared.graph.node][-1] == "Gemm"
    first, second = (make_session(m).run(None, {"images": batch})[0] for m in (model, prepared))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)
    assert list(qdq.placement(prepared)) == ["images", "r1", "flat"]


def test_blocks_are_found_without_names(exported: Exported) -> None:
    named = blocks(exported("resnet8", 32))
    assert list(named) == ["stem", "layer1.0", "layer2.0", "layer3.0", "head"]
    nameless = blocks(canonicalize(strange(exported("resnet8", 32))))
    assert [len(nodes) for nodes in nameless.values()] == [len(nodes) for nodes in named.values()]
    assert list(nameless) == ["stem", "layer1.0", "layer2.0", "layer3.0", "head"]


def test_what_batch_norm_knew_is_kept_while_folding(exported: Exported) -> None:
    foreign = strange(exported("resnet8", 32))
    properties = {entry.key: entry.value for entry in canonicalize(foreign).metadata_props}
    reference = metadata.NORM_STATISTICS.decode(properties[metadata.NORM_STATISTICS.key])
    beta = next(t for t in foreign.graph.initializer if t.name == "0.beta")
    mean, _ = next(iter(reference.values()))
    assert mean == pytest.approx(numpy_helper.to_array(beta), abs=2e-3)
    assert len(reference) == 7


def test_our_own_file_stays_as_it_is(exported: Exported) -> None:
    model = exported("resnet8", 32)
    prepared = canonicalize(model)
    assert [n.SerializeToString() for n in prepared.graph.node] == [
        n.SerializeToString() for n in model.graph.node
    ]


def test_the_model_given_is_not_changed(exported: Exported) -> None:
    foreign = strange(exported("resnet8", 32))
    before = foreign.SerializeToString(deterministic=True)
    canonicalize(foreign)
    assert foreign.SerializeToString(deterministic=True) == before


def test_old_opsets_and_stray_batch_norms_are_refused(exported: Exported) -> None:
    old = onnx.ModelProto()
    old.CopyFrom(exported("resnet8", 32))
    old.opset_import[0].version = 11
    with pytest.raises(ArtifactError, match="opset 11"):
        canonicalize(old)
    stray = strange(exported("resnet8", 32))
    norm = next(node for node in stray.graph.node if node.op_type == "BatchNormalization")
    norm.input[0] = "images"
    with pytest.raises(ArtifactError, match="one convolution only"):
        canonicalize(stray)


def test_batch_norm_in_training_mode_is_refused(exported: Exported) -> None:
    model = strange(exported("resnet8", 32))
    norm = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    norm.attribute.append(onnx.helper.make_attribute("training_mode", 1))
    with pytest.raises(ArtifactError, match="training mode") as caught:
        canonicalize(model)
    assert "net.eval()" in str(caught.value.fix)
