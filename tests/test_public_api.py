"""`import rtresnet` is instant, every public name is loaded on first use, results are typed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import rtresnet
from rtresnet.core.config import Config
from rtresnet.core.serialization import json_schema


def test_import_loads_nothing_of_ours_and_no_library() -> None:
    code = (
        "import sys; import rtresnet; names = set(sys.modules); "
        "assert not {n for n in names if n.startswith('rtresnet.')}, names; "
        "assert not {'numpy', 'torch', 'onnx', 'click', 'rich'} & names"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_loaded_and_listed() -> None:
    assert set(rtresnet.__all__) <= set(dir(rtresnet))
    for name in rtresnet.__all__:
        assert getattr(rtresnet, name) is not None
    with pytest.raises(AttributeError):
        rtresnet.nothing  # noqa: B018


def test_configs_are_frozen_and_refuse_wrong_values() -> None:
    configs = [getattr(rtresnet, name) for name in rtresnet.__all__ if name.endswith("Config")]
    assert len(configs) >= 15
    for config in configs:
        assert issubclass(config, Config) and config.__dataclass_params__.frozen
        with pytest.raises(TypeError):
            config("positional")
    with pytest.raises(rtresnet.UnknownNameError):
        rtresnet.BuildConfig(builder="none")  # type: ignore[arg-type]
    with pytest.raises(rtresnet.InputError):
        rtresnet.QuantizeConfig(calib_images=0)
    with pytest.raises(rtresnet.InputError):
        rtresnet.QuantizeConfig(precision="fp16", calib="digits")
    assert rtresnet.BuildConfig(targets=["sm_89"]).targets == ("sm_89",)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [n for n in rtresnet.__all__ if n.endswith("Result")])
def test_results_are_frozen_and_have_a_schema(name: str) -> None:
    result = getattr(rtresnet, name)
    assert dataclasses.is_dataclass(result) and result.__dataclass_params__.frozen
    assert json_schema(result)["$ref"].endswith(name)


@pytest.mark.slow
def test_pipeline_from_python_makes_what_the_commands_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnxruntime", "sklearn"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    run = rtresnet.train(rtresnet.TrainConfig(model="resnet8", data="digits", epochs=2))
    onnx = rtresnet.export(run.checkpoint, "engines/net.onnx")
    assert onnx.path == Path("engines/net.onnx") and not onnx.plans
    int8 = rtresnet.quantize(onnx.path, rtresnet.QuantizeConfig(calib="digits", calib_images=64))
    accuracy = rtresnet.evaluate(int8.path, "digits")
    assert accuracy.n == 359 and accuracy.top1_percent > 50
    with rtresnet.load(run.checkpoint) as torch, rtresnet.load(onnx.path) as session:
        images = session.example(2)
        assert abs(torch.logits(images) - session.logits(images)).max() < 1e-3
        assert torch.classes == session.classes
    assert rtresnet.inspect(int8.path).chain[-1].path.name == "best.pt"


def test_wrong_arguments_are_input_errors(engines: Path) -> None:
    pytest.importorskip("onnxruntime")
    with rtresnet.load(engines / "resnet8.onnx") as session:
        for images in ([], ["a.png"]):
            with pytest.raises(rtresnet.InputError):
                session.prepare(images)  # type: ignore[arg-type]
    with pytest.raises(rtresnet.InputError):
        rtresnet.benchmark([])
