from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtresnet import norms
from rtresnet.errors import ArtifactError
from rtresnet.quantize import qdq
from rtresnet.quantize.prepare import prepare
from rtresnet.quantize.sensitivity import blocks
from rtresnet.quantize.simulate import session

Exported = Callable[..., onnx.ModelProto]
Images = Callable[..., np.ndarray]


def strange(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """The same net as others write it: batch norms, Constant nodes, no names, MatMul and Add."""
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
    prepared, batch = prepare(foreign), images(2, size)
    kinds = {node.op_type for node in prepared.graph.node}
    assert not kinds & {"BatchNormalization", "Identity", "Constant", "MatMul"} and "Gemm" in kinds
    assert all(node.name for node in prepared.graph.node) and len(prepared.graph.input) == 1
    first, second = (session(m).run(None, {"images": batch})[0] for m in (foreign, prepared))
    assert np.linalg.norm(first - second) < 1e-4 * np.linalg.norm(first)
    places = qdq.placement(prepared)
    assert len(places) == len(qdq.placement(exported(name, size)))
    quantized = qdq.insert(prepared, dict.fromkeys(places, 0.1))
    assert session(quantized).run(None, {"images": batch})[0].shape == first.shape


def test_blocks_are_found_without_names(exported: Exported) -> None:
    named = blocks(exported("resnet8", 32))
    assert list(named) == ["stem", "layer1.0", "layer2.0", "layer3.0", "fc"]
    nameless = blocks(prepare(strange(exported("resnet8", 32))))
    assert [len(nodes) for nodes in nameless.values()] == [len(nodes) for nodes in named.values()]
    assert list(nameless) == ["stem", "block1", "block2", "block3", "fc"]


def test_what_batch_norm_knew_is_kept_while_folding(exported: Exported) -> None:
    foreign = strange(exported("resnet8", 32))
    properties = {entry.key: entry.value for entry in prepare(foreign).metadata_props}
    known = norms.unpack(properties[norms.KEY])
    beta = next(t for t in foreign.graph.initializer if t.name == "0.beta")
    mean, _ = next(iter(known.values()))
    assert mean == pytest.approx(numpy_helper.to_array(beta), abs=2e-3)
    assert len(known) == 7


def test_our_own_file_stays_as_it_is(exported: Exported) -> None:
    model = exported("resnet8", 32)
    prepared = prepare(model)
    assert [n.SerializeToString() for n in prepared.graph.node] == [
        n.SerializeToString() for n in model.graph.node
    ]


def test_the_model_given_is_not_changed(exported: Exported) -> None:
    foreign = strange(exported("resnet8", 32))
    before = foreign.SerializeToString(deterministic=True)
    prepare(foreign)
    assert foreign.SerializeToString(deterministic=True) == before


def test_old_opsets_and_stray_batch_norms_are_refused(exported: Exported) -> None:
    old = onnx.ModelProto()
    old.CopyFrom(exported("resnet8", 32))
    old.opset_import[0].version = 11
    with pytest.raises(ArtifactError, match="opset 11"):
        prepare(old)
    stray = strange(exported("resnet8", 32))
    norm = next(node for node in stray.graph.node if node.op_type == "BatchNormalization")
    norm.input[0] = "images"
    with pytest.raises(ArtifactError, match="cannot be folded"):
        prepare(stray)
