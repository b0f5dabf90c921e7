"""`export --bf16`, `quantize --bf16`, and the other commands with a BF16 file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rtresnet.cli.main import main
from rtresnet.core.artifacts import read_sidecar
from rtresnet.runtime.ort import OrtBackend

pytest.importorskip("onnxruntime")


@pytest.fixture
def file(engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(engines / "resnet8.onnx"), "--bf16", "--out", "a-bf16.onnx"]) == 0
    return "a-bf16.onnx"


def test_every_command_takes_it_and_says_what_is_measured(
    file: str, engines: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sidecar = read_sidecar(file)
    assert sidecar is not None and (sidecar.precision, sidecar.calibration) == ("bf16", None)
    plain = str(engines / "resnet8.onnx")
    for command in (
        ["eval", file, "--data", tints],
        ["compare", plain, file, "--data", tints],
        ["check", file],
        ["bench", file, "--seconds", "0.1", "--batch", "1"],
    ):
        assert main(command) == 0, command
        printed = capsys.readouterr()
        assert "rounded to BF16" in printed.out + printed.err, command
    for command in (["lint", file], ["inspect", file]):
        assert main(command) == 0
    assert "bf16" in capsys.readouterr().out


def test_the_backend_says_so(file: str) -> None:
    backend = OrtBackend(file, provider="cpu")
    assert backend.cpu_note is not None and "BF16 runs in float32" in backend.cpu_note
    assert OrtBackend(file).provider == backend.provider  # auto


def test_estimate_has_its_rate_and_refuses_gpus_without_it(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", file, "--gpu", "RTX 4090", "--json", "a.json"]) == 0
    (gpu,) = json.loads(Path("a.json").read_text())["result"]["results"]
    assert gpu["rates"]["bf16"] == pytest.approx(165.2e12) and "whitepaper" in gpu["source"]
    assert main(["estimate", file, "--gpu", "RTX 3090"]) == 0
    assert "from memory" in capsys.readouterr().out
    assert main(["estimate", file, "--gpu", "T4"]) == 2
    assert "not support BF16" in capsys.readouterr().err


def test_triton_is_not_given_it(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["package", file, "--triton", "models"]) == 2
    assert "BF16" in capsys.readouterr().err and not Path("models").exists()


def test_quantizing_options_are_refused(
    file: str, engines: Path, tints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = str(engines / "resnet8.onnx")
    assert main(["quantize", plain, "--bf16", "--calib", tints]) == 2
    assert "leave --bf16 out" in capsys.readouterr().err
    assert main(["quantize", file, "--int8"]) == 2
    assert "bf16 already" in capsys.readouterr().err


def test_export_writes_file_and_plan(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    weights = ["--weights", str(trained / "best.pt")]
    assert main(["export", *weights, "--bf16", "--fp16", "--target", "sm_89"]) == 0
    assert "bf16" in capsys.readouterr().out  # also in the table that compares the plans
    plan = read_sidecar("engines/resnet8-bf16.plan")
    assert plan is not None and plan.precision == "bf16" and plan.plan is not None
    assert plan.plan.attested is not None and set(plan.plan.attested.dtypes) == {"BFloat16"}
    assert Path("engines/resnet8-bf16.onnx").exists()
