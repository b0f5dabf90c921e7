"""ONNX files without a sidecar: stated preprocessing, and printed assumptions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from rtresnet.cli.main import main
from rtresnet.core import artifacts, hardware
from rtresnet.models import checkpoint
from tests.conftest import as_foreign, tinted_noise

needs_rtx = pytest.mark.skipif(not hardware.installed("tensorrt_rtx"), reason="no TensorRT-RTX")


@pytest.fixture
def foreign(engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An ONNX file that somebody else made, in the current folder."""
    monkeypatch.chdir(tmp_path)
    as_foreign(shutil.copy(engines / "resnet8.onnx", "foreign.onnx"))
    return "foreign.onnx"


@pytest.fixture
def image(tmp_path: Path) -> str:
    from PIL import Image

    path = tmp_path / "green.png"
    Image.fromarray(tinted_noise(4)[0][1]).save(path)
    return str(path)


def done(*arguments: object) -> dict[str, Any]:
    """Return the result of a command that succeeds."""
    assert main([*map(str, arguments), "--json", "result.json"]) == 0
    result: dict[str, Any] = json.loads(Path("result.json").read_text())["result"]
    return result


@pytest.mark.parametrize("command", ["eval", "predict", "compare", "quantize", "check"])
def test_a_file_without_a_sidecar_needs_mean_and_std_stated(
    command: str, foreign: str, tints: str, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "eval": [foreign, "--data", tints],
        "predict": [image, "--with", foreign],
        "compare": [foreign, foreign, "--data", tints],
        "quantize": [foreign, "--calib", tints, "--calib-images", "8"],
        "check": [foreign, "--data", tints],
    }[command]
    for stated in ([], ["--size", "32"], ["--mean", "0.5,0.5,0.5"]):
        assert main([command, *arguments, *stated]) == 2
        assert "--preset imagenet|half|unit" in capsys.readouterr().err.splitlines()[-1]
    assert main([command, *arguments, "--preset", "half", "--std", "1,1,1"]) == 2
    assert main([command, *arguments, "--preset", "half", "--size", "48"]) == 2
    assert "--size 32" in capsys.readouterr().err.splitlines()[-1]
    assert main([command, *arguments, "--preset", "half"]) == 0
    assert "mean 0.5,0.5,0.5 and std 0.5,0.5,0.5 (preset half)" in capsys.readouterr().out


def test_a_stated_mean_and_std_are_used_and_are_in_the_result(
    foreign: str, engines: Path, tints: str
) -> None:
    ours = done("eval", engines / "resnet8.onnx", "--data", tints, "--no-record")
    right = done("eval", foreign, "--data", tints, "--preset", "imagenet")
    wrong = done("eval", foreign, "--data", tints, "--mean", "0.9,0,0", "--std", "1,0.2,0.2")
    assert right["top1"] == ours["top1"] > wrong["top1"]
    assert not any("input" in line for line in ours["assumed"])
    assert right["assumed"][0].endswith("(preset imagenet)")
    assert wrong["assumed"][0] == "input: mean 0.9,0,0 and std 1,0.2,0.2"
    assert wrong["input"]["mean"] == [0.9, 0, 0]


def test_compare_applies_a_stated_input_to_the_file_without_a_sidecar_only(
    foreign: str, engines: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = str(engines / "resnet8.onnx")
    result = done("compare", ours, foreign, "--data", tints, "--preset", "unit")
    assert result["relative"] > 0.01
    assert result["reference"]["assumed"] == [] and len(result["candidate"]["assumed"]) == 1
    assert "Assumed about foreign.onnx" in capsys.readouterr().out
    assert done("compare", ours, foreign, "--data", tints, "--preset", "imagenet")["relative"] == 0
    assert main(["compare", ours, ours, "--data", tints, "--preset", "unit"]) == 2


def test_an_assumption_stays_with_what_is_made_of_the_file(
    foreign: str, tints: str, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrated = ["--calib", tints, "--calib-images", "16", "--calibrator", "max"]
    done("quantize", foreign, *calibrated, "--preset", "half")
    sidecar = artifacts.read_sidecar("foreign-int8.onnx")
    assert sidecar is not None
    assert sidecar.assumed == ("input: mean 0.5,0.5,0.5 and std 0.5,0.5,0.5 (preset half)",)
    for arguments in (["eval", "foreign-int8.onnx", "--data", tints],
                      ["predict", image, "--with", "foreign-int8.onnx"]):  # fmt: skip
        capsys.readouterr()
        assert "preset half" in done(*arguments)["assumed"][0]
        assert "preset half" in capsys.readouterr().out
    assert main(["inspect", "foreign-int8.onnx"]) == 0
    assert "assumed: input: mean 0.5" in capsys.readouterr().out


@needs_rtx
def test_a_plan_of_a_stated_file_keeps_the_assumption_and_one_of_an_unknown_file_has_no_input(
    foreign: str, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done("quantize", foreign, "--fp16", "--preset", "half")
    done("build", "foreign-fp16.onnx", "--out", "stated.plan")
    assert "without sidecar" not in capsys.readouterr().err
    stated = artifacts.read_sidecar("stated.plan")
    assert stated is not None and stated.input_known and "preset half" in stated.assumed[0]
    done("build", foreign, "--out", "unknown.plan")
    unknown = artifacts.read_sidecar("unknown.plan")
    assert unknown is not None and not unknown.input_known


def test_a_file_that_leaves_its_size_open_needs_it_stated(
    foreign: str, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(foreign)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[2].dim_param = dims[3].dim_param = "side"
    onnx.save(model, "open.onnx")
    assert main(["eval", "open.onnx", "--data", tints, "--preset", "imagenet"]) == 2
    assert "--size S" in capsys.readouterr().err.splitlines()[-1]
    result = done("eval", "open.onnx", "--data", tints, "--preset", "imagenet", "--size", "32")
    assert result["top1_percent"] > 90


def test_a_foreign_checkpoint_says_that_its_mean_and_std_are_assumed(
    trained: Path, tints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint.load(trained / "best.pt").state, "foreign.pth")
    result = done("eval", "foreign.pth", "--data", tints)
    assert "preset imagenet" in str(result["assumed"])
    assert "preset imagenet" in capsys.readouterr().out
    assert "preset unit" in str(
        done("eval", "foreign.pth", "--data", tints, "--preset", "unit")["assumed"]
    )
    assert "preset imagenet" in str(
        done("export", "--weights", "foreign.pth", "--no-plan")["assumed"]
    )
    sidecar = artifacts.read_sidecar("engines/resnet8.onnx")
    assert sidecar is not None and "preset imagenet" in str(sidecar.assumed)
    # What a person states is an assumption too: the file says nothing of it.
    done("export", "--weights", "foreign.pth", "--no-plan", "--preset", "half")
    sidecar = artifacts.read_sidecar("engines/resnet8.onnx")
    assert sidecar is not None and "preset half" in str(sidecar.assumed)


@pytest.mark.parametrize("command", ["eval", "predict", "check"])
def test_another_size_than_the_file_takes_is_refused(
    command: str, engines: Path, tints: str, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    net = str(engines / "resnet8.onnx")
    images = [image, "--with", net] if command == "predict" else [net, "--data", tints]
    assert main([command, *images, "--size", "64"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("use --size 32")


def test_a_single_image_is_counted_in_the_singular(
    engines: Path, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.csv"
    arguments = ["predict", image, "--with", str(engines / "resnet8.onnx"), "--out", str(out)]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert "1 image;" in output.out and "1 images" not in output.out + output.err
