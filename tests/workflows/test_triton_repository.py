"""Triton model repositories, checked with Triton's own schema if it is installed."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rtresnet.core import artifacts, atomic_io
from rtresnet.core.errors import InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Link, Plan, Profile, Sidecar, Weights
from rtresnet.models import checkpoint, zoo
from rtresnet.workflows import triton_repository as triton
from rtresnet.workflows.triton_repository import ModelConfig, TritonTensor

IMAGES = TritonTensor(name="images", dtype="float32", dims=(3, 32, 32))
LOGITS = TritonTensor(name="logits", dtype="float32", dims=(10,))
CLASSES = tuple(f"class {index}" for index in range(10))


def model(**changed: Any) -> ModelConfig:
    base = ModelConfig(
        name="net", kind="onnx", precision="fp32", inputs=(IMAGES,), outputs=(LOGITS,),
        labels=CLASSES, max_batch=32, max_delay_us=500, instances=1, device="auto",
        parameters={"sha256": "abc"},
    )  # fmt: skip
    return dataclasses.replace(base, **changed)


def plan(*profiles: tuple[int, int, int], **changed: Any) -> ModelConfig:
    made = tuple(Profile(min=a, opt=b, max=c) for a, b, c in profiles)
    return model(kind="plan", profiles=made, **changed)


def parsed(text: str) -> Any:
    """Return the text as Triton's ModelConfig; an unknown field or a wrong type raises."""
    pb = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse(text, pb.ModelConfig())


def test_config_onnx_file_matches_tritons_schema() -> None:
    config = parsed(triton.config(model()))
    assert (config.name, config.backend, config.max_batch_size) == ("net", "onnxruntime", 32)
    (image,), (logits,) = config.input, config.output
    assert (image.name, image.data_type, list(image.dims), image.format) == (
        "images", 11, [3, 32, 32], 2,
    )  # fmt: skip
    assert (logits.name, list(logits.dims), logits.label_filename) == ("logits", [10], "labels.txt")
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert not config.dynamic_batching.preferred_batch_size
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, 0)  # KIND_AUTO
    assert config.version_policy.latest.num_versions == 1
    assert config.parameters["sha256"].string_value == "abc"
    assert not config.optimization.execution_accelerators.gpu_execution_accelerator


def test_config_plan_prefers_its_best_batches_and_names_all_profiles() -> None:
    config = parsed(triton.config(plan((1, 1, 4), (4, 16, 32), instances=2)))
    assert config.backend == "tensorrt"
    assert list(config.dynamic_batching.preferred_batch_size) == [1, 16]
    (group,) = config.instance_group
    assert (group.count, group.kind, list(group.profile)) == (2, 1, ["0", "1"])
    assert not parsed(triton.config(plan((1, 8, 32)))).instance_group[0].profile


def test_config_prefers_no_batch_above_the_largest() -> None:
    config = parsed(triton.config(plan((1, 8, 32), max_batch=4)))
    assert config.max_batch_size == 4 and not config.dynamic_batching.preferred_batch_size


@pytest.mark.parametrize(("device", "kind"), [("cuda", 1), ("cpu", 2), ("auto", 0)])
def test_config_int8_onnx_file_uses_tensorrt_on_gpus(device: str, kind: int) -> None:
    config = parsed(triton.config(model(precision="int8", device=device)))
    assert config.instance_group[0].kind == kind
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [entry.name for entry in accelerators] == ([] if device == "cpu" else ["tensorrt"])
    if accelerators:
        assert dict(accelerators[0].parameters) == {
            "precision_mode": "INT8",
            "trt_profile_min_shapes": "images:1x3x32x32",
            "trt_profile_opt_shapes": "images:8x3x32x32",
            "trt_profile_max_shapes": "images:32x3x32x32",
        }


def test_config_pixels_and_topk_have_their_shapes() -> None:
    pixels = TritonTensor(name="images", dtype="uint8", dims=(32, 32, 3))
    best = (
        TritonTensor(name="indices", dtype="int64", dims=(5,)),
        TritonTensor(name="probabilities", dtype="float32", dims=(5,)),
    )
    config = parsed(triton.config(model(inputs=(pixels,), outputs=best)))
    assert (config.input[0].data_type, config.input[0].format) == (2, 1)  # UINT8, NHWC
    assert [output.data_type for output in config.output] == [9, 11]
    # a label goes by position, and the first of the K best is not class 0
    assert not any(output.label_filename for output in config.output)


def test_config_text_is_quoted_losslessly() -> None:
    odd = 'rtresnet build "a b.onnx"\n\\back\x01é'
    assert parsed(triton.config(model(parameters={"made_by": odd}))).parameters[
        "made_by"
    ].string_value == odd  # fmt: skip


@pytest.mark.parametrize("name", ["", ".net", "a/b", "..", "a b", "é"])
def test_model_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="--name"):
        model(name=name)


@pytest.mark.parametrize(
    ("profiles", "batch"), [([(2, 8, 32)], 1), ([(1, 1, 1), (8, 16, 32)], 2), ([(1, 8, 16)], 17)]
)
def test_model_plan_without_a_profile_for_a_batch_is_refused(
    profiles: list[tuple[int, int, int]], batch: int
) -> None:
    with pytest.raises(InputError, match=f"a batch of {batch},.*--batch 1:8:32"):
        plan(*profiles)


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, Sidecar]:
    """A file that stands for a plan, with the sidecar of one."""
    path, parent = tmp_path / "engines" / "net.plan", tmp_path / "engines" / "net.onnx"
    parent.parent.mkdir()
    parent.write_bytes(b"an ONNX file")
    sidecar = Sidecar(
        kind="plan",
        file="",
        model=checkpoint.model_of(zoo.spec("resnet8")),
        input=Preprocess.for_size(32),
        weights=Weights(origin="untrained"),
        precision="fp16",
        parent=Link(file="net.onnx", sha256=atomic_io.sha256(parent)),
        plan=Plan(
            builder="tensorrt", version="10.14.1.48", targets=("sm_90",),
            profiles=(Profile(min=1, opt=8, max=32),), seconds=1.0,
        ),
        made_by={"command": "rtresnet build net.onnx"},
    )  # fmt: skip
    return path, artifacts.publish(path, lambda p: p.write_bytes(b"a plan"), sidecar)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_write_copies_the_file_and_a_sidecar_with_its_parent(
    tmp_path: Path, source: tuple[Path, Sidecar]
) -> None:
    path, sidecar = source
    root = tmp_path / "models"
    folder = triton.write(root, plan((1, 8, 32)), path, sidecar)
    assert folder == root / "net" / "1"
    assert files(root) == {
        "net/config.pbtxt", "net/labels.txt", "net/1/model.plan", "net/1/model.plan.json",
    }  # fmt: skip
    assert (root / "net" / "labels.txt").read_text().splitlines() == list(CLASSES)
    copied = artifacts.verify(folder / "model.plan")
    assert copied is not None and copied.made_by["command"] == "rtresnet build net.onnx"
    assert [state for _, _, state in artifacts.chain(folder / "model.plan")] == ["ok", "no sidecar"]


def test_write_second_version_keeps_the_first(tmp_path: Path, source: tuple[Path, Sidecar]) -> None:
    path, sidecar = source
    root = tmp_path / "models"
    triton.write(root, plan((1, 8, 32)), path, sidecar)
    path.write_bytes(b"another plan")
    second = triton.write(root, plan((1, 8, 32), max_delay_us=9), path, None)
    assert second.name == "2" and triton.versions(root / "net") == [1, 2]
    assert (root / "net" / "1" / "model.plan").read_bytes() == b"a plan"
    assert "max_queue_delay_microseconds: 9" in (root / "net" / "config.pbtxt").read_text()


def test_write_existing_version_is_refused(tmp_path: Path, source: tuple[Path, Sidecar]) -> None:
    path, sidecar = source
    root, expected = tmp_path / "models", plan((1, 8, 32))
    triton.write(root, expected, path, sidecar, 3)
    before = {name: (root / name).read_bytes() for name in files(root)}
    with pytest.raises(InputError, match="already the same file"):
        triton.write(root, expected, path, sidecar)
    path.write_bytes(b"another plan")
    with pytest.raises(InputError, match=r"another file.*for 4"):
        triton.write(root, expected, path, None, 3)
    with pytest.raises(InputError, match="Triton serves the latest"):
        triton.write(root, expected, path, None, 2)
    pixels = TritonTensor(name="images", dtype="uint8", dims=(32, 32, 3))
    for other in (plan((1, 8, 32), inputs=(pixels,)), model(kind="onnx")):
        with pytest.raises(InputError, match="choose another --name"):
            triton.write(root, other, path, None)
    with pytest.raises(InputError, match="names other classes"):
        triton.write(root, plan((1, 8, 32), labels=CLASSES[::-1]), path, None)
    assert {name: (root / name).read_bytes() for name in files(root)} == before


@pytest.mark.parametrize("existing", [False, True])
def test_write_failed_copy_leaves_nothing(
    tmp_path: Path, source: tuple[Path, Sidecar], existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sidecar = source
    root = tmp_path / "models"
    if existing:
        triton.write(root, plan((1, 8, 32)), path, sidecar)
        path.write_bytes(b"another plan")
    before = files(root)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rtresnet.workflows.triton_repository.shutil.copyfile", full)
    with pytest.raises(OSError):
        triton.write(root, plan((1, 8, 32)), path, sidecar)
    assert files(root) == before
    assert not [entry for entry in root.rglob("*") if entry.name.startswith(".")]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("last", ["copyfile", "config"])
def test_write_killed_leaves_no_partial_version_and_can_be_repeated(
    tmp_path: Path, source: tuple[Path, Sidecar], existing: bool, last: str
) -> None:
    path, sidecar = source
    root = tmp_path / "models"
    if existing:
        triton.write(root, plan((1, 8, 32)), path, sidecar)
        path.write_bytes(b"another plan")
    code = f"""
import os, signal
from rtresnet.core.sidecar import Profile
from rtresnet.workflows import triton_repository as triton
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if {last!r} == "copyfile":
    triton.shutil.copyfile = die
else:
    triton.Path.rename = die
from rtresnet.workflows.triton_repository import ModelConfig, TritonTensor
triton.write({str(root)!r}, triton.{plan((1, 8, 32))!r}, {str(path)!r}, None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert triton.versions(root / "net") == ([1] if existing else [])
    assert triton.write(root, plan((1, 8, 32)), path, None).name == ("2" if existing else "1")
    assert atomic_io.sha256(root / "net" / ("2" if existing else "1") / "model.plan") == (
        atomic_io.sha256(path)
    )


def test_versions_ignore_other_folders(tmp_path: Path) -> None:
    for name in ("1", "12", "01", "0", ".2.tmp", "old", "3"):
        (tmp_path / name).mkdir()
    (tmp_path / "3").rmdir()
    (tmp_path / "3").write_text("a file")
    assert triton.versions(tmp_path) == [1, 12]
    assert triton.versions(tmp_path / "nothing") == []
