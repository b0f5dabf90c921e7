"""Parsing of the engine inspector's JSON, as NVIDIA documents it and public engines have it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rtresnet.builder import engine, inspector, layers, targets
from rtresnet.builder.layers import UNKNOWN, Layer
from rtresnet.core import artifacts, hardware, plan_info
from rtresnet.core.errors import CheckFailedError
from rtresnet.core.hardware import Gpu
from rtresnet.core.sidecar import Profile, Sidecar

OnnxFile = Callable[..., Path]
INT8 = "Thirty-two wide channel vectorized row major Int8 format"
HALF = "Channel major FP16 format where channel % 8 == 0"
DYNAMIC = "N/A due to dynamic shapes"
WORDS = {"Float": "Row major linear FP32", "Half": HALF, "Int8": INT8}


def tensor(format_: str, name: str = "t") -> dict[str, Any]:
    return {"Name": name, "Location": "Device", "Dimensions": [8, 16, 32, 32],
            "Format/Datatype": format_}  # fmt: skip


def kernel(
    name: str, format_: str = INT8, kind: str = "CaskConvolution", **more: Any
) -> dict[str, Any]:
    """Return an entry as TensorRT 10 writes it of a convolution."""
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [tensor(format_)],
        "Outputs": [tensor(format_)],
        "ParameterType": "Convolution",
        "Weights": {"Type": "Int8", "Count": 2304},
        "Bias": {"Type": "Float", "Count": 16},
        "TacticName": "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32",
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in name.split(" + ")),
    } | more


def text(*entries: Any) -> str:
    return json.dumps({"Layers": entries, "Bindings": ["images", "logits"]})


@pytest.fixture
def read(fake: SimpleNamespace) -> Callable[..., tuple[Layer, ...]]:
    """read(text, ..., conv1="conv"): the layers, one text per profile."""
    return lambda *texts, **nodes: inspector.read_inspector(texts, fake.nodes_of(**nodes))


@pytest.fixture
def types(fake: SimpleNamespace) -> Callable[..., dict[str, str]]:
    """types(text, ..., conv1="conv"): the type that each convolution is computed in."""

    def find(*texts: str, **nodes: str) -> dict[str, str]:
        reference = fake.nodes_of(**nodes)
        return layers.kernel_types(inspector.read_inspector(texts, reference), reference)

    return find


@pytest.mark.parametrize(
    "kind", ["CaskConvolution", "CaskGemmConvolution", "CaskJitConv", "correlation", "gemm"]
)
def test_read_inspector_knows_what_computes_a_convolution(kind: str, types: Any) -> None:
    assert types(text(kernel("conv1", kind=kind)), conv1="conv") == {"conv1": "Int8"}


@pytest.mark.parametrize(
    ("format_", "weights", "computed"),
    [
        (INT8, "Int8", "Int8"), ("Int8", "Int8", "Int8"), (HALF, "Half", "Half"),
        ("Half(64,1:8,8)", "Half", "Half"), ("Row major linear FP32", "Float", "Float"),
        ("Row major linear BF16", "BFloat16", "BFloat16"),
        ("Row major linear FP8 format", "FP8", "FP8"),
        # int8 goes in, is converted, and multiplied as floats
        (INT8, "Float", "Float"), (INT8, "Half", "Half"),
        # weights that are known do not tell what comes in
        (DYNAMIC, "Int8", UNKNOWN), ("Some new layout", "Int8", UNKNOWN), (INT8, "?", UNKNOWN),
    ],
)  # fmt: skip
def test_read_inspector_takes_the_wider_of_inputs_and_weights(
    format_: str, weights: str, computed: str, types: Any
) -> None:
    entry = kernel("conv1", format_, Weights={"Type": weights, "Count": 2304})
    assert types(text(entry), conv1="conv") == {"conv1": computed}


def test_read_inspector_reads_weights_of_myelin_from_its_constants(types: Any) -> None:
    entry = kernel("conv1", "Int8", kind="correlation")
    del entry["Weights"], entry["Bias"]
    scales, weights = tensor("Float"), tensor("Half") | {"Dimensions": [64, 64, 3, 3]}
    scales["Dimensions"] = [1, 64, 1, 1]
    assert types(text(entry), conv1="conv") == {"conv1": "Int8"}
    entry["Constants"] = [scales, weights]
    assert types(text(entry), conv1="conv") == {"conv1": "Half"}


def test_read_inspector_separates_datatype_from_format(types: Any) -> None:
    entry = kernel("conv1")
    entry["Inputs"] = [{"Name": "t", "Datatype": "Int8", "Format": "NHWC"}]
    assert types(text(entry), conv1="conv") == {"conv1": "Int8"}


@pytest.mark.parametrize("separator", ["\x1e", "\x1f", " "])
def test_read_inspector_maps_all_nodes_of_a_fused_layer(separator: str, read: Any) -> None:
    origins = separator.join(["[ONNX Layer: layer1.0.conv2]", "[ONNX Layer: layer1.0.add]"])
    entry = json.dumps({"Layers": [kernel("x", Metadata=origins)]})
    unescaped = entry.replace("\\u001e", "\x1e").replace("\\u001f", "\x1f")  # as TensorRT writes
    for written in (entry, unescaped):
        (layer,) = read(written, layer1_0_conv2="conv", layer1_0_add="add")
        assert layer.nodes == ("layer1.0.conv2", "layer1.0.add")
        assert (layer.role, layer.block, layer.operation) == ("conv", "layer1.0", "conv + add")


def test_read_inspector_without_metadata_takes_the_name(read: Any) -> None:
    entry = kernel("layer1.0.conv1 + PWN(layer1.0.relu1) || other", Metadata="")
    (layer,) = read(text(entry), layer1_0_conv1="conv", layer1_0_relu1="relu")
    assert layer.nodes == ("layer1.0.conv1", "layer1.0.relu1")


def test_read_inspector_gives_every_layer_its_role(read: Any) -> None:
    result = read(
        text(
            kernel("Reformatting CopyNode for Input Tensor 0 to conv1", "Row major linear FP32",
                   kind="Reformat", Outputs=[tensor(INT8)], Metadata=""),
            kernel("conv1 + relu"),
            kernel("maxpool", kind="CaskPooling"),
            kernel("copy", kind="NoOp"),
            kernel("PWN(layer1.0.add)", HALF, kind="PointWiseV2", Outputs=[tensor(INT8)]),
            kernel("Reformatting CopyNode for Output Tensor 0 to fc", HALF, kind="Reformat",
                   Metadata=""),
            kernel("region", HALF, kind="fusion", Metadata="[ONNX Layer: fc]",
                   TacticName="sm80_xmma_gemm_f16f16_f16f32_f16_tn"),
            kernel("tail", HALF, kind="fusion", Metadata="", TacticName="pointwise"),
        ),
        conv1="conv", relu="relu", maxpool="pool", layer1_0_add="add", fc="matmul",
    )  # fmt: skip
    roles = [layer.role for layer in result]
    assert roles == ["requantize", "conv", "pool", "idle", "requantize", "reformat", "matmul",
                     "pointwise"]  # fmt: skip
    assert result[1].weights == 2304 + 4 * 16
    assert layers.verify_precision(result, {}) is not None


def test_read_inspector_takes_each_profiles_layers_from_its_own_text(types: Any) -> None:
    first, second = kernel("conv1"), kernel("conv1 [profile 1]", Metadata="[ONNX Layer: conv1]")
    unset = {"Inputs": [tensor(DYNAMIC)]}
    assert types(text(first, second | unset), text(first | unset, second), conv1="conv") == {
        "conv1": "Int8"
    }
    wide = second | {"Inputs": [tensor(HALF)]}
    assert types(text(first, wide | unset), text(first | unset, wide), conv1="conv") == {
        "conv1": "Half"
    }
    assert types(text(first, second | unset), text(first, second | unset), conv1="conv") == {
        "conv1": UNKNOWN
    }


@pytest.mark.parametrize(
    "output", ["", "no JSON", "[]", '{"Layers": null}', text("conv1", "relu"), text()]
)
def test_read_inspector_of_what_it_cannot_read_is_empty(output: str, read: Any) -> None:
    assert read(output, conv1="conv") == ()


class FakeEngine:
    """Engine, context and inspector at once, and what was called in which order."""

    num_io_tensors = 2

    def __init__(self, context: bool = True) -> None:
        self.calls: list[Any] = []
        self._context = context

    def get_tensor_name(self, index: int) -> str:
        return ("images", "logits")[index]

    def get_tensor_mode(self, name: str) -> str:
        return {"images": "in", "logits": "out"}[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(batch, 3, 32, 32) for batch in ((1, 8, 32), (1, 1, 1))[profile]]

    def create_engine_inspector(self) -> FakeEngine:
        return self

    def create_execution_context(self) -> FakeEngine | None:
        return self if self._context else None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.calls.append(("profile", profile, stream))
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.calls.append((name, shape))
        return True

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "execution_context":
            self.calls.append("execution_context")
        super().__setattr__(name, value)

    def get_engine_information(self, format_: str) -> str:
        self.calls.append(format_)
        return text()


def fake_trt(opened: Any) -> Any:
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: opened)
    return SimpleNamespace(
        __name__="tensorrt", __version__="11.4.0", Runtime=lambda logger: runtime,
        TensorIOMode=SimpleNamespace(INPUT="in"), LayerInformationFormat=SimpleNamespace(JSON="js"),
    )  # fmt: skip


def test_inspect_engine_sets_profile_and_shapes_before_it_asks() -> None:
    opened = FakeEngine()
    assert len(inspector.inspect_engine(fake_trt(opened), None, str, b"", 2)) == 2
    assert opened.calls == [
        ("profile", 0, 0), ("images", (8, 3, 32, 32)), "execution_context", "js",
        ("profile", 1, 0), ("images", (1, 3, 32, 32)), "execution_context", "js",
    ]  # fmt: skip


def test_inspect_engine_without_memory_for_a_context_asks_all_the_same() -> None:
    opened = FakeEngine(context=False)
    assert inspector.inspect_engine(fake_trt(opened), None, str, b"", 1) == (text(),)
    assert opened.calls == ["js"]


def test_inspect_engine_that_does_not_open_says_nothing() -> None:
    assert inspector.inspect_engine(fake_trt(None), None, str, b"", 1) == ()


# Whole builds: TensorRT-RTX builds, and an inspector describes what it built.


def as_inspector(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the layers of a layer file in the inspector's form."""
    kinds = {"correlation": "CaskConvolution", "maxpool": "CaskPooling"}

    def tensors(listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"Name": t["name"], "Dimensions": t["shape"],
             "Format/Datatype": WORDS.get(t["dtype"], t["dtype"])}
            for t in listed
        ]  # fmt: skip

    return [
        {
            "Name": layer["name"],
            "LayerType": kinds.get(layer["kind"], layer["kind"]),
            "Inputs": tensors(layer["inputs"]),
            "Outputs": tensors(layer["outputs"]),
            "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in layer["nodes"]),
        }
        for layer in layers
    ]


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Sidecar]:
    """described(source, change): a build by "tensorrt" whose inspector's entries are changed."""
    trt = pytest.importorskip("tensorrt_rtx")

    class AsTensorRT(ModuleType):
        __version__ = "11.4.0.106"

        def __getattr__(self, name: str) -> Any:
            if name in ("ComputeCapability", "IRuntimeCache"):
                raise AttributeError(name)
            return getattr(trt, name)

    def build(source: Path, change: Callable[[dict[str, Any]], None]) -> Sidecar:
        options: dict[str, Any] = {"profiles": [Profile(min=1, opt=4, max=8)]}
        engine.build(source, tmp_path / "rtx.plan", builder="rtx", **options)
        saved = json.loads(layers.path_for(tmp_path / "rtx.plan").read_text())["layers"]
        entries = as_inspector(saved)
        for entry in entries:
            change(entry)
        with monkeypatch.context() as patch:
            gpu = Gpu(name="NVIDIA H100", capability=(9, 0), memory=1)
            patch.setattr(hardware, "gpus", lambda: (gpu,))
            patch.setattr(targets, "builder", lambda choice: AsTensorRT("tensorrt"))
            patch.setattr(plan_info, "parse_header", lambda head: None)
            patch.setattr(inspector, "inspect_engine", lambda *_: (text(*entries),))
            return engine.build(source, tmp_path / "n.plan", builder="tensorrt", **options)

    return build


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_build_with_tensorrt_attests_what_the_inspector_says(
    precision: str, onnx_file: OnnxFile, described: Callable[..., Sidecar], tmp_path: Path
) -> None:
    sidecar = described(onnx_file("resnet8", precision), lambda entry: None)
    rtx = artifacts.read_sidecar(tmp_path / "rtx.plan")
    assert sidecar.plan is not None and rtx is not None and rtx.plan is not None
    assert sidecar.plan.attested is not None and sidecar.plan.attested == rtx.plan.attested
    loaded = layers.load(tmp_path / "n.plan", sidecar)
    theirs = layers.load(tmp_path / "rtx.plan", rtx)
    assert [layer.block for layer in loaded.layers] == [layer.block for layer in theirs.layers]
    different = {"computes": None, "kind": "", "weights": 0, "name": ""}
    assert [dataclasses.replace(layer, **different) for layer in loaded.layers] == [  # type: ignore[arg-type]
        dataclasses.replace(layer, **different)  # type: ignore[arg-type]
        for layer in theirs.layers
    ]


def float_weights(entry: dict[str, Any]) -> None:
    if "[ONNX Layer: layer2.0.conv2]" in entry["Metadata"]:
        entry["Weights"] = {"Type": "Float", "Count": 9}


def no_type(entry: dict[str, Any]) -> None:
    if "[ONNX Layer: layer2.0.conv2]" in entry["Metadata"]:
        for end in entry["Inputs"]:
            end["Format/Datatype"] = DYNAMIC


@pytest.mark.parametrize(
    ("change", "output"),
    [(float_weights, "1 run in Float"), (no_type, "1 are in no kernel of a known type")],
)
def test_build_with_tensorrt_refuses_a_convolution_that_is_not_attested(
    change: Any, output: str, onnx_file: OnnxFile, described: Callable[..., Sidecar], tmp_path: Path
) -> None:
    with pytest.raises(CheckFailedError, match=rf"{output} \(layer2\.0\.conv2\)") as caught:
        described(onnx_file("resnet8", "int8"), change)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "n.plan").exists()


def test_build_with_tensorrt_whose_inspector_tells_no_types_is_written_and_not_attested(
    onnx_file: OnnxFile, described: Callable[..., Sidecar]
) -> None:
    def nothing(entry: dict[str, Any]) -> None:
        for end in (*entry["Inputs"], *entry["Outputs"]):
            end["Format/Datatype"] = DYNAMIC

    plan = described(onnx_file("resnet8", "int8"), nothing).plan
    assert plan is not None and plan.attested is not None
    assert plan.attested.dtypes == {UNKNOWN: 7} and plan.attested.rounds == ()
