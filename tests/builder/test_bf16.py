"""Real builds of BF16 files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from rtresnet.builder import engine, layers
from rtresnet.core.artifacts import read_sidecar
from rtresnet.core.errors import InputError
from rtresnet.quantization.half import to_half

pytest.importorskip("tensorrt_rtx")

OnnxFile = Callable[..., Path]
Publish = Callable[..., object]


@pytest.fixture(scope="module")
def bf16(onnx_file: OnnxFile, publish: Publish, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bf16") / "resnet8-bf16.onnx"
    publish(to_half(onnx.load(onnx_file("resnet8", "fp32")), "bf16"), path, "bf16")
    return path


@pytest.mark.parametrize("targets", [("sm_80", "sm_86", "sm_89", "sm_120"), ()])
def test_every_convolution_is_attested_bf16(
    bf16: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    out = tmp_path / "net.plan"
    plan = engine.build(bf16, out, target=targets, builder="rtx").plan
    assert plan is not None and plan.attested is not None
    assert plan.attested.dtypes == {"BFloat16": plan.attested.convolutions}
    assert plan.attested.unfused_adds == ()
    assert plan.targets == (targets or ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121"))
    result = layers.load(out, read_sidecar(out)).layers
    assert any(layer.dtype == "BFloat16" for layer in result)


def test_sm_75_is_refused_before_the_build(bf16: Path, tmp_path: Path) -> None:
    for target in (("sm_75",), ("sm_75", "sm_80")):
        with pytest.raises(InputError, match=r"sm_75.*BF16"):
            engine.build(bf16, tmp_path / "net.plan", target=target, builder="rtx")
        with pytest.raises(InputError, match=r"sm_75.*BF16"):
            engine.check(bf16, target=target, builder="rtx")
    assert not list(tmp_path.iterdir())
