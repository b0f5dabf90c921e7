"""Checking artifacts from Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rtresnet.bench import consistency
from rtresnet.core.serialization import to_builtins
from rtresnet.workflows.check import CheckConfig, check


def test_check_sound_file_has_no_failed_comparison(engines: Path, tints: str) -> None:
    result = check(engines / "resnet8-fp16.onnx", tints, CheckConfig(images=6))
    assert result.failed == () and result.parent == engines / "resnet8.onnx"
    assert (result.n, result.bound, result.images) == (6, "fp16", tints)
    record = to_builtins(result)
    assert {entry["ok"] for entry in record["checks"]} == {True}
    assert record["told_apart"] == result.discriminability > 0.5


def test_check_returns_the_comparisons_that_fail(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = consistency.alone
    monkeypatch.setattr(
        consistency, "alone", lambda infer, images: alone(infer, images)[np.arange(6)[::-1]]
    )
    result = check(engines / "resnet8.onnx", config=CheckConfig(images=6))
    assert result.failed and result.images == "noise"
    assert all(entry.why for entry in result.failed)
