"""`rtresnet package --triton`: output, files and errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from rtresnet.cli.main import main
from rtresnet.core import artifacts
from rtresnet.core.sidecar import Plan, Profile


def publish_plan(source: Path, path: Path, profiles: tuple[Profile, ...]) -> Path:
    """Return a file with the sidecar of a plan by TensorRT; nothing here reads its bytes."""
    sidecar = artifacts.read_sidecar(source)
    assert sidecar is not None
    plan = Plan(
        builder="tensorrt", version="10.14.1.48", targets=("sm_90",), profiles=profiles, seconds=9.0
    )
    made = dataclasses.replace(
        sidecar, kind="plan", plan=plan, parent=artifacts.link_to(source, path), made_by={}
    )
    artifacts.publish(path, lambda target: target.write_bytes(b"ftrt and so on"), made)
    return path


@pytest.fixture
def tensorrt_plan(copied: Path) -> Path:
    profiles = (Profile(min=1, opt=1, max=4), Profile(min=4, opt=16, max=64))
    return publish_plan(copied / "resnet8-int8.onnx", copied / "served.plan", profiles)


def publish_fixed(folder: Path, batch: int) -> Path:
    """Return the net with a fixed batch, with a sidecar."""
    source, path = folder / "resnet8-int8.onnx", folder / "fixed.onnx"
    model = onnx.load(source)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    sidecar = artifacts.read_sidecar(source)
    assert sidecar is not None
    artifacts.publish(path, lambda target: target.write_bytes(model.SerializeToString()), sidecar)
    return path


def config(root: Path, name: str) -> Any:
    pb = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse((root / name / "config.pbtxt").read_text(), pb.ModelConfig())


def test_package_onnx_file_has_labels_and_record(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, record, source = tmp_path / "models", tmp_path / "out.json", engines / "resnet8-int8.onnx"
    arguments = ["package", str(source), "--triton", str(root), "--json", str(record)]
    assert main(arguments) == 0
    output = capsys.readouterr()
    folder = root / "resnet8-int8" / "1"
    assert f"{folder}: onnxruntime, batches to 32, " in output.out
    assert f"next: tritonserver --model-repository {root}" in output.out
    assert "builds a TensorRT engine" in output.err
    result = json.loads(record.read_text())["result"]
    assert (result["name"], result["version"], result["max_batch"]) == ("resnet8-int8", 1, 32)
    assert (folder / "model.onnx").read_bytes() == source.read_bytes()
    sidecar = artifacts.verify(folder / "model.onnx")
    assert sidecar is not None
    assert [state for _, _, state in artifacts.chain(folder / "model.onnx")][:3] == ["ok"] * 3
    labels = (root / "resnet8-int8" / "labels.txt").read_text().splitlines()
    assert tuple(labels) == sidecar.model.classes
    settings = config(root, "resnet8-int8")
    assert (settings.name, settings.backend) == ("resnet8-int8", "onnxruntime")
    assert settings.input[0].name == onnx.load(source).graph.input[0].name
    assert list(settings.input[0].dims) == [3, 32, 32] and list(settings.output[0].dims) == [4]
    assert settings.output[0].label_filename == "labels.txt"
    assert settings.parameters["sha256"].string_value == sidecar.sha256
    assert settings.parameters["parent_sha256"].string_value == sidecar.parent.sha256  # type: ignore[union-attr]
    assert "mean (0.485, 0.456, 0.406)" in settings.parameters["input"].string_value


def test_package_tensorrt_plan_states_its_version(
    tensorrt_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "models"
    options = ["--name", "net", "--version", "7", "--max-wait", "100us", "--instances", "2"]
    assert main(["package", str(tensorrt_plan), "--triton", str(root), *options]) == 0
    output = capsys.readouterr()
    assert "the container needs TensorRT 10.14.1.48 and a GPU of sm_90" in output.err
    assert (root / "net" / "7" / "model.plan").read_bytes() == tensorrt_plan.read_bytes()
    settings = config(root, "net")
    assert (settings.backend, settings.max_batch_size) == ("tensorrt", 64)
    assert list(settings.dynamic_batching.preferred_batch_size) == [1, 16]
    assert settings.dynamic_batching.max_queue_delay_microseconds == 100
    (group,) = settings.instance_group
    assert (group.count, group.kind, list(group.profile)) == (2, 1, ["0", "1"])
    assert settings.parameters["tensorrt"].string_value == "10.14.1.48"


def test_package_tensorrt_rtx_plan_is_refused_with_fix(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, root = copied / "resnet8-int8.plan", tmp_path / "models"
    if not plan.exists():
        pytest.skip("no TensorRT-RTX here")
    assert main(["package", str(plan), "--triton", str(root)]) == 2
    message = capsys.readouterr().err
    assert "built by TensorRT-RTX" in message and "--builder tensorrt" in message
    assert f"package {copied / 'resnet8-int8.onnx'}" in message
    artifacts.sidecar_path(plan).unlink()  # its first bytes say so too
    assert main(["package", str(plan), "--triton", str(root)]) == 2
    assert "built by TensorRT-RTX" in capsys.readouterr().err
    assert not root.exists()


@pytest.mark.parametrize(
    ("options", "output"),
    [
        (["--max-batch", "65"], "the plan accepts at most 64; rtresnet build"),
        (["--device", "cpu"], "on a GPU only"),
        (["--name", "../net"], "--name ../net"),
    ],
)
def test_package_plan_with_impossible_options_is_refused(
    tensorrt_plan: Path, tmp_path: Path, options: list[str], output: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root = tmp_path / "models"
    assert main(["package", str(tensorrt_plan), "--triton", str(root), *options]) == 2
    assert output in capsys.readouterr().err and not root.exists()


def test_package_plan_without_sidecar_or_parent_is_refused(
    tensorrt_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["package", str(tensorrt_plan), "--triton", str(tmp_path / "models")]
    parent = tensorrt_plan.parent / "resnet8-int8.onnx"
    parent.write_bytes(b"another file")
    assert main(arguments) == 2 and "has changed since" in capsys.readouterr().err
    parent.unlink()
    assert main(arguments) == 2 and "also copy the ONNX file" in capsys.readouterr().err
    artifacts.sidecar_path(tensorrt_plan).unlink()
    assert main(arguments) == 2 and "no sidecar" in capsys.readouterr().err


def test_package_onnx_file_without_sidecar_has_no_labels(copied: Path, tmp_path: Path) -> None:
    path, root = copied / "resnet8.onnx", tmp_path / "models"
    artifacts.sidecar_path(path).unlink()
    assert main(["package", str(path), "--triton", str(root), "--device", "cuda"]) == 0
    assert not (root / "resnet8" / "labels.txt").exists()
    assert not artifacts.sidecar_path(root / "resnet8" / "1" / "model.onnx").exists()
    settings = config(root, "resnet8")
    assert not settings.output[0].label_filename and settings.instance_group[0].kind == 1


@pytest.mark.parametrize("batch", [1, 8])
def test_package_fixed_batch_writes_whole_shapes_and_no_batching(
    copied: Path, tmp_path: Path, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Triton refuses max_batch_size above 0 unless the first dimension is open."""
    path, root = publish_fixed(copied, batch), tmp_path / "models"
    assert main(["package", str(path), "--triton", str(root), "--max-batch", "4"]) == 2
    assert "leave --max-batch out" in capsys.readouterr().err and not root.exists()
    assert main(["package", str(path), "--triton", str(root)]) == 0
    assert f"batch is fixed at {batch}" in capsys.readouterr().err
    written = config(root, "fixed")
    assert written.max_batch_size == 0 and not written.HasField("dynamic_batching")
    assert list(written.input[0].dims) == [batch, 3, 32, 32] and written.input[0].format == 0
    assert list(written.output[0].dims) == [batch, 4]
    assert bool(written.output[0].label_filename) == (batch == 1)  # labels go by position


def test_package_plan_of_a_fixed_batch_writes_whole_shapes(copied: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    plan = publish_plan(
        publish_fixed(copied, 8), copied / "fixed.plan", (Profile(min=8, opt=8, max=8),)
    )
    assert main(["package", str(plan), "--triton", str(root)]) == 0
    written = config(root, "fixed")
    assert (written.backend, written.max_batch_size) == ("tensorrt", 0)
    assert list(written.input[0].dims) == [8, 3, 32, 32]
    assert not written.HasField("dynamic_batching") and not written.instance_group[0].profile


@pytest.mark.parametrize("content", [b"text\n", b"\x08\x08"])
def test_package_invalid_onnx_file_is_refused(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path, root = tmp_path / "some.onnx", tmp_path / "models"
    path.write_bytes(content)
    assert main(["package", str(path), "--triton", str(root)]) == 2
    assert "not a valid ONNX file" in capsys.readouterr().err and not root.exists()


def test_package_truncated_file_or_checkpoint_is_refused(
    copied: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, root = copied / "resnet8.onnx", ["--triton", str(tmp_path / "models")]
    path.write_bytes(path.read_bytes()[:2000])
    assert main(["package", str(path), *root]) == 2 and "truncated" in capsys.readouterr().err
    assert main(["package", str(trained / "best.pt"), *root]) == 2
    assert "rtresnet export" in capsys.readouterr().err


def test_package_same_file_twice_is_refused(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, root = engines / "resnet8.onnx", tmp_path / "models"
    assert main(["package", str(path), "--triton", str(root)]) == 0
    assert main(["package", str(path), "--triton", str(root)]) == 2
    assert "already the same file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "microseconds"),
    [
        (["--max-wait", "2ms"], 2000),
        (["--max-wait", "0"], 0),
        (["--max-delay-us", "70"], 70),
        ([], 500),
    ],
)
def test_package_maximum_wait_in_its_form_and_in_the_older_one(
    engines: Path, tmp_path: Path, option: list[str], microseconds: int
) -> None:
    root = tmp_path / "models"
    assert main(["package", str(engines / "resnet8.onnx"), "--triton", str(root), *option]) == 0
    delay = config(root, "resnet8").dynamic_batching.max_queue_delay_microseconds
    assert delay == microseconds
