"""Real builds. No GPU is needed: TensorRT-RTX builds without one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rtresnet.builder import engine, preflight, targets
from rtresnet.core import artifacts, atomic_io, hardware, plan_info
from rtresnet.core.artifacts import read_sidecar, sidecar_path
from rtresnet.core.errors import ArtifactError, CheckFailedError, InputError, UnavailableError
from rtresnet.core.hardware import Gpu
from rtresnet.core.sidecar import Attestation, Profile, Sidecar, Weights
from rtresnet.quantization import half

trt = pytest.importorskip("tensorrt_rtx")

PROFILE = Profile(min=1, opt=4, max=8)
OnnxFile = Callable[..., Path]
Publish = Callable[[onnx.ModelProto, Path, str], Sidecar]


def build(source: Path, out: Path, **options: object) -> Sidecar:
    return engine.build(
        source,
        out,
        **{"profiles": [PROFILE], "builder": "rtx"} | options,  # type: ignore[arg-type]
    )


def refused(source: Path, error: type[Exception] = ArtifactError) -> str:
    """Build a file that must be rejected; return the message. No file may be left behind."""
    out = source.parent / "plans" / "refused.plan"
    with pytest.raises(error) as caught:
        build(source, out)
    assert not out.parent.exists() or not list(out.parent.iterdir())
    assert str(source) in str(caught.value)
    return str(caught.value)


def changed(path: Path) -> onnx.ModelProto:
    return onnx.load(path)


def foreign(
    nodes: list[onnx.NodeProto],
    shape: list[int | str],
    classes: list[int | str],
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """Return another tool's file with a convolution of 3 to 4 channels."""
    weight = np.ones((4, 3, 3, 3), helper.tensor_dtype_to_np_dtype(dtype)) / 27
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("images", dtype, shape)],
        [helper.make_tensor_value_info("logits", dtype, classes)],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


CONVOLUTION = [
    helper.make_node("Conv", ["images", "weight"], ["c"], name="conv"),
    helper.make_node("GlobalAveragePool", ["c"], ["p"], name="pool"),
    helper.make_node("Flatten", ["p"], ["logits"], name="flatten"),
]


@pytest.mark.parametrize(
    ("name", "size", "precision", "dtype", "convolutions"),
    [
        ("resnet8", 32, "fp32", "Float", 7),
        ("resnet8", 32, "fp16", "Half", 7),
        ("resnet8", 32, "int8", "Int8", 7),
        ("resnet18", 64, "int8", "Int8", 20),
    ],
)
def test_a_plan_comes_with_a_sidecar_that_tells_all(
    name: str,
    size: int,
    precision: str,
    dtype: str,
    convolutions: int,
    onnx_file: OnnxFile,
    tmp_path: Path,
) -> None:
    source, out = onnx_file(name, precision, size), tmp_path / "plans" / f"{name}.plan"
    returned = build(source, out)
    parent, sidecar = read_sidecar(source), artifacts.verify(out)
    assert parent is not None and sidecar is not None
    assert sidecar == returned
    assert (sidecar.kind, sidecar.file, sidecar.precision) == ("plan", out.name, precision)
    assert sidecar.bytes == out.stat().st_size
    assert (sidecar.model, sidecar.input, sidecar.weights) == (
        parent.model,
        parent.input,
        parent.weights,
    )
    assert sidecar.measured == {}, "what was measured of the ONNX file is not of the plan"
    plan = sidecar.plan
    assert plan is not None
    assert (plan.builder, plan.version) == ("tensorrt_rtx", trt.__version__)
    assert plan.profiles == (PROFILE,)
    assert 0 < plan.seconds < 60
    assert plan.attested is not None
    assert plan.attested.convolutions == convolutions
    assert plan.attested.dtypes == {dtype: convolutions}
    head = plan_info.read_header(out)
    assert head is not None and head.targets == plan.targets
    assert set(plan.targets) >= {"sm_80", "sm_86", "sm_89", "sm_120"}
    assert [path.name for path in sorted(out.parent.iterdir())] == [
        out.name,
        f"{out.name}.json",
        f"{out.name}.layers.json",
    ]


def test_the_parent_link_leads_to_the_onnx_file(onnx_file: OnnxFile, tmp_path: Path) -> None:
    source, out = onnx_file("resnet8", "fp16"), tmp_path / "elsewhere" / "net.plan"
    sidecar = build(source, out)
    assert sidecar.parent is not None
    assert sidecar.parent.sha256 == atomic_io.sha256(source)
    result = artifacts.parent_path(out, sidecar)
    assert result is not None and result.samefile(source)
    assert [state for _, _, state in artifacts.chain(out)] == ["ok", "ok"]


def test_chosen_targets_are_those_of_the_plan(onnx_file: OnnxFile, tmp_path: Path) -> None:
    out = tmp_path / "net.plan"
    sidecar = build(onnx_file("resnet8", "fp16"), out, target=("sm_120", "sm_86"))
    head = plan_info.read_header(out)
    assert sidecar.plan is not None and head is not None
    assert set(sidecar.plan.targets) == set(head.targets) == {"sm_86", "sm_120"}


class AsTensorRT(ModuleType):
    """TensorRT-RTX without what only it has, which leaves TensorRT's interface."""

    __version__ = "11.4.0.106"

    def __getattr__(self, name: str) -> Any:
        if name in ("ComputeCapability", "IRuntimeCache"):
            raise AttributeError(name)
        return getattr(trt, name)


@pytest.fixture
def as_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are built by TensorRT on an H100, as far as the code can tell."""
    gpu = Gpu(name="NVIDIA H100", capability=(9, 0), memory=1)
    monkeypatch.setattr(hardware, "gpus", lambda: (gpu,))
    monkeypatch.setattr(targets, "builder", lambda choice: AsTensorRT("tensorrt"))
    monkeypatch.setattr(plan_info, "parse_header", lambda head: None)


@pytest.mark.usefixtures("as_tensorrt")
def test_build_with_tensorrt_records_the_gpu_it_is_for(onnx_file: OnnxFile, tmp_path: Path) -> None:
    plan = build(onnx_file("resnet8", "fp16"), tmp_path / "n.plan", builder="tensorrt").plan
    assert plan is not None
    assert (plan.builder, plan.version, plan.targets) == ("tensorrt", "11.4.0.106", ("sm_90",))


@pytest.mark.parametrize("tf32", [True, False])
def test_build_records_tf32_and_tells_the_builder(
    tf32: bool, onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[bool] = []
    run = engine.run_builder

    def watched(module: Any, maker: Any, network: Any, config: Any, progress: Any) -> Any:
        flags.append(config.get_flag(trt.BuilderFlag.TF32))
        return run(module, maker, network, config, progress)

    monkeypatch.setattr(engine, "run_builder", watched)
    sidecar = build(onnx_file("resnet8", "fp32"), tmp_path / "n.plan", tf32=tf32)
    assert sidecar.plan is not None
    assert flags == [tf32] and sidecar.plan.tf32 == tf32


@pytest.mark.parametrize("call", ["build", "check"])
def test_builder_that_does_not_start_is_a_lack_of_the_environment(
    call: str, onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorRT fails on a machine whose driver is too old."""

    def fail(logger: Any) -> None:
        logger.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Builder", fail)
    with pytest.raises(UnavailableError, match="failure with error: 35") as caught:
        if call == "build":
            build(onnx_file("resnet8", "fp16"), tmp_path / "n.plan")
        else:
            engine.check(onnx_file("resnet8", "fp16"), builder="rtx")
    assert caught.value.exit_code == 3
    assert caught.value.fix is not None and "r580" in caught.value.fix
    assert not list(tmp_path.iterdir())


def test_several_profiles_are_recorded(onnx_file: OnnxFile, tmp_path: Path) -> None:
    profiles = [PROFILE, Profile(min=16, opt=16, max=16)]
    sidecar = build(onnx_file("resnet8", "fp32"), tmp_path / "net.plan", profiles=profiles)
    assert sidecar.plan is not None and sidecar.plan.profiles == tuple(profiles)


def test_the_phases_are_told(onnx_file: OnnxFile, tmp_path: Path) -> None:
    phases: list[str] = []
    build(onnx_file("resnet8", "fp32"), tmp_path / "net.plan", progress=phases.append)
    assert phases[:2] == ["parse", "build"]
    assert "building engine" in phases[2:], "the builder's own words"


def test_building_anew_replaces_plan_and_sidecar(onnx_file: OnnxFile, tmp_path: Path) -> None:
    out = tmp_path / "net.plan"
    first = build(onnx_file("resnet8", "fp32"), out)
    second = build(onnx_file("resnet8", "fp16"), out)
    assert artifacts.verify(out) == second
    assert second.bytes < first.bytes


def test_scales_of_shape_1_are_caught_by_the_gate(
    onnx_file: OnnxFile, publish: Publish, tmp_path: Path
) -> None:
    """The silent trap: the checker passes, the build passes, the convolutions run in float."""
    model = changed(onnx_file("resnet8", "int8"))
    activations = {n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in activations:
            assert not tensor.dims
            tensor.dims.append(1)
    onnx.checker.check_model(model, full_check=True)
    source = tmp_path / "trap.onnx"
    publish(model, source, "int8")
    message = refused(source, CheckFailedError)
    assert "7 run in Float" in message
    assert CheckFailedError.exit_code == 1


def test_a_file_with_a_false_promise_is_caught_by_the_gate(
    onnx_file: OnnxFile, publish: Publish, tmp_path: Path
) -> None:
    source = tmp_path / "false.onnx"
    publish(changed(onnx_file("resnet8", "fp32")), source, "fp16")
    assert "7 run in Float" in refused(source, CheckFailedError)


def test_one_convolution_left_in_float_is_caught_by_the_gate(
    onnx_file: OnnxFile, publish: Publish, tmp_path: Path
) -> None:
    model = changed(onnx_file("resnet8", "int8"))
    node = next(n for n in model.graph.node if n.name == "layer2.0.conv2")
    node.input[0] = node.input[0].removesuffix(".dq")
    source = tmp_path / "one.onnx"
    publish(model, source, "int8")
    message = refused(source, CheckFailedError)
    assert "of 7 convolutions" in message and "1 run in" in message


def test_an_earlier_plan_survives_a_missed_gate(
    onnx_file: OnnxFile, publish: Publish, tmp_path: Path
) -> None:
    out, source = tmp_path / "net.plan", tmp_path / "false.onnx"
    before = build(onnx_file("resnet8", "fp16"), out)
    publish(changed(onnx_file("resnet8", "fp32")), source, "fp16")
    with pytest.raises(CheckFailedError):
        build(source, out)
    assert artifacts.verify(out) == before


def test_a_truncated_file_is_refused_with_the_parsers_complaint(
    onnx_file: OnnxFile, tmp_path: Path
) -> None:
    data = onnx_file("resnet8", "fp32").read_bytes()
    source = tmp_path / "cut.onnx"
    source.write_bytes(data[: len(data) // 2])
    assert "Failed to parse the ONNX model" in refused(source)


@pytest.mark.parametrize(
    "data", [b"{}", b"hello world, this is no onnx", bytes(100)], ids=["json", "text", "zeros"]
)
def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path, data: bytes) -> None:
    source = tmp_path / "odd.onnx"
    source.write_bytes(data)
    refused(source)


def test_a_graph_without_input_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor("value", TensorProto.FLOAT, [1, 3], [1, 2, 3])
    model = foreign([helper.make_node("Constant", [], ["logits"], value=value)], [1], [1, 3])
    del model.graph.input[:]
    source = tmp_path / "constant.onnx"
    source.write_bytes(model.SerializeToString())
    refused(source)


def test_a_graph_with_a_scalar_output_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceSum", ["images"], ["logits"], keepdims=0)]
    source = tmp_path / "sum.onnx"
    source.write_bytes(foreign(nodes, ["n", 3, 8, 8], []).SerializeToString())
    refused(source)


def test_an_unsupported_operator_is_named_with_its_node(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["images"], ["q", "s", "z"], name="odd_node"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["logits"], name="back"),
    ]
    source = tmp_path / "odd.onnx"
    model = foreign(nodes, ["n", 3, 8, 8], ["n", 3, 8, 8])
    source.write_bytes(model.SerializeToString())
    message = refused(source)
    assert "does not support 1 of its 2 nodes: odd_node (DynamicQuantizeLinear)" in message


def test_every_unsupported_node_is_named_before_anything_is_built(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["images"], ["q", "s", "z"], name="first"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["f"], name="back"),
        helper.make_node("Conv", ["f", "weight"], ["c"], name="conv"),
        helper.make_node("DynamicQuantizeLinear", ["c"], ["q2", "s2", "z2"], name="second"),
        helper.make_node("QLinearConv", ["q2", "s2", "z2", "q2", "s2", "z2", "s2", "z2"], ["q3"],
                         name="third"),
        helper.make_node("DequantizeLinear", ["q3", "s2", "z2"], ["logits"], name="end"),
    ]  # fmt: skip
    source = tmp_path / "odd.onnx"
    model = foreign(nodes, ["n", 3, 8, 8], ["n", 4, 8, 8])
    source.write_bytes(model.SerializeToString())
    message = refused(source)
    for name in ("first (Dyn", "second (Dyn", "third (QLinearConv)"):
        assert name in message


def test_uint8_that_would_be_read_as_int8_is_refused(
    onnx_file: OnnxFile, publish: Publish, tmp_path: Path
) -> None:
    model = changed(onnx_file("resnet8", "int8"))
    activations = {n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in activations:
            tensor.CopyFrom(numpy_helper.from_array(np.array(0, np.uint8), tensor.name))
    del model.graph.value_info[:]
    source = tmp_path / "unsigned.onnx"
    publish(model, source, "int8")
    message = refused(source)
    assert "reads as int8" in message and "rtresnet lint" in message


def test_a_timing_cache_is_refused_where_it_would_do_nothing(
    onnx_file: OnnxFile, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"--timing-cache.*--builder tensorrt"):
        build(onnx_file("resnet8", "fp16"), tmp_path / "n.plan", timing_cache=tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_timing_cache_goes_from_one_build_to_the_next(tmp_path: Path) -> None:
    """The API is the same in both modules; in this one the cache stays empty."""
    maker = trt.Builder(trt.Logger(trt.Logger.ERROR))
    path = tmp_path / "kernels.cache"
    for _ in range(2):
        with engine._timing_cache(maker.create_builder_config(), path):
            pass
        assert path.stat().st_size > 0


def test_unsigned_activations_are_refused_with_the_parsers_reason(
    onnx_file: OnnxFile, publish: Publish, tmp_path: Path
) -> None:
    model = changed(onnx_file("resnet8", "int8"))
    activations = {n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in activations:
            tensor.CopyFrom(numpy_helper.from_array(np.array(128, np.uint8), tensor.name))
    del model.graph.value_info[:]
    source = tmp_path / "unsigned.onnx"
    publish(model, source, "int8")
    message = refused(source)
    assert "Non-zero zero point is not supported" in message
    assert ".q" in message


@pytest.mark.parametrize(
    ("precision", "why"),
    [
        ("fp32", r"no FP32 matrix product for sm_75, which fc needs"),
        ("int8", r"computes INT8 convolutions in FP16 on all of them"),
    ],
)
@pytest.mark.parametrize("targets", [("sm_75",), ("sm_75", "sm_89")])
def test_what_sm_75_refuses_is_told_before_the_build(
    onnx_file: OnnxFile, tmp_path: Path, precision: str, why: str, targets: tuple[str, ...]
) -> None:
    phases: list[str] = []
    out = tmp_path / "net.plan"
    with pytest.raises(InputError, match=rf"{why}; leave sm_75 out.*--fp16"):
        build(onnx_file("resnet8", precision), out, target=targets, progress=phases.append)
    assert phases == ["parse"] and not list(tmp_path.iterdir())


def test_beside_sm_75_int8_is_half_and_the_gate_sees_it(
    onnx_file: OnnxFile, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the refusal above rests on. If this fails, TensorRT-RTX has learned INT8 for sm_75."""
    monkeypatch.setattr(preflight, "check_targets", lambda *_: None)
    source = tmp_path / "half.onnx"
    publish(half.to_half(changed(onnx_file("resnet8", "int8"))), source, "int8")
    with pytest.raises(
        CheckFailedError, match="int8 was requested, but of 7 convolutions 7 run in Half"
    ):
        build(source, tmp_path / "net.plan", target=("sm_75", "sm_89"))
    build(source, tmp_path / "net.plan", target=("sm_89",))


def test_sm_75_takes_fp16(onnx_file: OnnxFile, tmp_path: Path) -> None:
    sidecar = build(onnx_file("resnet8", "fp16"), tmp_path / "net.plan", target=("sm_75",))
    assert sidecar.plan is not None and sidecar.plan.targets == ("sm_75",)


def test_a_failed_build_tells_what_the_builder_said_and_of_which_block(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "check_targets", lambda *_: None)
    out = tmp_path / "net.plan"
    with pytest.raises(
        ArtifactError, match=r"the build failed \(at node fc: matmul in head\).*SM75"
    ):
        build(onnx_file("resnet8", "fp32"), out, target=("sm_75",))
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_match_its_sidecar_is_refused(
    onnx_file: OnnxFile, publish: Publish, tmp_path: Path
) -> None:
    source = tmp_path / "net.onnx"
    publish(changed(onnx_file("resnet8", "fp32")), source, "fp32")
    data = bytearray(source.read_bytes())
    data[-1] ^= 1
    source.write_bytes(data)
    assert "match its sidecar" in refused(source)
    source.write_bytes(data[:-10])
    assert "truncated" in refused(source)


def test_a_broken_sidecar_is_refused(onnx_file: OnnxFile, publish: Publish, tmp_path: Path) -> None:
    source = tmp_path / "net.onnx"
    publish(changed(onnx_file("resnet8", "fp32")), source, "fp32")
    sidecar_path(source).write_text("{")
    assert "not valid JSON" in refused(source)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.onnx", InputError)


def test_a_foreign_file_without_sidecar_builds(tmp_path: Path) -> None:
    source, out = tmp_path / "foreign.onnx", tmp_path / "foreign.plan"
    source.write_bytes(foreign(CONVOLUTION, ["n", 3, 80, 80], ["n", 4]).SerializeToString())
    sidecar = build(source, out)
    assert artifacts.verify(out) == sidecar
    assert sidecar.model.architecture == "unknown"
    assert sidecar.model.classes == ("0", "1", "2", "3")
    assert (sidecar.input.size, sidecar.precision) == (80, "unknown")
    assert sidecar.weights == Weights(
        origin="file", sha256=atomic_io.sha256(source), source=str(source)
    )
    assert sidecar.plan is not None and sidecar.plan.attested is not None
    assert sidecar.plan.attested.dtypes == {"Float": 1}
    assert not sidecar_path(source).exists()
    name = plan_info.read_name_field(out)
    assert name is not None and name.onnx == atomic_io.sha256(source)[:16]


@pytest.mark.parametrize(
    "shape", [["n", 3, 8, 9], ["n", 3, "h", "w"], ["n", 3, 8]], ids=["oblong", "dynamic", "rank 3"]
)
def test_a_foreign_file_of_another_shape_is_refused(tmp_path: Path, shape: list[int | str]) -> None:
    nodes = [helper.make_node("Flatten", ["images"], ["logits"], name="flatten")]
    source = tmp_path / "foreign.onnx"
    source.write_bytes(foreign(nodes, shape, ["n", "classes"]).SerializeToString())
    assert "[N, 3, S, S]" in refused(source)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.UINT8], ids=["half", "uint8"])
def test_a_foreign_file_that_does_not_take_float32_is_refused(tmp_path: Path, dtype: int) -> None:
    """The runtime would hand it float32 bytes and read float32 bytes, without a word."""
    nodes = [
        helper.make_node("Cast", ["images"], ["f"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["f"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["logits"], name="flatten"),
    ]
    model = foreign(nodes, ["n", 3, 8, 8], ["n", 3])
    model.graph.input[0].type.tensor_type.elem_type = dtype
    source = tmp_path / "foreign.onnx"
    source.write_bytes(model.SerializeToString())
    assert "float32" in refused(source).lower()


@pytest.mark.parametrize("batch", [1, 8])
def test_build_of_a_fixed_batch_has_that_profile_only(tmp_path: Path, batch: int) -> None:
    source = tmp_path / "fixed.onnx"
    model = foreign(CONVOLUTION, [batch, 3, 8, 8], [batch, 4])
    source.write_bytes(model.SerializeToString())
    only = Profile(min=batch, opt=batch, max=batch)
    for profiles in ([], [only]):
        sidecar = build(source, tmp_path / "fixed.plan", profiles=profiles)
        assert sidecar.plan is not None and sidecar.plan.profiles == (only,)
    assert f"batch is fixed at {batch}" in refused(source, InputError)


def test_the_sidecar_of_a_plan_is_plain_json(plan: Path) -> None:
    data = json.loads(sidecar_path(plan).read_text())
    sidecar = read_sidecar(plan)
    assert sidecar is not None
    assert data == json.loads(json.dumps(dataclasses.asdict(sidecar)))


BUILD_AFTER_A_FAILURE = """
import gc, sys
from pathlib import Path
from rtresnet.core.sidecar import Profile
from rtresnet.builder import engine
from rtresnet.core.errors import ArtifactError

def fail():
    source = Path(sys.argv[1])
    try:
        engine.build(source, source.with_suffix(".plan"), profiles=[Profile(min=1, opt=1, max=1)],
                     builder="rtx")
    except ArtifactError as error:
        error.itself = error  # a cycle, as test runners and debuggers make

def collecting(trt, make=engine.make_log):
    log = make(trt)
    kept = type(log).log
    type(log).log = lambda self, *message: (gc.collect(), kept(self, *message))
    return log

gc.disable()
fail()
engine.make_log = collecting  # Python may collect at any time; here it does at the worst
fail()
print("twice refused")
"""


def test_a_failed_build_does_not_lock_up_the_next(tmp_path: Path) -> None:
    """A builder destroyed while another is being made waits for itself, for ever."""
    source = tmp_path / "odd.onnx"
    source.write_bytes(b"{}")
    done = subprocess.run(
        [sys.executable, "-c", BUILD_AFTER_A_FAILURE, str(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert done.stdout == "twice refused\n", done.stderr


def test_build_requires_user_allocation_where_the_builder_has_it() -> None:
    """NVIDIA's notes ask for it where a plan's runs are captured into CUDA graphs."""
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    engine.require_user_allocation(trt, config)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    without = SimpleNamespace(BuilderFlag=SimpleNamespace())
    engine.require_user_allocation(without, None)  # `tensorrt` has no such flag


def test_build_configures_user_allocation(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured: list[object] = []
    monkeypatch.setattr(
        engine, "require_user_allocation", lambda module, config: configured.append(module)
    )
    build(onnx_file("resnet8", "fp32"), tmp_path / "net.plan")
    assert configured == [trt]


@pytest.mark.parametrize(
    ("types", "allowed"),
    [
        ({"conv1": "Half", "conv2": "Int8"}, True),  # conv1 was left in float
        ({"conv1": "Int8", "conv2": "Half"}, False),  # as many, but another one
        ({"conv1": "FP8", "conv2": "Int8"}, False),
    ],
)
def test_convolution_in_float_is_allowed_by_its_name(types: dict[str, str], allowed: bool) -> None:
    calibration = SimpleNamespace(kept=("conv1", "add1"), int8=())
    sidecar = cast(Sidecar, SimpleNamespace(precision="int8", calibration=calibration))
    attested = Attestation(layers=2, convolutions=2, dtypes=Counter(types.values()))
    with contextlib.nullcontext() if allowed else pytest.raises(CheckFailedError, match="conv"):
        engine._require_precision(Path("a.onnx"), sidecar, attested, types)
