from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rtresnet.builder import engine, layers
from rtresnet.builder.nodes import NetworkNode
from rtresnet.core.errors import CheckFailedError
from rtresnet.core.sidecar import Attestation, Profile, Sidecar

OnnxFile = Callable[..., Path]
PROFILE = Profile(min=1, opt=4, max=8)


@pytest.fixture
def dump(fake: SimpleNamespace) -> Any:
    return fake.dump


@pytest.fixture
def dumped(fake: SimpleNamespace) -> Any:
    return fake.dumped


@pytest.fixture
def read(fake: SimpleNamespace) -> Callable[..., Attestation | None]:
    return lambda text, **operations: read_with(text, fake.nodes_of(**operations))


def read_with(text: str, nodes: dict[str, NetworkNode]) -> Attestation | None:
    return layers.verify_precision(layers.read_dump(text, nodes), nodes)


def test_convolutions_are_counted_by_the_type_of_their_kernels_input(
    dump: Any, dumped: Any, read: Any
) -> None:
    text = dump(
        dumped("kgen", ["Float"], ["conv1", "conv1.weight.dq"], out="Int8"),
        dumped("correlation", ["Int8"], ["conv1", "images.dq", "conv1.weight.dq"]),
        dumped("kgen", ["Float"], ["conv1", "relu.q"], out="Int8"),
        dumped("correlation", ["Int8", "Float"], ["layer1.0.conv1", "relu.dq"]),
        dumped("correlation", ["Half"], ["layer1.0.conv2"]),
        dumped("gemm", ["Int8"], ["fc", "flatten.dq"]),
    )
    result = read(text, conv1="conv", layer1_0_conv1="conv", layer1_0_conv2="conv", fc="matmul")
    assert result == Attestation(
        convolutions=3,
        dtypes={"Int8": 2, "Half": 1},
        layers=6,
        stages={"stem": {"Int8": 1}, "layer1": {"Int8": 1, "Half": 1}},
        adds=0,
        unfused_adds=(),
        requantizes=2,
        reformats=0,
        rounds=(),
        activations=(),
    )


@pytest.mark.parametrize("kind", layers.MYELIN_KERNELS)
def test_a_1x1_convolution_may_run_as_a_matrix_product(
    kind: str, dump: Any, dumped: Any, read: Any
) -> None:
    result = read(dump(dumped(kind, ["Half"], ["layer1.0.conv3"])), layer1_0_conv3="conv")
    assert result is not None and result.dtypes == {"Half": 1}


def test_a_layer_around_a_convolution_attests_nothing(dump: Any, dumped: Any, read: Any) -> None:
    result = read(dump(dumped("kgen", ["Int8"], ["conv1"])), conv1="conv")
    assert result is not None and result.dtypes == {layers.UNKNOWN: 1}


def test_two_convolutions_in_one_kernel_both_count(dump: Any, dumped: Any, read: Any) -> None:
    text = dump(dumped("correlation", ["Half"], ["layer1.conv1", "layer1.down"]))
    result = read(text, layer1_conv1="conv", layer1_down="conv")
    assert result is not None and result.dtypes == {"Half": 2}


def test_a_name_that_only_begins_alike_is_another_convolution(
    dump: Any, dumped: Any, read: Any
) -> None:
    result = read(dump(dumped("correlation", ["Int8"], ["conv1"])), conv1="conv", conv10="conv")
    assert result is not None and result.dtypes == {"Int8": 1, layers.UNKNOWN: 1}


def test_a_constant_does_not_attest_its_convolution(dump: Any, dumped: Any, read: Any) -> None:
    result = read(dump(dumped("correlation", [], ["conv1"])), conv1="conv")
    assert result is not None and result.dtypes == {layers.UNKNOWN: 1}


@pytest.mark.parametrize("text", ["", "Layers:\n", "Layers:\nnothing of the kind\n"])
def test_no_dump_attests_nothing(text: str, read: Any) -> None:
    assert read(text, conv1="conv") is None


def test_an_add_is_fused_where_a_kernel_names_it_in_every_profile(
    dump: Any, dumped: Any, read: Any
) -> None:
    kernel = ["layer1.0.conv2", "layer1.0.add"]
    both = [dumped("correlation", ["Half"], kernel, f"c_myl{graph}_1") for graph in (0, 1)]
    second = dumped("kgen", ["Half"], ["layer1.0.add"], "__myl_Add [profile 1]_myl1_2")
    marker = dumped("kgen", ["Half"], [], "__myl_Mean [profile 1]_myl1_3")
    nodes = {"layer1_0_conv2": "conv", "layer1_0_add": "add"}
    result = read(dump(*both, marker), **nodes)
    assert result is not None and (result.adds, result.unfused_adds) == (1, ())
    alone = dumped("correlation", ["Half"], ["layer1.0.conv2"], "c_myl1_1")
    result = read(dump(both[0], alone, second), **nodes)
    assert result is not None and result.unfused_adds == ("layer1.0.add",)


def test_a_convolution_counts_with_the_widest_type_of_all_profiles(
    dump: Any, dumped: Any, read: Any
) -> None:
    text = dump(
        dumped("correlation", ["Int8"], ["conv1"], "c_myl0_1"),
        dumped("correlation", ["Float"], ["conv1"], "c [profile 1]_myl1_1"),
    )
    result = read(text, conv1="conv")
    assert result is not None and result.dtypes == {"Float": 1}
    assert result.layers == 1, "the layers of the first profile"


@pytest.mark.parametrize(
    ("name", "size", "precision", "dtype"),
    [
        ("resnet8", 32, "fp32", "Float"),
        ("resnet8", 32, "fp16", "Half"),
        ("resnet8", 32, "int8", "Int8"),
        ("resnet18", 64, "fp16", "Half"),
    ],
)
def test_a_real_engine_is_attested_by_stage(
    name: str, size: int, precision: str, dtype: str, onnx_file: OnnxFile, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    source = onnx_file(name, precision, size)
    sidecar = engine.build(source, tmp_path / "n.plan", profiles=[PROFILE], builder="rtx")
    assert sidecar.plan is not None
    result = sidecar.plan.attested
    assert result is not None and result.stages is not None
    sizes = {"resnet8": [1, 2, 2, 2], "resnet18": [1, 4, 5, 5, 5]}[name]
    stages = ["stem", *(f"layer{n}" for n in range(1, len(sizes)))]
    assert result.stages == {s: {dtype: n} for s, n in zip(stages, sizes, strict=True)}
    assert result.adds == {"resnet8": 3, "resnet18": 8}[name]
    assert result.activations and result.activations[0] > 8 * 3 * size * size
    if name == "resnet18":  # shortcuts are convolutions there, and all Adds fuse
        assert result.unfused_adds == () and result.requantizes == 0
    if precision == "int8":
        assert result.requantizes and result.requantizes >= result.convolutions


def float_conv(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.name == "layer2.0.conv2")
    node.input[0] = node.input[0].removesuffix(".dq")


def test_what_the_gate_catches_is_named(
    onnx_file: OnnxFile, publish: Callable[..., Sidecar], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = onnx.load(onnx_file("resnet8", "int8"))
    float_conv(model)
    publish(model, tmp_path / "one.onnx", "int8")
    with pytest.raises(
        CheckFailedError, match=r"of 7 convolutions 1 run in Float \(layer2\.0\.conv2\)"
    ):
        engine.build(tmp_path / "one.onnx", tmp_path / "n.plan", profiles=[PROFILE], builder="rtx")


def test_a_quantizer_between_add_and_relu_shows(
    onnx_file: OnnxFile, publish: Callable[..., Sidecar], tmp_path: Path
) -> None:
    """Accepted by the builder without a word: the Add no longer ends where the ReLU does."""
    pytest.importorskip("tensorrt_rtx")
    good = onnx.load(onnx_file("resnet8", "fp16"))
    bad = onnx.load(onnx_file("resnet8", "fp16"))
    for node in list(bad.graph.node):
        if node.name.endswith(".add"):
            made = f"{node.name}.out"
            scale, zero = f"{made}.scale", f"{made}.zero"
            half = numpy_helper.from_array(np.float16(0.05), scale)
            bad.graph.initializer.append(half)
            bad.graph.initializer.append(numpy_helper.from_array(np.int8(0), zero))
            follower = next(n for n in bad.graph.node if node.output[0] in n.input)
            at = list(bad.graph.node).index(follower)
            pair = [
                helper.make_node("QuantizeLinear", [node.output[0], scale, zero], [f"{made}.q"],
                                 name=f"{made}.q"),
                helper.make_node("DequantizeLinear", [f"{made}.q", scale, zero], [f"{made}.dq"],
                                 name=f"{made}.dq"),
            ]  # fmt: skip
            for index, name in enumerate(follower.input):
                if name == node.output[0]:
                    follower.input[index] = f"{made}.dq"
            for offset, extra in enumerate(pair):
                bad.graph.node.insert(at + offset, extra)
    results = {}
    for name, model in (("good", good), ("bad", bad)):
        publish(model, tmp_path / f"{name}.onnx", "fp16")
        sidecar = engine.build(
            tmp_path / f"{name}.onnx", tmp_path / f"{name}.plan", profiles=[PROFILE], builder="rtx"
        )
        assert sidecar.plan is not None and sidecar.plan.attested is not None
        results[name] = sidecar.plan.attested
    assert results["bad"].dtypes == results["good"].dtypes
    assert results["good"].rounds == ()
    assert results["bad"].rounds == tuple(f"layer{n}.0.add.out.q" for n in (1, 2, 3))
