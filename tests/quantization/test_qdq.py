"""Each numbered rule of `rtresnet/quantization/qdq.py`: where Q/DQ pairs are inserted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtresnet.core.errors import ArtifactError
from rtresnet.quantization.number_formats import quantize_weight, weight_scales
from rtresnet.quantization.qdq import Use, insert, placement
from tests.onnx_outputs import run_logits, run_model

pytest.importorskip("onnxruntime")

Exported = Callable[..., onnx.ModelProto]
Images = Callable[..., np.ndarray]

# Option A, option B with basic blocks, with bottlenecks, option C, and no shortcut at all.
NETS = [
    ("resnet8", 32, {}),
    ("resnet18", 64, {}),
    ("resnet50", 64, {}),
    ("resnet14", 32, {"shortcut": "C"}),
    ("plain8", 32, {}),
]
every_net = pytest.mark.parametrize(
    ("name", "size", "options"), NETS, ids=[" ".join([n, *o.values()]) for n, _, o in NETS]
)


class Graph:
    """A model's nodes and constants by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.producers = {out: node for node in self.nodes for out in node.output}
        self.constants = {t.name: t for t in model.graph.initializer}
        self.inputs = {value.name for value in model.graph.input}
        self.outputs = {value.name for value in model.graph.output}

    def of(self, *types: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in types]

    def is_float(self, tensor: str) -> bool:
        """Whether a tensor comes straight from a float operation, not from a DequantizeLinear."""
        return tensor in self.inputs or self.producers[tensor].op_type != "DequantizeLinear"

    def origin(self, tensor: str) -> str:
        """Return the float tensor behind a Q/DQ pair."""
        dequantize = self.producers[tensor]
        assert dequantize.op_type == "DequantizeLinear", tensor
        quantize = self.producers[dequantize.input[0]]
        assert quantize.op_type == "QuantizeLinear", tensor
        return quantize.input[0]

    def array(self, name: str) -> np.ndarray:
        return np.asarray(numpy_helper.to_array(self.constants[name]))


def any_scales(model: onnx.ModelProto) -> dict[str, float]:
    return dict.fromkeys(placement(model), 0.05)


def with_initializer(model: onnx.ModelProto, name: str, value: np.ndarray) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = next(t for t in changed.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    return changed


@every_net
def test_rule_1_the_data_of_every_convolution_and_gemm_is_quantized(
    name: str, size: int, options: dict[str, str], exported: Exported, quantized: Exported
) -> None:
    before = Graph(exported(name, size, **options))
    after = Graph(quantized(name, size, **options))
    weighted = after.of("Conv", "Gemm")
    assert [n.name for n in weighted] == [n.name for n in before.of("Conv", "Gemm")]
    for old, new in zip(before.of("Conv", "Gemm"), weighted, strict=True):
        assert after.origin(new.input[0]) == old.input[0]


def shortcut_of(add: str, before: Graph) -> str:
    """Return the shortcut of an Add, according to its name."""
    block = add.removesuffix(".add")
    for projection in (f"{block}.downsample.0", f"{block}.downsample"):
        if projection in before.producers:
            return projection
    first = next(node for node in before.nodes if node.name == f"{block}.conv1")
    return first.input[0]


@every_net
@pytest.mark.parametrize("swapped", [False, True])
def test_rule_2_of_an_addition_only_the_shortcut_is_quantized(
    name: str, size: int, options: dict[str, str], swapped: bool, exported: Exported
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported(name, size, **options))
    if swapped:
        for node in model.graph.node:
            if node.op_type == "Add":
                node.input[:] = reversed(node.input)
    before, after = Graph(model), Graph(insert(model, any_scales(model)))
    additions = after.of("Add")
    assert len(additions) == {"resnet8": 3, "resnet18": 8, "resnet50": 16, "resnet14": 6}.get(
        name, 0
    )
    last = "conv3" if name == "resnet50" else "conv2"
    for add in additions:
        main, shortcut = reversed(add.input) if swapped else add.input
        assert main == f"{add.name.removesuffix('.add')}.{last}"
        assert after.origin(shortcut) == shortcut_of(add.name, before)


def test_rule_2_an_addition_without_a_common_origin_is_refused() -> None:
    weight = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, 4, 4]) for n in "abc"]
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Conv", ["a", "w"], ["d"], name="conv"),
                helper.make_node("Add", ["d", "b"], ["c"], name="odd"),
            ],
            "odd",
            values[:2],
            values[2:],
            [weight],
        )
    )
    with pytest.raises(ArtifactError, match="odd"):
        placement(model)


@every_net
def test_rule_3_a_tensor_is_quantized_once_and_shared(
    name: str, size: int, options: dict[str, str], exported: Exported, quantized: Exported
) -> None:
    places = placement(exported(name, size, **options))
    after = Graph(quantized(name, size, **options))
    sources = [node.input[0] for node in after.of("QuantizeLinear")]
    assert len(sources) == len(set(sources)) == len(places)
    assert set(sources) == set(places)
    readers = Counter(
        (after.origin(tensor), Use(node=node.name, index=index))
        for node in after.of("Conv", "Gemm", "Add")
        for index, tensor in enumerate(node.input)
        if tensor in after.producers
        and after.producers[tensor].op_type == "DequantizeLinear"
        and after.producers[tensor].input[0] in after.producers
    )
    assert readers == Counter((tensor, use) for tensor, uses in places.items() for use in uses)


def test_rule_3_an_identity_shortcut_shares_with_the_convolution(exported: Exported) -> None:
    places = placement(exported("resnet8", 32))
    assert places["relu"] == [
        Use(node="layer1.0.conv1", index=0),
        Use(node="layer1.0.add", index=1),
    ]


@every_net
def test_rule_4_relu_reads_its_producer_and_the_logits_are_float(
    name: str, size: int, options: dict[str, str], quantized: Exported
) -> None:
    graph = Graph(quantized(name, size, **options))
    for node in graph.of("Relu"):
        assert graph.producers[node.input[0]].op_type in ("Conv", "Add")
    (logits,) = graph.outputs
    assert graph.producers[logits].op_type == "Gemm"
    assert not any(logits in node.input for node in graph.nodes)


@every_net
def test_nothing_but_the_pairs_is_changed(
    name: str, size: int, options: dict[str, str], exported: Exported, quantized: Exported
) -> None:
    model, result = exported(name, size, **options), quantized(name, size, **options)
    rest = [n for n in result.graph.node if n.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    for old, new in zip(model.graph.node, rest, strict=True):
        assert (old.name, old.op_type, list(old.output)) == (
            new.name,
            new.op_type,
            list(new.output),
        )
        assert list(old.attribute) == list(new.attribute)
        assert list(old.input) == [tensor.removesuffix(".dq") for tensor in new.input]
        if new.op_type not in ("Conv", "Gemm", "Add"):
            assert list(old.input) == list(new.input)
    assert list(result.graph.input) == list(model.graph.input)
    assert list(result.graph.output) == list(model.graph.output)


def test_the_source_is_not_changed(exported: Exported) -> None:
    model = exported("resnet8", 32)
    before = model.SerializeToString(deterministic=True)
    insert(model, any_scales(model))
    assert model.SerializeToString(deterministic=True) == before


@every_net
def test_rule_5_activations_are_symmetric_int8_with_a_written_zero_point(
    name: str, size: int, options: dict[str, str], quantized: Exported
) -> None:
    graph = Graph(quantized(name, size, **options))
    for node in graph.of("QuantizeLinear", "DequantizeLinear"):
        assert len(node.input) == 3, node.name
        zero = graph.constants[node.input[2]]
        assert zero.data_type == TensorProto.INT8
        assert not numpy_helper.to_array(zero).any()
    for quantize in graph.of("QuantizeLinear"):
        (reader,) = (n for n in graph.nodes if quantize.output[0] in n.input)
        assert reader.op_type == "DequantizeLinear"
        assert list(reader.input[1:]) == list(quantize.input[1:])


@every_net
def test_rule_6_scales_of_activations_have_rank_0(
    name: str, size: int, options: dict[str, str], quantized: Exported
) -> None:
    graph = Graph(quantized(name, size, **options))
    for node in graph.of("QuantizeLinear"):
        for constant in node.input[1:]:
            assert list(graph.constants[constant].dims) == [], constant
        scale = graph.constants[node.input[1]]
        assert scale.data_type == TensorProto.FLOAT
        assert numpy_helper.to_array(scale) > 0


@every_net
def test_rule_7_weights_are_int8_constants_behind_a_dequantize_alone(
    name: str, size: int, options: dict[str, str], exported: Exported, quantized: Exported
) -> None:
    before = Graph(exported(name, size, **options))
    after = Graph(quantized(name, size, **options))
    for node in after.of("Conv", "Gemm"):
        dequantize = after.producers[node.input[1]]
        assert dequantize.op_type == "DequantizeLinear"
        weight, scale, zero = (after.array(constant) for constant in dequantize.input)
        (axis,) = (a.i for a in dequantize.attribute if a.name == "axis")
        assert axis == 0
        assert weight.dtype == np.int8 and zero.dtype == np.int8
        assert np.abs(weight.astype(int)).max() == 127
        assert scale.shape == zero.shape == (len(weight),)
        original = before.array(f"{node.name}.weight")
        column = scale.reshape(-1, *[1] * (weight.ndim - 1))
        assert (np.abs(weight * column - original) <= column * 0.5001).all()


@every_net
def test_rule_8_biases_stay_float(
    name: str, size: int, options: dict[str, str], exported: Exported, quantized: Exported
) -> None:
    before = Graph(exported(name, size, **options))
    after = Graph(quantized(name, size, **options))
    for node in after.of("Conv", "Gemm"):
        assert node.input[2] == f"{node.name}.bias"
        bias = after.array(node.input[2])
        assert bias.dtype == np.float32
        np.testing.assert_array_equal(bias, before.array(node.input[2]))


@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("resnet18", 64)])
def test_int8_logits_are_near_those_of_fp32(
    name: str, size: int, exported: Exported, quantized: Exported, images: Images
) -> None:
    batch = images(8, size)
    reference = run_logits(exported(name, size), batch)
    error = np.linalg.norm(run_logits(quantized(name, size), batch) - reference)
    assert 1e-4 < error / np.linalg.norm(reference) < 0.1


def test_int8_weights_take_a_quarter_of_the_bytes(exported: Exported, quantized: Exported) -> None:
    ratio = quantized("resnet18", 64).ByteSize() / exported("resnet18", 64).ByteSize()
    assert 0.25 < ratio < 0.26


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e-50, 1e39])
def test_a_scale_that_cannot_be_used_is_refused_with_its_tensor(
    exported: Exported, scale: float
) -> None:
    model = exported("resnet8", 32)
    with pytest.raises(ArtifactError, match=r"layer2\.0\.relu1.*calibrate"):
        insert(model, any_scales(model) | {"layer2.0.relu1": scale})


def test_a_missing_scale_is_refused_with_its_tensor(exported: Exported) -> None:
    model = exported("resnet8", 32)
    scales = any_scales(model)
    del scales["images"]
    with pytest.raises(ArtifactError, match="images"):
        insert(model, scales)


def test_a_quantized_file_is_refused(quantized: Exported) -> None:
    model = quantized("resnet8", 32)
    with pytest.raises(ArtifactError, match="already quantized"):
        placement(model)
    with pytest.raises(ArtifactError, match="already quantized"):
        insert(model, {})


def test_a_file_without_a_convolution_is_refused() -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["logits"])],
        "nothing",
        [value("images", TensorProto.FLOAT, [1, 3, 2, 2])],
        [value("logits", TensorProto.FLOAT, [1, 12])],
    )
    with pytest.raises(ArtifactError, match="no convolution"):
        placement(helper.make_model(graph))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-30])
def test_a_channel_of_next_to_nothing_gets_a_positive_scale(
    exported: Exported, images: Images, largest: float
) -> None:
    model = exported("resnet8", 32)
    name = "layer1.0.conv1.weight"
    weight = Graph(model).array(name).copy()
    weight[3] = 0
    weight[3, 0, 0, 0] = largest
    model = with_initializer(model, name, weight)
    after = insert(model, any_scales(model))
    scales = Graph(after).array(f"{name}.scale")
    assert (scales > 0).all() and np.isfinite(scales).all()
    stored = Graph(after).array(name)
    assert np.abs(stored[3] * scales[3] - weight[3]).max() <= 0.51 * scales[3]
    assert not stored[3].ravel()[1:].any()
    assert np.isfinite(run_logits(after, images(2, 32))).all()


def test_weights_round_half_to_even_and_stop_at_127() -> None:
    weight = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 200, -200, -127.4]], np.float32)
    rounded = quantize_weight(weight, np.ones(1, np.float32))
    assert rounded.dtype == np.int8
    assert rounded.tolist() == [[0, 2, 2, 0, -2, 127, -127, -127]]


def test_weight_scales_are_the_largest_magnitude_of_each_channel() -> None:
    weight = np.zeros((3, 2, 1, 1), np.float32)
    weight[0, 1], weight[1, 0] = -2.54, 1.27
    scales = weight_scales(weight)
    assert scales.dtype == np.float32
    np.testing.assert_allclose(scales, [0.02, 0.01, 1], rtol=1e-6)
    assert quantize_weight(weight, scales)[:, :, 0, 0].tolist() == [[0, -127], [127, 0], [0, 0]]


def test_weights_are_rounded_as_quantize_linear_rounds() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 8, 3, 3)).astype(np.float32)
    scales = weight_scales(weight)
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=0)],
        "oracle",
        [helper.make_tensor_value_info("w", TensorProto.FLOAT, weight.shape)],
        [helper.make_tensor_value_info("q", TensorProto.INT8, weight.shape)],
        [
            numpy_helper.from_array(scales, "s"),
            numpy_helper.from_array(np.zeros(16, np.int8), "z"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    expected = run_model(model, {"w": weight})[0]
    np.testing.assert_array_equal(quantize_weight(weight, scales), expected)
