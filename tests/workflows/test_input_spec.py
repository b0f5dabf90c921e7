"""Preprocessing that a person states."""

from __future__ import annotations

from rtresnet.core.preprocess import Preprocess
from rtresnet.workflows.input_spec import InputConfig


def test_interpolation_stated_replaces_the_sidecars() -> None:
    base = Preprocess(size=32, resize=36)
    stated = InputConfig(interpolation="bicubic")
    assert not stated.empty
    assert stated.applied_to(base) == Preprocess(size=32, resize=36, interpolation="bicubic")


def test_interpolation_not_stated_keeps_the_sidecars() -> None:
    base = Preprocess(size=32, resize=36, interpolation="bicubic")
    assert InputConfig(preset="half").applied_to(base).interpolation == "bicubic"


def test_complete_without_a_sidecar_is_bilinear_by_default() -> None:
    assert InputConfig(preset="half").complete("a.onnx", fixed=32).interpolation == "bilinear"
    stated = InputConfig(preset="half", interpolation="bicubic")
    assert stated.complete("a.onnx", fixed=32).interpolation == "bicubic"
