from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

import rtresnet
from rtresnet.cli.main import main
from rtresnet.core.errors import ArtifactError
from rtresnet.onnxlib import metadata


def alone(source: Path, folder: Path) -> Path:
    """Return a file moved to another folder without its sidecar."""
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(source, folder))


@pytest.mark.parametrize("name", ["resnet8.onnx", "resnet8-int8.onnx", "resnet8-fp16.onnx"])
def test_file_without_its_sidecar_evaluates_the_same(
    name: str, engines: Path, tints: str, tmp_path: Path
) -> None:
    whole = rtresnet.evaluate(engines / name, tints)
    moved = rtresnet.evaluate(alone(engines / name, tmp_path / "moved"), tints)
    assert (moved.top1, moved.n) == (whole.top1, whole.n)
    assert len(moved.members[0].assumed) == len(whole.members[0].assumed)
    assert not any(line.startswith("input") for line in moved.members[0].assumed)
    assert moved.members[0].precision == whole.members[0].precision
    with rtresnet.load(tmp_path / "moved" / name) as session:
        assert session.classes == rtresnet.read_sidecar(engines / name).model.classes  # type: ignore[union-attr]


def test_embedded_input_and_topk_are_described(engines: Path, tmp_path: Path) -> None:
    from rtresnet.workflows import embedded

    plain = tmp_path / "net.onnx"
    for suffix in ("", ".json"):
        shutil.copy(f"{engines / 'resnet8.onnx'}{suffix}", f"{plain}{suffix}")
    changed, _ = embedded.write(plain, rtresnet.EmbedConfig(input="uint8-nhwc", topk=2))
    with rtresnet.load(alone(changed, tmp_path / "moved")) as session:
        assert session.topk == 2 and session.backend.layout == "nhwc"
        assert session.preprocess.layout == "NHWC RGB uint8"


def test_quantize_and_build_take_a_file_without_its_sidecar(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = alone(engines / "resnet8.onnx", tmp_path / "moved")
    result = rtresnet.quantize(source, rtresnet.QuantizeConfig(calib="none"))
    reference = rtresnet.read_sidecar(engines / "resnet8.onnx")
    assert reference is not None
    assert result.sidecar.input == reference.input and result.sidecar.model == reference.model
    assert not result.sidecar.assumed
    assert result.sidecar.parent is not None and result.sidecar.parent.sha256 == reference.sha256
    pytest.importorskip("tensorrt_rtx")
    plan = rtresnet.build(source, rtresnet.BuildConfig(builder="rtx", targets=("sm_89",)))
    sidecar = rtresnet.read_sidecar(plan.path)
    assert sidecar is not None and sidecar.input == reference.input


def test_description_names_no_folder(engines: Path) -> None:
    model = onnx.load(engines / "resnet8-int8.onnx")
    record = json.loads(metadata.properties_of(model)[metadata.DESCRIPTION.key])
    assert record["parent"]["file"] == "resnet8.onnx" and not record["made_by"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"schema": 99}', '{"schema": 1, "kind": 5}', "\udc80"]
)
def test_damaged_description_is_refused(
    text: str, engines: Path, tints: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtifactError, match=r"rtresnet\.model"):
        metadata.DESCRIPTION.decode(text)
    if text.isascii():
        model = onnx.load(engines / "resnet8.onnx")
        for entry in model.metadata_props:
            if entry.key == metadata.DESCRIPTION.key:
                entry.value = text
        path = tmp_path / "damaged.onnx"
        onnx.save(model, path)
        assert main(["eval", str(path), "--data", tints]) == 2
        assert str(path) in capsys.readouterr().err
