from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import rtresnet
from rtresnet.exporter.fold import fold
from rtresnet.exporter.verify import check_folded, check_parity, operations
from rtresnet.exporter.writer import INPUT, OPSET, OUTPUT, to_onnx
from rtresnet.models.resnet import ResNet

onnxruntime = pytest.importorskip("onnxruntime")

Exported = Callable[..., tuple[ResNet, onnx.ModelProto]]
Forward = Callable[[np.ndarray], np.ndarray]


def run(model: onnx.ModelProto) -> Forward:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run([OUTPUT], {INPUT: images})[0]  # type: ignore[no-any-return]


def random_images(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet8", 32, {}),
        ("resnet8", 48, {"shortcut": "B"}),
        ("resnet14", 32, {"shortcut": "C"}),
        ("resnet8", 33, {}),
        ("plain8", 32, {}),
        ("resnet18", 64, {}),
        ("resnet18", 64, {"shortcut": "A"}),
        ("plain18", 64, {}),
        ("resnet50", 64, {}),
        ("resnet50", 64, {"stride_in": "1x1"}),
        ("resnet50", 65, {"shortcut": "A"}),
    ],
)
def test_every_family_agrees_with_torch(
    name: str, size: int, options: dict[str, str], exported: Exported
) -> None:
    net, model = exported(name, size, **options)
    check_folded(model)
    parity = check_parity(net, run(model), size=size)
    assert parity["relative"] <= max(2e-5, 20 * parity["rounding"])


@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("resnet50", 64)])
def test_nodes_and_weights_are_named_as_in_the_net(
    name: str, size: int, exported: Exported
) -> None:
    net, model = exported(name, size)
    modules = dict(net.named_modules())
    weighted = {n for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)}
    nodes = {node.name: node for node in model.graph.node}
    assert len(nodes) == len(model.graph.node)
    assert {n for n, node in nodes.items() if node.op_type in ("Conv", "Gemm")} == weighted
    parameters = {t.name: list(t.dims) for t in model.graph.initializer if t.data_type == 1}
    assert parameters == {
        f"{n}.{kind}": list(modules[n].weight.shape[: None if kind == "weight" else 1])
        for n in weighted
        for kind in ("weight", "bias")
    }
    for node in model.graph.node:
        assert node.name.removesuffix(".subsample") in modules
        expected = OUTPUT if node.name == "fc" else node.name
        assert list(node.output) == [expected]
        if node.op_type in ("Conv", "Gemm"):
            assert list(node.input[1:]) == [f"{node.name}.weight", f"{node.name}.bias"]


def test_resnet50_has_the_operations_of_the_paper(exported: Exported) -> None:
    _, model = exported("resnet50", 64)
    assert operations(model) == {
        "Conv": 53,
        "Relu": 49,
        "Add": 16,
        "MaxPool": 1,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }


def test_resnet20_has_the_operations_of_the_paper(exported: Exported) -> None:
    _, model = exported("resnet20", 32)
    assert operations(model) == {
        "Conv": 19,
        "Relu": 19,
        "Add": 9,
        "Slice": 2,
        "Pad": 2,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }


def test_a_plain_net_has_no_addition(exported: Exported) -> None:
    _, model = exported("plain8", 32)
    assert operations(model)["Add"] == 0
    assert operations(model)["Conv"] == 7


@pytest.mark.parametrize(("name", "size"), [("resnet8", 32), ("resnet18", 64)])
def test_rows_of_any_batch_equal_the_same_rows_alone(
    name: str, size: int, exported: Exported
) -> None:
    forward = run(exported(name, size)[1])
    images = random_images(5, size)
    alone = np.concatenate([forward(images[index : index + 1]) for index in range(5)])
    assert alone.shape == (5, 10 if name == "resnet8" else 1000)
    for count in (1, 3, 5):
        np.testing.assert_allclose(
            forward(images[:count]), alone[:count], rtol=0, atol=1e-5 * np.abs(alone).max()
        )


def test_the_signature_is_float_images_to_float_logits_with_a_dynamic_batch(
    exported: Exported,
) -> None:
    _, model = exported("resnet8", 32)
    (source,), (result,) = model.graph.input, model.graph.output
    assert (source.name, result.name) == (INPUT, OUTPUT)
    assert [d.dim_param or d.dim_value for d in source.type.tensor_type.shape.dim] == [
        "batch", 3, 32, 32,
    ]  # fmt: skip
    assert [d.dim_param or d.dim_value for d in result.type.tensor_type.shape.dim] == ["batch", 10]
    assert source.type.tensor_type.elem_type == TensorProto.FLOAT
    assert result.type.tensor_type.elem_type == TensorProto.FLOAT
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]


def test_every_tensor_has_an_inferred_shape(exported: Exported) -> None:
    _, model = exported("resnet8", 32)
    shapes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.value_info}
    made = {out for node in model.graph.node for out in node.output} - {OUTPUT}
    assert made <= set(shapes)
    assert [d.dim_value for d in shapes["layer3.0.add"]][1:] == [64, 8, 8]


def test_no_path_and_no_metadata_leak_into_the_file(exported: Exported) -> None:
    _, model = exported("resnet8", 32)
    data = model.SerializeToString()
    for place in (Path(rtresnet.__file__).parent, Path(torch.__file__).parent, Path.home()):
        assert str(place).encode() not in data
    assert b".py" not in data
    assert model.producer_name == "rtresnet"
    assert [entry.key for entry in model.metadata_props] == ["rtresnet.norms"]
    assert not model.doc_string and not model.graph.doc_string
    assert not any(n.metadata_props or n.doc_string for n in model.graph.node)


def test_the_file_holds_the_folded_weights_bit_for_bit(make_net: Callable[..., ResNet]) -> None:
    folded = fold(make_net("resnet8"))
    model = to_onnx(folded, size=32, name="resnet8")
    state = folded.state_dict()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), state[tensor.name].numpy())


def test_an_unknown_module_is_refused_by_name(make_net: Callable[..., ResNet]) -> None:
    net = make_net("resnet8")
    net.layer2[0].relu1 = nn.GELU()  # type: ignore[index]
    with pytest.raises(TypeError, match=r"GELU.*layer2\.0\.relu1"):
        to_onnx(fold(net), size=32, name="odd")


def test_an_unknown_function_is_refused_by_name() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flatten = nn.Flatten(1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.flatten(x))

    with pytest.raises(TypeError, match="tanh"):
        to_onnx(fold(Doubled()), size=4, name="odd")


def test_groups_and_dilation_of_a_convolution_are_folded_and_written() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=2, dilation=2, groups=3, bias=False)
            self.bn = nn.BatchNorm2d(6)
            self.flatten = nn.Flatten()
            self.fc = nn.Linear(6 * 64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.flatten(self.bn(self.conv(x))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net = Grouped().eval()
    net.bn.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 8, 8)
    model = to_onnx(fold(net), size=8, name="grouped")
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        assert np.allclose(logits, net(images).numpy(), atol=1e-5)
