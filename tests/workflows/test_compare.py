"""Comparing artifacts from Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rtresnet.cli.main import main
from rtresnet.core.errors import InputError
from rtresnet.workflows.compare import CompareConfig, compare
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig
from tests.conftest import as_foreign


@pytest.fixture
def without_sidecar(engines: Path, tmp_path: Path) -> Path:
    return as_foreign(shutil.copy(engines / "resnet8.onnx", tmp_path / "foreign.onnx"))


def test_compare_precisions_agree_and_state_their_assumptions(
    engines: Path, without_sidecar: Path, tints: str
) -> None:
    runtime, half = RuntimeConfig(provider="cpu"), InputConfig(preset="half")
    reference = engines / "resnet8.onnx"
    result = compare(reference, engines / "resnet8-fp16.onnx", tints, runtime=runtime)
    assert result.agreement == 1 and result.relative is not None and result.relative < 1e-2
    assert result.candidate.precision == "fp16"
    with pytest.raises(InputError):  # both sidecars say what the files take
        compare(reference, reference, tints, stated=half)
    with pytest.raises(InputError) as error:
        compare(reference, without_sidecar, tints)
    assert "rtresnet adopt" in (error.value.fix or "")
    result = compare(reference, without_sidecar, tints, CompareConfig(batch=7), stated=half)
    assert result.reference.assumed == () and "preset half" in result.candidate.assumed[0]


def test_compare_report_shows_the_images_whose_class_changes(
    engines: Path, without_sidecar: Path, tints: str, tmp_path: Path
) -> None:
    page, out = tmp_path / "page", tmp_path / "c.json"
    arguments = ["--data", tints, "--report", str(page), "--json", str(out)]
    wrong = ["--mean", "1,0,1", "--std", "0.1,1,0.1"]  # so that other classes come out
    files = [str(engines / "resnet8.onnx"), str(without_sidecar)]
    assert main(["compare", *files, *wrong, *arguments]) == 0
    result = json.loads(out.read_text())["result"]
    assert result["changed"] == round((1 - result["agreement"]) * result["n"]) > 0
    assert (page / "index.html").read_text().count("<img ") == len(result["flips"])
    assert all(flip["reference"] != flip["candidate"] for flip in result["flips"])
    assert {flip["label"] for flip in result["flips"]} <= {"0", "1", "2", "3"}
