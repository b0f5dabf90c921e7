"""Comparing artifacts from Python."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

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
