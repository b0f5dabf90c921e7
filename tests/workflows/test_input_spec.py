"""Preprocessing stated by the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtresnet.core.errors import InputError
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


def test_settle_size_of_a_half_open_input_names_a_size_that_exists() -> None:
    from onnx import TensorProto, helper

    from rtresnet.workflows import quantize

    images = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 224, "w"])
    model = helper.make_model(helper.make_graph([], "g", [images], []))
    with pytest.raises(InputError) as caught:
        quantize._settle_size(Path("net.onnx"), model, 192)
    assert "224x192" in caught.value.message and "224" in str(caught.value.fix)
