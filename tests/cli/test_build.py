from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from rtresnet.cli.main import main
from rtresnet.core import hardware
from rtresnet.core.sidecar import Attestation, Plan
from rtresnet.reporting.artifact import describe_attested

pytestmark = pytest.mark.skipif(not hardware.installed("tensorrt_rtx"), reason="no TensorRT-RTX")


def test_profiles_and_targets_may_be_repeated(engines: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    arguments = ["build", str(engines / "resnet8-fp16.onnx"), "--out", str(tmp_path / "n.plan")]
    arguments += ["--batch", "1:8:32", "--batch", "1", "--target", "L4", "--target", "sm_86"]
    assert main([*arguments, "--builder", "rtx", "--json", str(file)]) == 0
    result = json.loads(file.read_text())["result"]
    assert [profile["max"] for profile in result["profiles"]] == [32, 1]
    assert sorted(result["targets"]) == ["sm_86", "sm_89"]
    assert len(result["attested"]["activations"]) == 2


def test_one_plan_a_target(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "n.plan"
    source = str(engines / "resnet8-fp16.onnx")
    arguments = ["build", source, "--out", str(out), "--builder", "rtx", "--per-target"]
    assert main([*arguments, "--target", "T4,RTX 4090"]) == 0
    assert {path.name for path in tmp_path.glob("*.plan")} == {"n-sm_75.plan", "n-sm_89.plan"}
    output = capsys.readouterr().out
    assert "for sm_75; of 7 convolutions 7 take Half" in output


def test_per_target_refuses_before_it_builds_any(engines: Path, tmp_path: Path) -> None:
    source, out = str(engines / "resnet8.onnx"), tmp_path / "n.plan"
    arguments = ["build", source, "--out", str(out), "--builder", "rtx", "--per-target"]
    assert main([*arguments, "--target", "L4,T4"]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], "7 take Float (TF32 allowed)"),
        (["--no-tf32"], "7 take Float,"),
    ],
)
def test_build_of_fp32_says_whether_tf32_is_allowed(
    options: list[str],
    shown: str,
    engines: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan, file = tmp_path / "n.plan", tmp_path / "r.json"
    arguments = ["build", str(engines / "resnet8.onnx"), "--out", str(plan), "--builder", "rtx"]
    assert main([*arguments, *options, "--json", str(file)]) == 0
    assert shown in " ".join(capsys.readouterr().out.split())
    assert json.loads(file.read_text())["result"]["tf32"] == (not options)
    assert main(["inspect", str(plan)]) == 0
    assert shown in " ".join(capsys.readouterr().out.split())


def test_describe_attested_of_a_gpu_without_tf32_is_float() -> None:
    attested = Attestation(convolutions=7, dtypes={"Float": 7}, layers=9, adds=0)
    plan = Plan(
        builder="rtx", version="1.7", targets=("sm_75",), profiles=(), seconds=1.0,
        attested=attested, tf32=True,
    )  # fmt: skip
    assert describe_attested(plan) == "of 7 convolutions 7 take Float"
    newer = dataclasses.replace(plan, targets=("sm_75", "sm_86"))
    assert "TF32" in describe_attested(newer)
    assert "TF32" not in describe_attested(dataclasses.replace(newer, tf32=None))


@pytest.mark.skipif(bool(hardware.gpus()), reason="there is a GPU here")
def test_current_without_a_gpu_is_exit_code_3(
    engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(engines / "resnet8.onnx"), "--target", "current"]) == 3
    assert "no GPU" in capsys.readouterr().err


def test_inspect_shows_and_draws_the_layers(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, svg, file = engines / "resnet8-int8.plan", tmp_path / "e.svg", tmp_path / "e.json"
    assert main(["inspect", str(plan), "--layers", "--svg", str(svg), "--json", str(file)]) == 0
    output = capsys.readouterr().out
    table = output[output.index("layers in order") :]
    assert max(map(len, table.splitlines())) <= 80
    assert "conv 3x3" in table and "Int8>Float" in table and "3 Adds in separate layers" in table
    record = json.loads(file.read_text())["result"]["engine"]
    assert sum(layer["role"] == "conv" for layer in record["layers"]) == 7
    assert all(layer["written_bytes"] >= 0 for layer in record["layers"])
    root = ET.fromstring(svg.read_text())
    titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    busy = [layer for layer in record["layers"] if layer["role"] != "idle"]
    assert len(titles) == len(busy) and root.get("role") == "img"
    text = "".join(root.itertext())
    for stage in ("stem", "layer1", "layer2", "layer3", "head"):
        assert stage in text


def test_inspect_without_sidecar_goes_as_far_as_the_plan_says(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stray = tmp_path / "stray.plan"
    stray.write_bytes((engines / "resnet8-int8.plan").read_bytes())
    assert main(["inspect", str(stray)]) == 0
    output = capsys.readouterr().out
    assert "header: TensorRT-RTX" in output and "own metadata" in output
    assert "plan, resnet8, int8" in output and "input 32x32" in output
    assert main(["inspect", str(stray), "--layers"]) == 2
    assert "no sidecar; build it again" in capsys.readouterr().err


def test_layers_of_what_is_no_plan_are_refused(
    engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(engines / "resnet8.onnx"), "--layers"]) == 2
    assert "fused layers" in capsys.readouterr().err
