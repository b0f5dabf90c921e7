"""Real builds of FP8 files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from rtresnet.builder import engine, layers
from rtresnet.core.artifacts import read_sidecar
from rtresnet.core.errors import CheckFailedError, InputError
from rtresnet.quantization import calibrate, qdq
from rtresnet.quantization.half import to_half
from rtresnet.quantization.number_formats import FP8

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("onnxruntime")

OnnxFile = Callable[..., Path]
Publish = Callable[..., object]


@pytest.fixture(scope="module")
def fp8(onnx_file: OnnxFile, publish: Publish, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """resnet8 in FP8 with FP16 between the kernels; the stem is quantized too. Read only."""
    model = onnx.load(onnx_file("resnet8", "fp32"))
    images = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
    calibrated = calibrate.calibrate(
        model, list(qdq.placement(model)), lambda: [images], "max", number_format=FP8
    )
    path = tmp_path_factory.mktemp("fp8") / "resnet8-fp8.onnx"
    publish(to_half(calibrated.quantized()), path, "fp8")
    return path


@pytest.mark.parametrize("targets", [("sm_89", "sm_120"), ()])
def test_every_convolution_is_attested_fp8(
    fp8: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    out = tmp_path / "net.plan"
    sidecar = engine.build(fp8, out, target=targets, builder="rtx")
    plan = sidecar.plan
    assert plan is not None and plan.attested is not None
    assert plan.attested.dtypes == {"FP8": plan.attested.convolutions}
    assert plan.attested.requantizes
    assert plan.targets == (targets or ("sm_89", "sm_120", "sm_121"))
    assert any(layer.dtype == "FP8" for layer in layers.load(out, read_sidecar(out)).layers)


@pytest.mark.parametrize("targets", [("sm_86",), ("sm_80", "sm_89"), ("sm_75",)])
def test_targets_without_fp8_are_refused_before_the_build(
    fp8: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    with pytest.raises(InputError, match=rf"{targets[0]} does not support FP8.*sm_89 \(.*sm_120"):
        engine.build(fp8, tmp_path / "net.plan", target=targets, builder="rtx")
    with pytest.raises(InputError, match="does not support FP8"):
        engine.check(fp8, target=targets, builder="rtx")
    assert not list(tmp_path.iterdir())


def test_the_check_returns_the_default_targets(fp8: Path, onnx_file: OnnxFile) -> None:
    assert engine.check(fp8, builder="rtx") == ("sm_89", "sm_120", "sm_121")
    assert "sm_86" in engine.check(onnx_file("resnet8", "fp16"), builder="rtx")


def test_a_convolution_that_runs_in_float_is_an_error(
    onnx_file: OnnxFile, publish: Publish, tmp_path: Path
) -> None:
    model = onnx.load(onnx_file("resnet8", "fp32"))
    nodes = ["layer1.0.conv1"]
    scales = dict.fromkeys(qdq.placement(model), 0.1)
    path = tmp_path / "resnet8-fp8.onnx"
    publish(qdq.insert(model, scales, nodes, number_format=FP8), path, "fp8")
    with pytest.raises(CheckFailedError, match=r"1 run in Float \(layer1.0.conv1\)"):
        engine.build(path, tmp_path / "net.plan", target=("sm_89",), builder="rtx")
