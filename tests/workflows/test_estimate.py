from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rtresnet.bench import roofline
from rtresnet.builder import layers
from rtresnet.builder.layers import Layer, LayerTensor
from rtresnet.core import artifacts, atomic_io, gpu_targets
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.sidecar import Link
from rtresnet.reporting import performance
from rtresnet.workflows import advisor
from rtresnet.workflows import estimate as estimates
from rtresnet.workflows.advisor import advise
from rtresnet.workflows.build import BuildConfig, build
from rtresnet.workflows.estimate import EstimateConfig, estimate


@pytest.fixture(scope="module")
def plans(engines: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real plans of resnet8 by precision. Read only."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("plans")
    for file in engines.glob("resnet8*"):
        shutil.copy(file, folder / file.name)
    config = BuildConfig(batch=("1:4:16",), targets=("sm_86", "sm_89"))
    return {
        precision: build(folder / name, config).path
        for precision, name in (
            ("fp32", "resnet8.onnx"), ("fp16", "resnet8-fp16.onnx"), ("int8", "resnet8-int8.onnx")
        )
    }  # fmt: skip


def bytes_of(plan: Path, batch: int) -> int:
    """Return all bytes of a plan's layers, straight from the file next to it."""
    widths = {"Float": 4, "Half": 2, "Int8": 1}
    total = 0
    for layer in json.loads(layers.path_for(plan).read_text())["layers"]:
        for tensor in (*layer["inputs"], *layer["outputs"]):
            size = widths[tensor["dtype"]]
            for side in tensor["shape"]:
                size *= batch if side < 0 else side
            total += size
        total += layer["weights"]
    return total


def test_estimate_of_a_plan_counts_what_its_layers_move(plans: dict[str, Path]) -> None:
    by_onnx = estimate("resnet8", EstimateConfig(gpus=("T4",)))
    for precision, plan in plans.items():
        result = estimate(plan)
        assert result.batch == 4 and result.precision == precision and not result.as_if
        assert result.builder is not None and result.builder.startswith("TensorRT-RTX 1.")
        assert result.size == 32
        # The file's classifier has 4 classes, the named net 10.
        assert result.multiply_adds == pytest.approx(by_onnx.multiply_adds, rel=1e-3)
        # Strided 1x1 convolutions do not read every pixel.
        assert 0.8 * bytes_of(plan, 4) < result.bytes <= bytes_of(plan, 4)
        assert {gpu_targets.target_of(g.gpu) for g in result.results} == {"sm_86", "sm_89"}
        for gpu in result.results:
            assert sum(stage.bytes for stage in gpu.stages) == result.bytes
            assert gpu.memory_ms == pytest.approx(1e3 * result.bytes / gpu.bandwidth)
            assert 0 < gpu.no_faster_than_ms <= gpu.through_memory_ms
    assert estimate(plans["int8"]).bytes > estimate(plans["fp16"]).bytes


def test_estimate_of_a_plan_grows_with_the_batch_but_not_its_weights(
    plans: dict[str, Path],
) -> None:
    one, two, three = (
        estimate(plans["fp16"], EstimateConfig(batch=batch)).bytes for batch in (1, 2, 3)
    )
    assert two - one == three - two > 0
    assert 0 < 2 * one - two < atomic_io.require_file(plans["fp16"]).stat().st_size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 17}, "accepts batches of 1:4:16"),
        ({"gpus": ("RTX 5090",)}, "not for sm_120; build it again with --target sm_120"),
        ({"gpus": ("H200",)}, "was built for sm_86, sm_89, not for sm_90; .* --builder tensorrt"),
        ({"precision": "fp16"}, "is int8"),
        ({"size": 64}, "has a fixed size"),
    ],
)
def test_estimate_of_a_plan_refuses_what_it_does_not_do(
    plans: dict[str, Path], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        estimate(plans["int8"], EstimateConfig(**options))


def copied(plan: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of a plan with a changed layer file that its sidecar agrees with."""
    for file in (plan, Path(f"{plan}.json"), layers.path_for(plan)):
        shutil.copy(file, folder / file.name)
    copy = folder / plan.name
    place = layers.path_for(copy)
    data = json.loads(place.read_text())
    change(data)
    place.write_text(json.dumps(data))
    sidecar = artifacts.read_sidecar(copy)
    assert sidecar is not None and sidecar.plan is not None
    link = Link(file=place.name, sha256=atomic_io.sha256(place))
    changed = dataclasses.replace(sidecar, plan=dataclasses.replace(sidecar.plan, layers=link))
    artifacts.publish(copy, lambda path: path.write_bytes(plan.read_bytes()), changed)
    return copy


def test_estimate_of_a_plan_of_an_earlier_version_says_build_it_again(
    plans: dict[str, Path], tmp_path: Path
) -> None:
    def forget(data: dict[str, Any]) -> None:
        for layer in data["layers"]:
            del layer["multiply_adds"]

    plan = copied(plans["int8"], tmp_path, forget)
    with pytest.raises(InputError, match="multiply-adds; build it again"):
        estimate(plan)
    layers.path_for(plan).write_text("{}")
    with pytest.raises(ArtifactError, match="does not belong"):
        estimate(plan)


def test_estimate_of_fp8_kernels_uses_fp8_rates_and_needs_a_gpu_with_fp8(
    plans: dict[str, Path], tmp_path: Path
) -> None:
    def as_fp8(data: dict[str, Any]) -> None:
        for layer in data["layers"]:
            for tensor in (*layer["inputs"], *layer["outputs"]):
                tensor["dtype"] = "FP8" if tensor["dtype"] == "Int8" else tensor["dtype"]

    plan = copied(plans["int8"], tmp_path, as_fp8)
    result = estimate(plan)
    assert [gpu.gpu for gpu in result.results] == ["L4", "L40S", "RTX 4090"]
    assert result.bytes == estimate(plans["int8"]).bytes
    with pytest.raises(InputError, match=r"RTX 3090.*FP8.*L4, "):
        estimate(plan, EstimateConfig(gpus=("RTX 3090",)))
    # Among several plans the GPU only has no bound for this one.
    both = advise([plan, plans["fp16"]], EstimateConfig(gpus=("RTX 3090", "L4")))
    assert [len(entry.estimate.results) for entry in both.plans] == [1, 2]


def layer_of(**fields: Any) -> Layer:
    arguments = {
        "name": "k", "kind": "correlation", "role": "conv", "operation": "conv 3x3",
        "stage": "layer1", "block": "layer1.0", "profile": 0, "nodes": (), "rounds": (),
        "inputs": (), "outputs": (), "weights": 0, "multiply_adds": 1,
    }  # fmt: skip
    return Layer(**(arguments | fields))


def tensor(*shape: int, dtype: str = "Half") -> LayerTensor:
    return LayerTensor(name="t", shape=shape, dtype=dtype)


def test_kernel_of_a_layer_is_per_image() -> None:
    opened = layer_of(inputs=(tensor(-1, 8, 4, 4),), outputs=(tensor(-1, 16, 2, 2),))
    kernel = estimates.kernel_of(opened, 32)
    assert kernel.read == (2 * 8 * 16,) and kernel.written == 2 * 16 * 4
    # TensorRT's inspector describes the optimal batch.
    fixed = layer_of(inputs=(tensor(32, 8, 4, 4),), outputs=(tensor(32, 16, 2, 2),))
    assert estimates.kernel_of(fixed, 32) == kernel
    strided = dataclasses.replace(opened, operation="conv 1x1 + relu")
    assert estimates.kernel_of(strided, 32).read == (2 * 8 * 4,)


def test_kernel_of_an_unknown_data_type_is_bounded_by_the_fastest_rate() -> None:
    """A lower bound must not assume that an unlisted type computes slowly."""
    gpu = roofline.find_gpu("RTX 4090")
    layer = layer_of(inputs=(tensor(-1, 8, 4, 4, dtype="FP4"),), multiply_adds=10**9)
    (bound,) = roofline.minimum_times([estimates.kernel_of(layer, 1)], gpu, 1)
    assert bound.compute == pytest.approx(2e3 * 1e9 / (2 * 660.6 * 1e12))  # as INT4


def test_estimate_counts_kernels_of_unknown_types(plans: dict[str, Path], tmp_path: Path) -> None:
    def as_fp4(data: dict[str, Any]) -> None:
        for layer in data["layers"]:
            for tensor in (*layer["inputs"], *layer["outputs"]):
                tensor["dtype"] = "FP4" if tensor["dtype"] == "Int8" else tensor["dtype"]

    known, unknown = estimate(plans["int8"]), estimate(copied(plans["int8"], tmp_path, as_fp4))
    assert known.unknown_types == 0 < unknown.unknown_types
    for before, after in zip(known.results, unknown.results, strict=True):
        assert 0.4 < after.compute_ms / before.compute_ms < 1
    text = " ".join(map(str, performance.estimate_lines(unknown)))
    assert f"{unknown.unknown_types} of {unknown.kernels} kernels" in text


def bench_file(path: Path, plan: Path, **fields: Any) -> Path:
    entry = {
        "measured": str(plan), "device": "NVIDIA GeForce RTX 4090", "batch": 4,
        "scenario": "single-stream", "latency": {"n": 100, "median": 0.5},
        "parts": {"compute": {"n": 100, "median": 0.25}},
        "chain": [{"file": plan.name, "sha256": atomic_io.sha256(plan)}],
    } | fields  # fmt: skip
    path.write_text(json.dumps({"schema": 1, "verb": "bench", "result": {"results": [entry]}}))
    return path


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, True), ({"batch": 8}, False), ({"device": "NVIDIA L4"}, False),
        ({"device": "AMD EPYC"}, False), ({"scenario": "offline"}, False),
        ({"with_preprocess": True}, False), ({"chain": [{"sha256": "0" * 64}]}, False),
    ],
)  # fmt: skip
def test_estimate_shows_measurements_of_the_same_plan_gpu_and_batch(
    plans: dict[str, Path], tmp_path: Path, fields: dict[str, Any], shown: bool
) -> None:
    file = bench_file(tmp_path / "bench.json", plans["fp16"], **fields)
    result = estimate(plans["fp16"], EstimateConfig(gpus=("RTX 4090",), measured=(file,)))
    results = [(m.file, m.n, m.median_ms, m.compute_ms) for m in result.results[0].measured]
    assert results == ([(str(file), 100, 0.5, 0.25)] if shown else [])


@pytest.mark.parametrize(
    "content",
    [
        "[]", "{}", '{"verb": "eval", "result": {}}', "nonsense", '{"verb": "bench"}',
        '{"verb": "bench", "result": {"results": [1]}}',
        '{"verb": "bench", "result": {"results": [{"batch": 4}]}}',
    ],
)  # fmt: skip
def test_estimate_refuses_a_file_that_is_no_benchmark(
    plans: dict[str, Path], tmp_path: Path, content: str
) -> None:
    file = tmp_path / "bench.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"bench\.json"):
        estimate(plans["fp16"], EstimateConfig(measured=(file,)))


def test_advise_compares_int8_with_fp16(plans: dict[str, Path]) -> None:
    result = advise(list(plans.values()), EstimateConfig(gpus=("RTX 4090", "L4")))
    assert [entry.estimate.precision for entry in result.plans] == ["fp32", "fp16", "int8"]
    fp16, int8 = result.plans[1].estimate, result.plans[2].estimate
    (sentence,) = result.advice
    ratio = f"INT8 moves {int8.bytes / fp16.bytes:.1f} times the bytes of FP16 on TensorRT-RTX"
    assert sentence.startswith(ratio) and "RTX 4090, L4: " in sentence
    assert "--builder tensorrt" in sentence


def test_advise_ends_with_what_was_measured_of_both(plans: dict[str, Path], tmp_path: Path) -> None:
    files = [bench_file(tmp_path / f"{name}.json", plans[name]) for name in ("fp16", "int8")]
    both = EstimateConfig(gpus=("RTX 4090", "L4"), measured=tuple(files))
    (sentence,) = advise([plans["fp16"], plans["int8"]], both).advice
    assert "Measured on RTX 4090 at batch 4: INT8 0.25 ms, FP16 0.25 ms." in sentence
    one = EstimateConfig(gpus=("RTX 4090",), measured=(files[0],))
    (sentence,) = advise([plans["fp16"], plans["int8"]], one).advice
    assert "Measured" not in sentence


def test_advise_without_a_narrow_type_has_no_advice(plans: dict[str, Path]) -> None:
    assert advise([plans["fp32"], plans["fp16"]]).advice == ()
    with pytest.raises(InputError, match="no plans to compare"):
        advise([])
    with pytest.raises(InputError, match="not for sm_120"):
        advise([plans["fp32"], plans["fp16"]], EstimateConfig(gpus=("RTX 5090",)))


def test_advise_shows_the_accuracy_of_the_files_that_a_plan_came_from(
    plans: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "all"
    shutil.copytree(plans["int8"].parent, folder)
    plan = folder / plans["int8"].name
    sidecar = folder / "resnet8-int8.onnx.json"
    record = json.loads(sidecar.read_text())
    record["measured"]["drop"] = {"points": 0.5, "low": 0, "high": 1, "n": 200, "data": "digits"}
    record["measured"]["accuracy"] = [{"top1": 90, "n": 100, "data": "digits"}]
    sidecar.write_text(json.dumps(record))
    accuracy = advise([plan]).plans[0].accuracy
    assert (accuracy.top1_percent, accuracy.n, accuracy.drop_points) == (90.0, 100, 0.5)
    scales = tmp_path / "scales.json"
    scales.write_text(json.dumps({"signal_to_noise_db": {"kept": 35.5}}))
    record["calibration"] |= {
        "scales": str(scales), "scales_sha256": atomic_io.sha256(scales)
    }  # fmt: skip
    sidecar.write_text(json.dumps(record))
    assert advise([plan]).plans[0].accuracy.snr_db == 35.5
    scales.write_text(json.dumps({"signal_to_noise_db": {"kept": 99}}))  # of another calibration
    assert advise([plan]).plans[0].accuracy.snr_db is None
    record["sha256"] = "0" * 64  # another file stands there by now
    sidecar.write_text(json.dumps(record))
    assert advise([plan]).plans[0].accuracy == advisor.PlanAccuracy()


def test_winners_follow_from_bytes_and_arithmetic(plans: dict[str, Path]) -> None:
    narrow, wide = (estimate(plans[name]) for name in ("int8", "fp16"))
    opened: estimates.OpenedPlans = {}
    large = dataclasses.replace(roofline.find_gpu("RTX 4090"), l2=1e6)
    none = dataclasses.replace(large, l2=0.0)
    # With everything in the cache only arithmetic counts, without a cache only bytes.
    assert advisor._winners(narrow, wide, 4, large, opened) == ("INT8", "FP16")
    assert advisor._winners(narrow, wide, 4, none, opened) == ("FP16", "FP16")
    assert advisor._winners(wide, wide, 4, none, opened) == ("", "")


def test_gpus_for_a_table_are_those_named_or_one_for_each_target() -> None:
    assert advisor.gpus_for((), ("sm_80", "sm_89", "sm_121")) == ("A100 80GB", "RTX 4090")
    assert advisor.gpus_for(("l4", "sm_86"), ("sm_89", "sm_86")) == ("L4",)
    assert all(gpu_targets.target_of(g) == t for t, g in advisor.REPRESENTATIVE.items())
    assert all(roofline.find_gpu(gpu).name == gpu for gpu in advisor.REPRESENTATIVE.values())
