from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rtresnet.core import hardware
from rtresnet.core.errors import CheckFailedError, InputError
from rtresnet.core.serialization import to_builtins
from rtresnet.workflows import result_files
from rtresnet.workflows.benchmark import Baseline, BenchmarkConfig, benchmark
from rtresnet.workflows.benchmark_search import SearchConfig, search_benchmark
from rtresnet.workflows.estimate import EstimateConfig, estimate
from rtresnet.workflows.package import package
from rtresnet.workflows.profile import ProfileConfig, profile
from tests.reporters import RecordingReporter

pytestmark = pytest.mark.usefixtures("brief_measurements")
FEW = BenchmarkConfig(batch=(1,), queries=200)


@pytest.fixture
def net(engines: Path) -> str:
    return str(engines / "resnet8.onnx")


def test_benchmark_of_two_files_compares_them_and_is_read_by_report(
    engines: Path, net: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = benchmark([net, engines / "resnet8-int8.onnx"], BenchmarkConfig(queries=20))
    names = [entry.name for entry in result.results]
    assert names == [
        f"resnet8{kind}.onnx, batch {batch}" for batch in (1, 8) for kind in ("", "-int8")
    ]
    assert [entry.measurement.comparison is None for entry in result.results] == [True, False] * 2
    assert result.results[0].artifact.precision == "fp32" and result.regressions is None
    record = {"verb": "bench", "result": to_builtins(result)}
    read = result_files.check("result.json", json.loads(json.dumps(record)))
    assert len(read.result["results"]) == 4
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.skipif(bool(hardware.gpus()), reason="there is a GPU here")
def test_benchmark_plan_and_its_onnx_file_without_gpu_measures_the_file_once(
    engines: Path,
) -> None:
    plan = engines / "resnet8-int8.plan"
    if not plan.exists():
        pytest.skip("no TensorRT-RTX")
    reporter = RecordingReporter()
    paths = [engines / "resnet8-int8.onnx", plan]
    result = benchmark(paths, FEW, reporter=reporter)
    assert [entry.artifact.asked for entry in result.results] == [str(paths[0])]
    assert sum(str(plan) in line for line in reporter.notes) == 1


def scaled(entries: list[dict[str, Any]], scale: float) -> list[dict[str, Any]]:
    return [entry | {"samples": [scale * s for s in entry["samples"]]} for entry in entries]


@pytest.mark.parametrize(("scale", "regression"), [(0.01, True), (100.0, False)])
def test_benchmark_with_baseline_judges_each_result(
    net: str, scale: float, regression: bool
) -> None:
    then = scaled(to_builtins(benchmark([net], FEW))["results"], scale)
    result = benchmark([net], FEW, baseline=Baseline(path="then.json", results=then))
    assert result.regressions is not None
    assert [judgement.regression for judgement in result.regressions] == [regression]
    if regression:
        with pytest.raises(CheckFailedError, match=r"then.json.*resnet8.onnx at batch 1"):
            result.require_no_regression()
    else:
        result.require_no_regression()


def test_benchmark_with_baseline_of_another_device_needs_force(net: str) -> None:
    then = to_builtins(benchmark([net], FEW))["results"]
    then[0]["device"] = "NVIDIA H100"
    with pytest.raises(InputError, match="device: ") as caught:
        benchmark([net], FEW, baseline=Baseline(path="then.json", results=then))
    assert caught.value.fix is not None and "--force" in caught.value.fix
    benchmark([net], FEW, baseline=Baseline(path="then.json", results=then, force=True))


def test_search_benchmark_of_batches_notes_each_measurement(net: str) -> None:
    reporter = RecordingReporter()
    config = SearchConfig(what="batch", p99_ms=1e4, max_batch=2, seconds=0.05)
    result = search_benchmark([net], config, reporter=reporter)
    (entry,) = result.searches
    assert entry.search.best == 2 and entry.search.limit
    assert len(reporter.notes) == len(entry.search.points)
    result.require_success()
    record = {"verb": "bench-find", "result": to_builtins(result)}
    read = result_files.check("result.json", json.loads(json.dumps(record)))
    assert read.result["searches"][0]["search"]["p99_ms"] == 1e4


def test_search_benchmark_of_an_impossible_bound_has_no_best(net: str) -> None:
    config = SearchConfig(what="qps", p99_ms=1e-3, seconds=0.05)
    result = search_benchmark([net], config)
    assert result.searches[0].search.best is None
    with pytest.raises(CheckFailedError, match="no qps has a p99"):
        result.require_success()


def test_search_benchmark_of_a_wait_beyond_the_bound_still_tries_full_batches(net: str) -> None:
    config = SearchConfig(what="qps", p99_ms=60, max_batch=2, max_wait_ms=61, queries=200)
    (entry,) = search_benchmark([net], config).searches
    assert entry.search.best is not None


def test_profile_is_read_by_report(net: str) -> None:
    result = profile(net, ProfileConfig(seconds=0.05))
    assert result.profile.blocks[0].name == "stem"
    assert result.roof is not None and result.roof.rate("fp16") == result.roof.fp32
    record = {"verb": "profile", "result": to_builtins(result)}
    read = result_files.check("result.json", json.loads(json.dumps(record)))
    assert read.result["artifact"] == net and read.result["blocks"]


def test_profile_of_a_torchscript_file_with_zero_padded_shortcuts(tmp_path: Path) -> None:
    """TorchScript computes the pads in the graph, which shape inference does not follow."""
    torch = pytest.importorskip("torch")
    from rtresnet.models import zoo
    from rtresnet.models.nets import multiply_adds

    net = zoo.build(zoo.spec("resnet8", shortcut="A")).eval()
    path = tmp_path / "torchscript.onnx"
    torch.onnx.export(
        net, torch.zeros(1, 3, 32, 32), path, dynamo=False, input_names=["images"],
        output_names=["logits"], dynamic_axes={"images": {0: "n"}, "logits": {0: "n"}},
    )  # fmt: skip
    result = profile(path, ProfileConfig(seconds=0.05, batch=2))
    flops = sum(part.flops for part in result.profile.blocks)
    assert flops == 2 * 2 * multiply_adds(net, 32)


def test_estimate_of_a_file_as_if_quantized(net: str) -> None:
    config = EstimateConfig(gpus=["RTX 4090"], precision="int8", batch=8)
    result = estimate(Path(net), config)
    assert result.as_if and result.precision == "int8"
    (gpu,) = result.results
    assert gpu.no_faster_than_ms == pytest.approx(sum(s.no_faster_than_ms for s in gpu.stages))
    assert gpu.no_more_images_per_second == pytest.approx(8e3 / gpu.no_faster_than_ms)


def test_package_returns_what_was_written(net: str, tmp_path: Path) -> None:
    result = package(net, tmp_path / "models")
    assert result.folder == tmp_path / "models" / "resnet8" / "1" and result.max_batch == 32
    assert (result.folder / "model.onnx").read_bytes() == Path(net).read_bytes()
