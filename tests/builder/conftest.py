"""ONNX files with sidecars in three precisions, and one real plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from rtresnet.builder import engine
from rtresnet.builder.nodes import NetworkNode
from rtresnet.core.sidecar import Profile, Sidecar
from tests import published

Publish = Callable[[onnx.ModelProto, Path, str], Sidecar]


@pytest.fixture(scope="session")
def publish() -> Publish:
    """publish(model, path, "int8"): an ONNX file and a sidecar that matches it."""
    return published.publish


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """onnx_file("resnet8", "int8", size=32): a published file. Read only."""
    pytest.importorskip("onnxruntime")
    return published.maker(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def plan(onnx_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real INT8 plan of resnet8, built with TensorRT-RTX. Read only."""
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path_factory.mktemp("plan") / "resnet8-int8.plan"
    engine.build(
        onnx_file("resnet8", "int8"), path, profiles=[Profile(min=1, opt=4, max=8)], builder="rtx"
    )
    return path


def _tensor(name: str, dtype: str, shape: str = "-1,16,32,32") -> str:
    return (
        f"{{ Name: {name}, Dimensions: [{shape}], Strides: [16384,1,512,16], "
        f"StrideOrder: [3,0,2,1], Datatype: {dtype}, Format: (NHWC) Channel major format }}"
    )


def dumped(
    kind: str, dtypes: list[str], origins: list[str], name: str = "l_myl0_1", out: str = "Float"
) -> str:
    """Return one line as TensorRT-RTX 1.7.1 writes it."""
    inputs = ", ".join(_tensor(f"__mye{i}_myl0", dtype) for i, dtype in enumerate(dtypes))
    metadata = "".join(f"[ONNX Layer: {origin}]" for origin in origins)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], "
        f"Constants: [ {_tensor('w', 'Half', '16,16,3,3')}, {_tensor('b', 'Float', '1,16,1,1')}], "
        f"Outputs: [ {_tensor('out', out)}], TacticName: __myelin_CASK_STUB, StreamId: 0, "
        f"Metadata: {metadata}"
    )


def dump(*lines: str) -> str:
    """Return the log message around such lines."""
    return (
        "Layers:\nName: __mye1421_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], "
        "Outputs: [], TacticName: , StreamId: 0, Metadata: \n"
        + "\n".join(lines)
        + "\n\nI/O Tensors:\n Name: images, IOMode: Input, DataType: Float, Dimensions: "
        "[-1,3,32,32], Location: Device, IsShapeInferenceIO: false\n\n"
        "Engine Metadata:\n Multi-Device: Disabled\n"
    )


def nodes_of(**operations: str) -> dict[str, NetworkNode]:
    """Return nodes by name, with _ for . and without the stage: layer1_0_conv1="conv"."""
    results = {}
    for key, operation in operations.items():
        name = key.replace("_", ".")
        parts = name.split(".")
        inside = parts[0].startswith("layer")
        results[name] = NetworkNode(
            name=name,
            operation=operation,
            stage=parts[0] if inside else "stem",
            block=".".join(parts[:2]) if inside else "stem",
            dtype="FLOAT",
        )
    return results


@pytest.fixture(scope="session")
def fake() -> SimpleNamespace:
    """fake.dump(fake.dumped(...)): a layer dump; fake.nodes_of(...): the nodes it speaks of."""
    return SimpleNamespace(dump=dump, dumped=dumped, nodes_of=nodes_of)
