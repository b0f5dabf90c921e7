from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rtresnet.bench import kernels, profile, roofline
from rtresnet.builder import engine
from rtresnet.cli.main import main
from rtresnet.core import hardware
from rtresnet.core.sidecar import Profile
from rtresnet.runtime import profilers

Net = Callable[..., Path]
BLOCKS = {"conv1": "stem", "layer1.0.conv1": "layer1.0", "layer1.0.add": "layer1.0", "fc": "head"}


@pytest.mark.parametrize(
    ("ran", "node"),
    [
        ("conv1", "conv1"), ("conv1_nchwc", "conv1"), ("conv1_token_2", "conv1"),
        ("InsertedPrecisionFreeCast_layer1.0.conv1_nchwc", "layer1.0.conv1"),
        ("layer1.0.conv1 + PWN(layer1.0.add)", "layer1.0.conv1"),
        ("__myl_Conv_0x12 [layer1.0.add\x1ffc]", "layer1.0.add"),
        ("fused conv1", "conv1"), ("layer1.0.conv1_U4_myl0_4", "layer1.0.conv1"),
        ("layer1.0.conv1 [profile 1]_U94_myl1_5", "layer1.0.conv1"), ("fc_myl0_51", "fc"),
        ("ReorderOutput_token_7", None), ("", None), ("conv10", None),
    ],
)  # fmt: skip
def test_recognize_name_after_fusion_returns_the_node(ran: str, node: str | None) -> None:
    assert profile.recognize(ran, BLOCKS) == node


def test_engine_blocks_of_a_layer_of_several_nodes_takes_the_most_common_block() -> None:
    layers = {
        "__myl_MulAddRelu_myl0_6": ("layer1.0.conv1", "layer1.0.add", "conv1"),
        "__mye15733_myl0_13": (),
        "__myl_Move_myl0_1": ("elsewhere",),
    }
    assert profile.engine_blocks(layers, BLOCKS) == {"__myl_MulAddRelu_myl0_6": "layer1.0"}


def test_layers_of_unrecognized_node_counts_with_the_previous_block() -> None:
    run = [("Transpose", "Transpose", 1.0), ("conv1", "Conv", 2.0), ("ReorderOutput", "R", 3.0),
           ("fc", "Gemm", 4.0)]  # fmt: skip
    layers = profile.layers_of([run, run, run], BLOCKS)
    assert [layer.block for layer in layers] == ["stem", "stem", "stem", "head"]
    assert [layer.recognized for layer in layers] == [False, True, False, True]


@pytest.mark.parametrize(
    ("ms", "other", "compute", "memory", "bound"),
    [
        (10, 0, 8, 2, "compute"), (10, 0, 2, 8, "memory"), (10, 0, 1, 2, "overhead"),
        (10, 6, 4, 1, "overhead"),
    ],
)  # fmt: skip
def test_bound_by_returns_what_explains_the_time(
    ms: float, other: float, compute: float, memory: float, bound: str
) -> None:
    assert profile.bound_by(ms, other, compute, memory) == bound


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "nameless"])
def test_profile_of_onnx_runtime_adds_up_by_block(net_file: Net, precision: str) -> None:
    pytest.importorskip("onnxruntime")
    path = net_file(precision)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    recorded = profilers.record_onnx(path, images, seconds=0.01, threads=1)
    assert len(recorded.runs) == len(recorded.whole) >= profilers.MIN_RUNS
    counted = kernels.count(path)
    gpu = roofline.find_gpu("T4")
    profiled = profile.profile(
        recorded.runs, recorded.whole, counted.kernels, counted.blocks,
        batch=2, roof=gpu.rates,
    )  # fmt: skip
    assert [part.name for part in profiled.blocks] == list(
        dict.fromkeys(kernel.block for kernel in counted.kernels)
    )
    assert all(part.ms > 0 for part in profiled.blocks)
    for parts in (profiled.blocks, profiled.stages):
        assert sum(part.ms for part in parts) == pytest.approx(profiled.total)
        assert sum(part.share for part in parts) == pytest.approx(1)
        assert sum(part.flops for part in parts) == 4 * sum(
            kernel.multiply_adds for kernel in counted.kernels
        )
    assert profiled.unrecognized < 0.5
    assert profiled.agrees == (abs(profiled.total - profiled.whole) <= 0.1 * profiled.whole)
    if precision == "int8":
        ran, of = profiled.int8_products or (0, 0)
        assert of == sum(k.dtype == "int8" for k in counted.kernels) and 0 < ran <= of
    else:
        assert profiled.int8_products is None


def test_profile_sum_unlike_the_whole_does_not_agree(net_file: Net) -> None:
    counted = kernels.count(net_file("fp32"))
    run = [(kernel.name, kernel.op, 1.0) for kernel in counted.kernels]
    total = float(len(run))
    for whole, agrees in ((total, True), (1.2 * total, False), (0.8 * total, False)):
        profiled = profile.profile(
            [run], [whole], counted.kernels, counted.blocks, batch=1, roof=None
        )
        assert profiled.agrees is agrees
        assert all(part.bound is None for part in profiled.blocks)


def test_profile_command_shows_and_writes_blocks(
    net_file: Net,
    tmp_path: Path,
    brief_measurements: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "p.json"
    arguments = ["profile", str(net_file("int8")), "--seconds", "0.1", "--json", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for words in ("stem", "layer3.0", "head", "layers add up to", "Roof:", "Slowest layers:"):
        assert words in shown
    result = json.loads(out.read_text())["result"]
    assert ("NOTE: these differ" in shown) == (not result["agrees"])
    assert result["precision"] == "int8" and result["roof"]["int8"] > 0
    assert main(["profile", str(net_file("int8")), "--seconds", "-1"]) == 2
    assert main(["profile", str(tmp_path / "none.onnx")]) == 2


def test_profile_command_plan_without_gpu_exits_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], without_gpu: None
) -> None:
    (tmp_path / "a.plan").write_bytes(b"vtrt")
    assert main(["profile", str(tmp_path / "a.plan")]) == 3
    assert "on a CPU use" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_profile_of_a_real_rtx_plan_gives_every_block_its_time(
    precision: str,
    net_file: Net,
    tmp_path: Path,
    with_gpu: hardware.Gpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorrt_rtx")
    plan, out = tmp_path / "net.plan", tmp_path / "p.json"
    engine.build(net_file(precision), plan, profiles=[Profile(min=1, opt=8, max=8)], builder="rtx")
    layers = json.loads((tmp_path / "net.plan.layers.json").read_text())["layers"]
    run = [(layer["name"], "", 1.0) for layer in layers]
    recorded = profilers.Recorded(
        runs=[run], whole=[float(len(run))], device=with_gpu.name, provider="TensorRT-RTX",
        threads=None, versions={},
    )  # fmt: skip
    monkeypatch.setattr(profilers, "record_plan", lambda *_, **__: recorded)
    assert main(["profile", str(plan), "--json", str(out)]) == 0
    result = json.loads(out.read_text())["result"]
    assert all(block["ms"] > 0 for block in result["blocks"])
    unnamed = [layer["name"] for layer in layers if not layer["nodes"]]
    assert [la["name"] for la in result["layers"] if not la["recognized"]] == unnamed
    expected = {la["name"]: la["block"] for la in layers if la["nodes"]}
    assert {la["name"]: la["block"] for la in result["layers"] if la["recognized"]} == expected


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt"])
def test_trt_profiler_is_accepted_by_the_real_api(module: str) -> None:
    trt = pytest.importorskip(module)
    keeper = profilers.profiler(trt)
    assert isinstance(keeper, trt.IProfiler)
    keeper.report_layer_time("layer1.0.conv1 + layer1.0.relu1", 0.25)
    assert keeper.layers == [("layer1.0.conv1 + layer1.0.relu1", "", 0.25)]
    assert isinstance(trt.IExecutionContext.profiler, property)


@pytest.mark.gpu
@pytest.mark.skipif(not hardware.gpus(), reason="no GPU")
def test_trt_profile_on_a_gpu_layers_add_up(net_file: Net, tmp_path: Path) -> None:
    plan = tmp_path / "net.plan"
    builder = "tensorrt" if hardware.installed("tensorrt") else "rtx"
    engine.build(net_file("fp16"), plan, profiles=[Profile(min=1, opt=8, max=8)], builder=builder)
    images = np.zeros((8, 3, 32, 32), np.float32)
    recorded = profilers.record_plan(plan, images, seconds=1)
    counted = kernels.count(net_file("fp16"))
    layers = profile.layers_of(recorded.runs, counted.blocks)
    assert {layer.block for layer in layers} >= {"layer1.0", "layer2.0", "layer3.0"}
