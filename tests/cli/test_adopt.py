"""`rtresnet adopt`: sidecars for ONNX files of other tools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from rtresnet.cli.main import main
from rtresnet.core import artifacts, hardware
from rtresnet.core.errors import InputError
from rtresnet.runtime.loading import load
from tests.conftest import as_foreign, tinted_noise

pytest.importorskip("onnxruntime")
needs_rtx = pytest.mark.skipif(not hardware.installed("tensorrt_rtx"), reason="no TensorRT-RTX")

Captured = pytest.CaptureFixture[str]
COLOURS = ("red", "green", "blue", "grey")
ADOPT = ["adopt", "foreign.onnx", "--size", "32", "--preset", "imagenet"]


@pytest.fixture
def foreign(engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An ONNX file without a sidecar, and a file of class names, in the current folder."""
    monkeypatch.chdir(tmp_path)
    as_foreign(shutil.copy(engines / "resnet8.onnx", "foreign.onnx"))
    Path("names.txt").write_text("\n".join(COLOURS))
    return "foreign.onnx"


def result(arguments: list[str]) -> dict[str, Any]:
    assert main([*arguments, "--json", "result.json"]) == 0
    actual: dict[str, Any] = json.loads(Path("result.json").read_text())["result"]
    return actual


def change(path: str, edit: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(path)
    edit(model)
    onnx.save(model, path)


def test_adopt_then_eval_and_compare_equal_our_own_export(
    foreign: str, engines: Path, tints: str
) -> None:
    ours = str(engines / "resnet8.onnx")
    written = result(ADOPT)["sidecar"]
    assert (written["precision"], written["weights"]["origin"]) == ("fp32", "file")
    assert written["assumed"] == [] and written["sha256"] == artifacts.atomic_io.sha256(foreign)
    actual = result(["eval", foreign, "--data", tints])
    assert actual["top1"] == result(["eval", ours, "--data", tints, "--no-record"])["top1"]
    sidecar = artifacts.read_sidecar(foreign)
    assert sidecar is not None and sidecar.measured["accuracy"][0]["top1"] == actual["top1"]
    assert result(["compare", ours, foreign, "--data", tints])["relative"] == 0


@pytest.mark.parametrize("name", ["resnet8-fp16", "resnet8-int8"])
def test_adopt_detects_the_precision(name: str, foreign: str, engines: Path) -> None:
    as_foreign(shutil.copy(engines / f"{name}.onnx", foreign))
    assert result(ADOPT)["sidecar"]["precision"] == name.partition("-")[2]
    assert main(["check", foreign, "--provider", "cpu"]) == 0


def test_adopt_with_names_predict_prints_them(foreign: str, capsys: Captured) -> None:
    Image.fromarray(tinted_noise(4)[0][1]).save("image.png")
    assert main([*ADOPT, "--classes", "names.txt"]) == 0
    capsys.readouterr()
    assert main(["predict", "image.png", "--with", foreign]) == 0
    assert "green" in capsys.readouterr().out


def test_adopt_then_inspect_bench_and_check_succeed(foreign: str, capsys: Captured) -> None:
    assert main([*ADOPT, "--classes", "names.txt"]) == 0
    assert main(["inspect", foreign]) == 0
    assert main(["check", foreign, "--provider", "cpu"]) == 0
    assert main(["bench", foreign, "--batch", "1", "--queries", "5"]) == 0
    assert "Assumed" not in capsys.readouterr().out


def test_adopt_then_quantize_with_the_gate_needs_no_options(foreign: str, tints: str) -> None:
    assert main([*ADOPT, "--classes", "names.txt"]) == 0
    options = ["--calib", tints, "--calib-images", "32", "--calibrator", "max", "--eval", tints]
    made = result(["quantize", foreign, *options, "--max-drop", "5"])
    assert made["model"]["classes"] == list(COLOURS) and made["assumed"] == []
    assert [state for *_, state in artifacts.chain("foreign-int8.onnx")] == ["ok", "ok"]


@needs_rtx
def test_adopt_then_build_writes_a_plan_with_the_stated_input(foreign: str) -> None:
    assert main([*ADOPT, "--classes", "names.txt"]) == 0
    assert main(["build", foreign, "--out", "net.plan", "--builder", "rtx"]) == 0
    plan = artifacts.read_sidecar("net.plan")
    assert plan is not None and plan.input_known and plan.model.classes == COLOURS


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ([], "--preset imagenet|half|unit"),
        (["--size", "32", "--mean", "0.5,0.5,0.5"], "--preset imagenet|half|unit"),
        (["--size", "64", "--preset", "half"], "--size 32"),
        (["--preset", "half", "--classes", "three.txt"], "list every class once"),
    ],
)
def test_adopt_what_is_not_stated_or_does_not_fit_exits_2(
    options: list[str], fix: str, foreign: str, capsys: Captured
) -> None:
    Path("three.txt").write_text("a\nb\nc\n")
    assert main(["adopt", foreign, *options]) == 2
    assert fix in capsys.readouterr().err.splitlines()[-1]
    assert not artifacts.sidecar_path(foreign).exists()


def two_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.add().CopyFrom(
        helper.make_tensor_value_info("more", TensorProto.FLOAT, ["N", 3, 32, 32])
    )


def four_channels(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4 and t.dims[1] == 3)
    values = onnx.numpy_helper.to_array(weight)
    wide = np.concatenate([values, values[:, :1]], axis=1)
    weight.CopyFrom(onnx.numpy_helper.from_array(wide, weight.name))


def ends_in_softmax(model: onnx.ModelProto) -> None:
    old = model.graph.output[0].name
    model.graph.node.append(helper.make_node("Softmax", [old], ["scores"]))
    model.graph.output[0].name = "scores"


@pytest.mark.parametrize("edit", [two_inputs, four_channels, ends_in_softmax])
def test_adopt_no_image_classifier_exits_2(
    edit: Callable[[onnx.ModelProto], object], foreign: str, capsys: Captured
) -> None:
    change(foreign, edit)
    assert main(ADOPT) == 2
    assert "export it" in capsys.readouterr().err.splitlines()[-1]
    assert not artifacts.sidecar_path(foreign).exists()


def test_adopt_checkpoint_or_other_suffix_exits_2(foreign: str, trained: Path) -> None:
    assert main(["adopt", str(trained / "best.pt"), "--preset", "unit"]) == 2
    shutil.copy(foreign, "net.bin")
    assert main(["adopt", "net.bin", "--preset", "unit"]) == 2


def test_adopt_existing_sidecar_needs_force(foreign: str, capsys: Captured) -> None:
    assert main(ADOPT) == 0
    before = artifacts.sidecar_path(foreign).read_bytes()
    assert main(["adopt", foreign, "--preset", "half"]) == 2
    assert "--force" in capsys.readouterr().err.splitlines()[-1]
    assert artifacts.sidecar_path(foreign).read_bytes() == before
    assert main(["adopt", foreign, "--preset", "half", "--force"]) == 0
    sidecar = artifacts.read_sidecar(foreign)
    assert sidecar is not None and sidecar.input.mean == (0.5, 0.5, 0.5)


def test_adopt_open_size_is_used_by_every_command(foreign: str, tints: str) -> None:
    def open_sides(model: onnx.ModelProto) -> None:
        for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
            dim.dim_param = "side"

    change(foreign, open_sides)
    assert main(["adopt", foreign, "--preset", "imagenet"]) == 2
    assert main(ADOPT) == 0
    assert result(["eval", foreign, "--data", tints])["top1_percent"] > 90
    assert main(["bench", foreign, "--batch", "1", "--queries", "5"]) == 0
    assert main(["quantize", foreign, "--fp16"]) == 0
    if hardware.installed("tensorrt_rtx"):
        assert main(["build", foreign, "--out", "net.plan", "--builder", "rtx"]) == 0


def test_adopt_margin_of_the_crop_is_assumed_unless_stated(foreign: str) -> None:
    def larger(model: onnx.ModelProto) -> None:
        for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
            dim.dim_value = 96
        del model.graph.value_info[:]

    change(foreign, larger)
    arguments = ["adopt", foreign, "--preset", "unit", "--force"]
    assert result(arguments)["sidecar"]["assumed"] == ["input: the centre 96 of 110 pixels"]
    stated = result([*arguments, "--resize", "100"])["sidecar"]
    assert (stated["input"]["resize"], stated["assumed"]) == (100, [])


def test_adopt_uint8_file_takes_no_mean(foreign: str, tints: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert main(ADOPT) == 0
    assert main(["build", foreign, "--input", "uint8-nhwc", "--out", "p.plan"]) == 0
    (pixels,) = Path().glob("*-u8.onnx")
    artifacts.sidecar_path(pixels).unlink()
    as_foreign(pixels)
    assert main(["adopt", str(pixels), "--preset", "imagenet"]) == 2
    assert main(["adopt", str(pixels)]) == 0
    assert result(["eval", str(pixels), "--data", tints])["top1_percent"] > 90


@pytest.mark.parametrize("command", ["eval", "quantize", "check"])
def test_commands_without_a_sidecar_name_adopt(
    command: str, foreign: str, tints: str, capsys: Captured
) -> None:
    data = "--calib" if command == "quantize" else "--data"
    assert main([command, foreign, data, tints]) == 2
    assert f"rtresnet adopt {foreign}" in capsys.readouterr().err.splitlines()[-1]


def test_session_without_a_sidecar_names_adopt(foreign: str) -> None:
    with load(foreign, provider="cpu") as session, pytest.raises(InputError) as caught:
        _ = session.preprocess
    assert caught.value.fix is not None and f"rtresnet adopt {foreign}" in caught.value.fix


def test_check_of_a_child_whose_parent_lost_its_sidecar_names_adopt(
    foreign: str, capsys: Captured
) -> None:
    assert main(ADOPT) == 0
    assert main(["quantize", foreign, "--fp16"]) == 0
    artifacts.sidecar_path(foreign).unlink()
    assert main(["check", "foreign-fp16.onnx", "--provider", "cpu"]) == 0
    assert f"rtresnet adopt {foreign}" in capsys.readouterr().out


def test_adopt_refuses_two_classes_of_one_name(foreign: str, capsys: Captured) -> None:
    Path("names.txt").write_text("red\ngreen\nblue\nred")
    assert main([*ADOPT, "--classes", "names.txt"]) == 2
    assert "classes 1 and 4" in capsys.readouterr().err
    assert not artifacts.sidecar_path(foreign).exists()
