from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from rtresnet.bench import kernels
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.models import zoo
from rtresnet.models.nets import multiply_adds

Net = Callable[..., Path]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "nameless"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_count_multiply_adds_equal_the_nets(net_file: Net, precision: str, shortcut: str) -> None:
    counted = kernels.count(net_file(precision, "resnet8", shortcut))
    net = zoo.build(zoo.spec("resnet8", shortcut=shortcut), device="meta")
    assert sum(kernel.multiply_adds for kernel in counted.kernels) == multiply_adds(net, 32)
    assert counted.size == 32


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2), ("int8", 1)])
def test_count_fused_convolution_reads_and_writes_its_tensors(
    net_file: Net, precision: str, size: int
) -> None:
    results = {k.name: k for k in kernels.count(net_file(precision)).kernels}
    map_bytes = 16 * 32 * 32 * size
    first, last = results["layer1.0.conv1"], results["layer1.0.conv2"]
    assert first.dtype == last.dtype == precision
    assert first.read == (map_bytes,) and first.written == map_bytes
    assert sorted(last.read) == [map_bytes, map_bytes]  # its input and the shortcut's
    assert last.written == map_bytes
    assert {"layer1.0.add", "layer1.0.relu2"} <= set(last.nodes)
    biases = 16 * 4 if precision != "fp16" else 16 * 2
    assert 16 * 16 * 9 * size + biases <= first.weights <= 16 * 16 * 9 * size + biases + 16 * 5


def test_count_every_storing_node_is_in_one_kernel(net_file: Net) -> None:
    path = net_file("fp32")
    counted = kernels.count(path)
    nodes = onnx.load(path).graph.node
    inside = [name for kernel in counted.kernels for name in kernel.nodes]
    assert len(inside) == len(set(inside))
    views = {node.name for node in nodes if node.op_type in kernels.VIEWS}
    assert {node.name for node in nodes} - set(inside) == views
    assert set(counted.blocks) == {name for n in nodes for name in (n.name, *n.output)}


def test_count_blocks_and_stages_are_in_order(net_file: Net) -> None:
    named = kernels.count(net_file("fp32")).kernels
    assert list(dict.fromkeys(k.block for k in named)) == [
        "stem", "layer1.0", "layer2.0", "layer3.0", "head",
    ]  # fmt: skip
    nameless = kernels.count(net_file("nameless")).kernels
    assert list(dict.fromkeys(k.block for k in nameless)) == [
        "stem", "layer1.0", "layer2.0", "layer3.0", "head",
    ]  # fmt: skip
    assert list(dict.fromkeys(k.stage for k in nameless)) == [
        "stem", "layer1", "layer2", "layer3", "head",
    ]  # fmt: skip
    assert [k.multiply_adds for k in nameless] == [k.multiply_adds for k in named]


def test_at_int8_moves_the_bytes_of_the_int8_file(net_file: Net) -> None:
    as_if = kernels.at(kernels.count(net_file("fp32")).kernels, "int8")
    real = kernels.count(net_file("int8")).kernels
    assert [k.multiply_adds for k in as_if] == [k.multiply_adds for k in real]
    total = sum(sum(k.read) + k.written for k in as_if)
    assert total == pytest.approx(sum(sum(k.read) + k.written for k in real), rel=0.1)
    assert kernels.precision_of(as_if) == kernels.precision_of(real) == "int8"


def test_count_fixed_batch_is_per_image(net_file: Net, tmp_path: Path) -> None:
    model = onnx.load(net_file("fp32"))
    dynamic = kernels.count(model).kernels
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert kernels.count(model).kernels == dynamic


def test_count_broken_file_or_open_size_is_refused(net_file: Net, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(net_file("fp32").read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="not a valid ONNX file"):
        kernels.count(broken)
    open_size = onnx.load(net_file("fp32"))
    for dim in open_size.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.Clear()
        dim.dim_param = "side"
    with pytest.raises(InputError, match="fixed"):
        kernels.count(open_size)


def test_count_int4_weights_have_half_a_byte_and_an_unknown_product(tmp_path: Path) -> None:
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [4, 3, 3, 3], [1] * 108)
    scale = onnx.numpy_helper.from_array(np.float32(0.5), "scale")
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["w", "scale"], ["weight"]),
        onnx.helper.make_node("Conv", ["x", "weight"], ["y"], pads=[1, 1, 1, 1]),
    ]
    tensors = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, channels, 8, 8])
        for name, channels in (("x", 3), ("y", 4))
    )
    graph = onnx.helper.make_graph(nodes, "g", *([entry] for entry in tensors), [weight, scale])
    (kernel,) = kernels.count(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    ).kernels
    assert (kernel.weights, kernel.dtype) == (54, kernels.UNKNOWN)
