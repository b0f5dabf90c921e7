"""ONNX files with a fixed batch size, which torch.onnx.export writes by default."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from rtresnet.cli.main import main
from rtresnet.core import artifacts
from rtresnet.core.errors import UnavailableError
from rtresnet.workflows import workload

pytest.importorskip("onnxruntime")

Fixed = Callable[..., str]
Captured = pytest.CaptureFixture[str]


def with_fixed_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return the same net for one batch size, which a Reshape in it holds to."""
    graph = model.graph
    for entry in (graph.input[0], graph.output[0]):
        entry.type.tensor_type.shape.dim[0].dim_value = batch
    place, flatten = next((i, n) for i, n in enumerate(graph.node) if n.op_type == "Flatten")
    graph.initializer.append(numpy_helper.from_array(np.array([batch, -1]), "rows"))
    reshape = helper.make_node(
        "Reshape", [flatten.input[0], "rows"], list(flatten.output), name=flatten.name
    )
    graph.node.remove(flatten)
    graph.node.insert(place, reshape)
    del graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture
def fixed(engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fixed:
    """fixed(batch, foreign=False): the trained net for one batch size, with or without sidecar."""
    monkeypatch.chdir(tmp_path)

    def make(batch: int, *, foreign: bool = False) -> str:
        model = with_fixed_batch(onnx.load(engines / "resnet8.onnx"), batch)
        path = tmp_path / f"fixed{batch}.onnx"
        sidecar = artifacts.read_sidecar(engines / "resnet8.onnx")
        assert sidecar is not None
        artifacts.publish(
            path, lambda temporary: temporary.write_bytes(model.SerializeToString()), sidecar
        )
        if foreign:
            artifacts.sidecar_path(path).unlink()
        return str(path)

    return make


def result(arguments: list[str], code: int = 0) -> dict[str, Any]:
    assert main([*arguments, "--json", "result.json"]) == code
    actual: dict[str, Any] = json.loads(Path("result.json").read_text())["result"]
    return actual


@pytest.mark.parametrize("batch", [1, 8])
def test_eval_and_compare_of_a_fixed_batch_agree_with_the_open_file(
    fixed: Fixed, engines: Path, tints: str, batch: int, capsys: Captured
) -> None:
    path, plain = fixed(batch), str(engines / "resnet8.onnx")
    actual = result(["eval", path, "--data", tints, "--batch", "50", "--provider", "cpu"])
    assert f"batch is fixed at {batch}" in capsys.readouterr().out
    expected = result(["eval", plain, "--data", tints, "--provider", "cpu"])
    assert (actual["top1"], actual["n"]) == (expected["top1"], 240)
    assert actual["fixed_batch"] == batch and expected["fixed_batch"] is None
    compared = result(["compare", plain, path, "--data", tints, "--provider", "cpu"])
    assert compared["agreement"] == 1 and compared["relative"] < 1e-5
    assert f"batch is fixed at {batch}" in capsys.readouterr().out


@pytest.mark.parametrize("batch", [1, 8])
def test_predict_with_a_fixed_batch_answers_every_image(
    fixed: Fixed, tmp_path: Path, batch: int, capsys: Captured
) -> None:
    for number in range(3):
        Image.new("RGB", (40, 40), (60 * number, 80, 10)).save(tmp_path / f"{number}.png")
    images = [f"{number}.png" for number in range(3)]
    assert len(result(["predict", fixed(batch), *images])["images"]) == 3
    assert f"batch is fixed at {batch}" in capsys.readouterr().err
    assert result(["predict", fixed(batch), *images, "--out", "table.csv"])["images"] == 3
    assert f"batch is fixed at {batch}" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 8])
def test_check_of_a_fixed_batch_passes(fixed: Fixed, batch: int, capsys: Captured) -> None:
    assert main(["check", fixed(batch), "--provider", "cpu"]) == 0
    assert f"batch is fixed at {batch}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("batch", "options", "measured"),
    [
        (1, [], [1]),
        (8, [], [8]),
        (1, ["--batch", "1,8"], [1]),
        (8, ["--batch", "1,8"], [8]),
        (1, ["--scenario", "offline"], [1]),
        (8, ["--scenario", "multi-stream"], [8]),
        (1, ["--concurrency", "2"], [1]),
        (8, ["--concurrency", "2", "--max-batch", "8"], [1]),
    ],
)
def test_bench_measures_the_fixed_batch_alone(
    fixed: Fixed, batch: int, options: list[str], measured: list[int], capsys: Captured
) -> None:
    actual = result(["bench", fixed(batch), "--queries", "5", *options])
    assert [entry["batch"] for entry in actual["results"]] == measured
    assert f"batch is fixed at {batch}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("batch", "options", "fix"),
    [
        (1, ["--batch", "8"], "--batch 1"),
        (8, ["--batch", "1,4"], "--batch 8"),
        (1, ["--scenario", "multi-stream"], "--scenario single-stream"),
        (1, ["--qps", "50", "--max-batch", "4"], "leave --max-batch out"),
        (8, ["--qps", "50"], "--max-batch 8"),
        (1, ["--find-batch", "--p99", "9s"], "--batch 1"),
        (8, ["--find-qps", "--p99", "9s"], "--max-batch 8"),
    ],
)
def test_bench_of_another_batch_than_the_fixed_one_is_refused_with_the_way_out(
    fixed: Fixed, batch: int, options: list[str], fix: str, capsys: Captured
) -> None:
    assert main(["bench", fixed(batch), *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(fix)


def test_bench_of_two_fixed_batches_is_refused(fixed: Fixed, engines: Path) -> None:
    assert main(["bench", fixed(1), fixed(8)]) == 2
    actual = result(["bench", fixed(1), str(engines / "resnet8.onnx"), "--queries", "5"])
    assert [entry["batch"] for entry in actual["results"]] == [1, 1]


def test_bench_that_fails_at_a_batch_keeps_the_finished_ones(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    measure = workload.measure

    def fail_at_8(sessions: Any, load: Any, batch: int, update: Any) -> Any:
        if batch == 8:
            raise UnavailableError("no memory for 8")
        return measure(sessions, load, batch, update)

    monkeypatch.setattr(workload, "measure", fail_at_8)
    path = str(engines / "resnet8.onnx")
    actual = result(["bench", path, "--queries", "5"], code=3)
    assert [entry["batch"] for entry in actual["results"]] == [1]
    output = capsys.readouterr()
    assert "img/s" in output.out and "no memory for 8" in output.err
    assert main(["bench", path, "--batch", "8"]) == 3


@pytest.mark.parametrize("batch", [1, 8])
def test_profile_takes_the_fixed_batch(fixed: Fixed, batch: int, capsys: Captured) -> None:
    path = fixed(batch)
    actual = result(["profile", path, "--seconds", "0.01"])
    assert actual["batch"] == actual["fixed_batch"] == batch
    assert f"batch is fixed at {batch}" in capsys.readouterr().out
    assert main(["profile", path, "--batch", "3"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"--batch {batch}")


@pytest.mark.parametrize("foreign", [False, True])
def test_build_of_a_fixed_batch_makes_a_plan_for_it(
    fixed: Fixed, foreign: bool, capsys: Captured
) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = fixed(1, foreign=foreign)
    (profile,) = result(["build", path, "--out", "fixed.plan", "--builder", "rtx"])["profiles"]
    assert set(profile.values()) == {1}
    assert "batch is fixed at 1" in capsys.readouterr().err
    assert main(["build", path, "--out", "other.plan", "--batch", "1:8:32"]) == 2
    assert "--batch" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("other.plan").exists()


@pytest.mark.parametrize("batch", [1, 8])
def test_quantize_of_a_fixed_batch_finds_the_scales_of_the_open_file(
    fixed: Fixed, engines: Path, tints: str, batch: int, capsys: Captured
) -> None:
    options = ["--calib", tints, "--calib-images", "100", "--calibrator", "max"]
    path, plain = fixed(batch), str(engines / "resnet8.onnx")
    assert main(["quantize", plain, *options, "--out", "plain.onnx"]) == 0
    assert main(["quantize", path, *options, "--out", "int8.onnx"]) == 0
    assert f"batch is fixed at {batch}" in capsys.readouterr().err
    actual, expected = (
        json.loads(Path(f"calib/{name}.json").read_text()) for name in ("int8", "plain")
    )
    assert actual["scales"] == pytest.approx(expected["scales"], rel=1e-5)
    assert actual["branches"].keys() == expected["branches"].keys()
    for name, extents in actual["branches"].items():
        assert extents == pytest.approx(expected["branches"][name], rel=1e-5)
    compared = result(["compare", "plain.onnx", "int8.onnx", "--data", tints])
    assert compared["agreement"] > 0.99 and compared["candidate"]["fixed_batch"] == batch


@pytest.mark.parametrize(
    "options",
    [["--calib", "TINTS", "--eval", "TINTS"], ["--calib", "none"], ["--fp16"]],
    ids=["gate", "none", "fp16"],
)
def test_quantize_of_a_foreign_fixed_batch_is_done(
    fixed: Fixed, tints: str, options: list[str]
) -> None:
    path = fixed(1, foreign=True)
    arguments = [tints if option == "TINTS" else option for option in options]
    assert main(["quantize", path, "--preset", "imagenet", *arguments, "--out", "out.onnx"]) == 0
    model = onnx.load("out.onnx")
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert main(["check", "out.onnx", "--provider", "cpu"]) == 0


def test_quantize_without_images_and_batch_norms_asks_for_images(
    fixed: Fixed, tints: str, capsys: Captured
) -> None:
    path = fixed(1, foreign=True)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    assert main(["quantize", path, "--preset", "imagenet", "--calib", "none"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("--calib SPEC")
    assert main(["quantize", path, "--preset", "imagenet", "--calib", tints]) == 0
