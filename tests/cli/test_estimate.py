from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rtresnet.cli.main import main


def test_estimate_named_net_on_one_gpu_is_listed_by_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.json"
    arguments = ["--gpu", "RTX 4090", "--precision", "int8", "--batch", "32", "--json", str(out)]
    assert main(["estimate", "resnet20", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "a lower bound" in shown and "not a measurement" in shown and "whitepaper" in shown
    for stage in ("stem", "layer1", "layer2", "layer3", "head"):
        assert stage in shown
    result = json.loads(out.read_text())["result"]
    assert result["what"] == "bound" and result["multiply_adds"] == 40_551_040
    (entry,) = result["results"]
    assert entry["no_faster_than_ms"] == pytest.approx(
        sum(stage["no_faster_than_ms"] for stage in entry["stages"])
    )
    assert entry["no_faster_than_ms"] <= entry["through_memory_ms"]
    assert entry["compute_ms"] == pytest.approx(2e3 * 32 * 40_551_040 / 660.6e12)


def test_estimate_file_is_listed_by_gpu(engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(engines / "resnet8-int8.onnx")]) == 0
    shown = capsys.readouterr().out
    assert "int8, batch 1" in shown and "T4" in shown and "H200" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet20", "--gpu", "RTX 9999"], "did you mean 'RTX 3090'? known: T4"),
        (["resnet21"], "unknown model"),
        (["none.onnx"], "no such file"),
        (
            ["{engines}/resnet8-int8.onnx", "--precision", "fp16"],
            "is int8; name its FP32 ONNX file",
        ),
        (["{engines}/resnet8.onnx", "--size", "64"], "has a fixed size"),
    ],
)
def test_estimate_impossible_request_exits_2(
    arguments: list[str], words: str, engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [part.replace("{engines}", str(engines)) for part in arguments]
    assert main(["estimate", *command]) == 2
    assert words in capsys.readouterr().err


def test_estimate_of_several_plans_ends_with_what_to_expect(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "advice.json"
    plans = [str(engines / name) for name in ("resnet8.plan", "resnet8-int8.plan")]
    arguments = ["--gpu", "RTX 4090", "--batch", "8", "--json", str(out)]
    assert main(["estimate", *plans, *arguments]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not measurements" in shown and "INT8 moves" in shown and "RTX 4090" in shown
    document = json.loads(out.read_text())
    assert document["verb"] == "advise" and document["result"]["what"] == "bound"
    assert [entry["precision"] for entry in document["result"]["plans"]] == ["fp16", "int8"]
    assert all(entry["bytes"] > 0 for entry in document["result"]["plans"])


def test_export_of_several_precisions_ends_with_their_comparison(
    trained: Path,
    tints: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    arguments = ["--fp16", "--int8", "--calib", tints, "--target", "L4", "--json", "e.json"]
    assert main(["export", "--weights", str(trained / "best.pt"), *arguments]) == 0
    printed = capsys.readouterr().out
    shown = " ".join(printed.split())
    assert " dB " in shown and "measured by calibration" in shown and "from memory" in shown
    assert "4090" not in shown and "INT8 moves" in shown
    # A row for each GPU, whose ranges are not broken over lines.
    bounds = r"[\d.]+\u2013[\d.]+"
    assert re.search(rf"^ GPU +fp16 +int8 *$[^L]*^ L4 +{bounds} +{bounds} *$", printed, re.M)
    advice = json.loads(Path("e.json").read_text())["result"]["advice"]
    assert [entry["precision"] for entry in advice["plans"]] == ["fp16", "int8"]
    assert [gpu["gpu"] for gpu in advice["plans"][0]["results"]] == ["L4"]
    assert main(["export", "--weights", str(trained / "best.pt"), "--json", "one.json"]) == 0
    assert json.loads(Path("one.json").read_text())["result"]["advice"] is None
