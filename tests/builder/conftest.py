"""ONNX files with sidecars in three precisions, and one real plan, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from rtresnet.builder import engine
from rtresnet.builder.nodes import Node
from rtresnet.core import artifacts
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Profile, Sidecar, Weights
from rtresnet.exporter.fold import fold
from rtresnet.exporter.writer import to_onnx
from rtresnet.models import checkpoint, zoo
from rtresnet.quantization import calibrate, fp16, qdq

Publish = Callable[[onnx.ModelProto, Path, str], Sidecar]


def publish_file(model: onnx.ModelProto, path: Path, precision: str, size: int = 32) -> Sidecar:
    """Writes a model with the sidecar of the net that its graph is named after."""
    spec = zoo.spec(model.graph.name)
    return artifacts.publish(
        path,
        lambda temporary: temporary.write_bytes(model.SerializeToString()),
        Sidecar(
            kind="onnx",
            file=path.name,
            model=checkpoint.model_of(spec),
            input=Preprocess.for_size(size),
            weights=Weights(origin="untrained"),
            precision=precision,
            measured={"parity": {"n": 3}},
        ),
    )


@pytest.fixture(scope="session")
def publish() -> Publish:
    """publish(model, path, "int8"): an ONNX file and a sidecar that matches it."""
    return publish_file


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """onnx_file("resnet8", "int8", size=32): a published file. Read only."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def make(name: str, precision: str, size: int = 32) -> Path:
        torch.manual_seed(0)
        net = zoo.build(zoo.spec(name))
        with torch.no_grad():
            for norm in net.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.bias.normal_(0, 0.2)
        model = to_onnx(fold(net.eval()), size=size, name=name)
        if precision == "fp16":
            model = fp16.to_half(model)
        elif precision == "int8":
            rng = np.random.default_rng(0)
            images = rng.standard_normal((8, 3, size, size)).astype(np.float32)
            tensors = list(qdq.placement(model))
            scales = calibrate.calibrate(model, tensors, lambda: [images], "max").scales
            model = qdq.insert(model, scales)
        path = folder / f"{name}-{precision}.onnx"
        publish_file(model, path, precision, size)
        return path

    return make


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
    """One line as TensorRT-RTX 1.7.1 writes it."""
    inputs = ", ".join(_tensor(f"__mye{i}_myl0", dtype) for i, dtype in enumerate(dtypes))
    metadata = "".join(f"[ONNX Layer: {origin}]" for origin in origins)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], "
        f"Constants: [ {_tensor('w', 'Half', '16,16,3,3')}, {_tensor('b', 'Float', '1,16,1,1')}], "
        f"Outputs: [ {_tensor('out', out)}], TacticName: __myelin_CASK_STUB, StreamId: 0, "
        f"Metadata: {metadata}"
    )


def dump(*lines: str) -> str:
    """The log message around such lines."""
    return (
        "Layers:\nName: __mye1421_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], "
        "Outputs: [], TacticName: , StreamId: 0, Metadata: \n"
        + "\n".join(lines)
        + "\n\nI/O Tensors:\n Name: images, IOMode: Input, DataType: Float, Dimensions: "
        "[-1,3,32,32], Location: Device, IsShapeInferenceIO: false\n\n"
        "Engine Metadata:\n Multi-Device: Disabled\n"
    )


def nodes_of(**operations: str) -> dict[str, Node]:
    """nodes_of(layer1_0_conv1="conv"): nodes by name, _ for . and the stage out of the name."""
    found = {}
    for key, operation in operations.items():
        name = key.replace("_", ".")
        parts = name.split(".")
        inside = parts[0].startswith("layer")
        found[name] = Node(
            name=name,
            operation=operation,
            stage=parts[0] if inside else "stem",
            block=".".join(parts[:2]) if inside else "stem",
            dtype="FLOAT",
        )
    return found


@pytest.fixture(scope="session")
def fake() -> SimpleNamespace:
    """fake.dump(fake.dumped(...)): a layer dump; fake.nodes_of(...): the nodes it speaks of."""
    return SimpleNamespace(dump=dump, dumped=dumped, nodes_of=nodes_of)
