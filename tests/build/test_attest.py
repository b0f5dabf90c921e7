from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from rtresnet.artifacts import Attestation, Profile
from rtresnet.build import attest, engine
from rtresnet.build.attest import read_dump


def tensor(name: str, dtype: str) -> str:
    return (
        f"{{ Name: {name}, Dimensions: [-1,16,32,32], Strides: [16384,1,512,16], "
        f"StrideOrder: [3,0,2,1], Datatype: {dtype}, Format: (NHWC) Channel major format }}"
    )


def layer(kind: str, dtypes: list[str], origins: list[str], name: str = "l") -> str:
    """One line as TensorRT-RTX 1.7.1 writes it."""
    inputs = ", ".join(tensor(f"__mye{i}_myl0", dtype) for i, dtype in enumerate(dtypes))
    metadata = "".join(f"[ONNX Layer: {origin}]" for origin in origins)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], "
        f"Constants: [ {tensor('w', 'Half')}, {tensor('b', 'Float')}], "
        f"Outputs: [ {tensor('out', 'Float')}], TacticName: __myelin_CASK_STUB, StreamId: 0, "
        f"Metadata: {metadata}"
    )


def dump(*layers: str) -> str:
    return (
        "Layers:\nName: __mye1421_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], "
        "Outputs: [], TacticName: , StreamId: 0, Metadata: \n"
        + "\n".join(layers)
        + "\n\nI/O Tensors:\n Name: images, IOMode: Input, DataType: Float, Dimensions: "
        "[-1,3,32,32], Location: Device, IsShapeInferenceIO: false\n\n"
        "Engine Metadata:\n Multi-Device: Disabled\n"
    )


def test_convolutions_are_counted_by_the_type_of_their_kernels_input() -> None:
    text = dump(
        layer("kgen", ["Float"], ["images.q", "conv1", "conv1.weight.dq"]),
        layer("correlation", ["Int8"], ["conv1", "images.dq", "conv1.weight.dq"]),
        layer("kgen", ["Float"], ["conv1", "relu.q"]),
        layer("correlation", ["Int8", "Float"], ["layer1.0.conv1", "relu.dq"]),
        layer("correlation", ["Half"], ["layer1.0.conv2"]),
        layer("gemm", ["Int8"], ["fc", "flatten.dq"]),
    )
    found = read_dump(text, ["conv1", "layer1.0.conv1", "layer1.0.conv2"])
    assert found == Attestation(convolutions=3, dtypes={"Int8": 2, "Half": 1}, layers=7)


@pytest.mark.parametrize("kind", attest.KERNELS)
def test_a_1x1_convolution_may_run_as_a_matrix_product(kind: str) -> None:
    found = read_dump(dump(layer(kind, ["Half"], ["layer1.0.conv3"])), ["layer1.0.conv3"])
    assert found is not None and found.dtypes == {"Half": 1}


def test_a_layer_around_a_convolution_attests_nothing() -> None:
    found = read_dump(dump(layer("kgen", ["Int8"], ["conv1"])), ["conv1"])
    assert found is not None and found.dtypes == {attest.UNKNOWN: 1}


def test_two_convolutions_in_one_kernel_both_count() -> None:
    found = read_dump(
        dump(layer("correlation", ["Half"], ["a.conv1", "a.downsample.0"])),
        ["a.conv1", "a.downsample.0"],
    )
    assert found is not None and found.dtypes == {"Half": 2}


def test_a_name_that_only_begins_alike_is_another_convolution() -> None:
    found = read_dump(dump(layer("correlation", ["Int8"], ["conv1"])), ["conv1", "conv10"])
    assert found is not None and found.dtypes == {"Int8": 1, attest.UNKNOWN: 1}


def test_a_constant_does_not_attest_its_convolution() -> None:
    found = read_dump(dump(layer("correlation", [], ["conv1"])), ["conv1"])
    assert found is not None and found.dtypes == {attest.UNKNOWN: 1}


@pytest.mark.parametrize("text", ["", "Layers:\n", "Layers:\nnothing of the kind\n"])
def test_no_dump_attests_nothing(text: str) -> None:
    assert read_dump(text, ["conv1"]) is None


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", "Float"), ("fp16", "Half"), ("int8", "Int8")]
)
def test_a_real_dump_names_every_convolution(
    precision: str,
    dtype: str,
    onnx_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorrt_rtx")
    seen: list[tuple[str, list[str]]] = []

    def read(text: str, convolutions: list[str]) -> Attestation | None:
        seen.append((text, convolutions))
        return read_dump(text, convolutions)

    monkeypatch.setattr(attest, "read_dump", read)
    engine.build(
        onnx_file("resnet8", precision),
        tmp_path / "net.plan",
        profiles=[Profile(min=1, opt=4, max=8)],
        builder="rtx",
    )
    ((text, convolutions),) = seen
    assert text.startswith("Layers:\n")
    assert convolutions == [
        "conv1",
        *(f"layer{stage}.0.conv{i}" for stage in (1, 2, 3) for i in (1, 2)),
    ]
    found = read_dump(text, convolutions)
    assert found is not None
    assert dataclasses.replace(found, layers=0) == Attestation(
        convolutions=7, dtypes={dtype: 7}, layers=0
    )
    assert found.layers == text.count("LayerType: ") > 7
