from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import rtresnet
from rtresnet.core import artifacts, atomic_io, hardware
from rtresnet.core.artifacts import sidecar_path
from rtresnet.core.errors import ArtifactError, InputError, UnavailableError, UnknownNameError
from rtresnet.core.hardware import Gpu
from rtresnet.core.serialization import to_json
from rtresnet.core.sidecar import Link, Plan, Profile, Sidecar
from rtresnet.runtime.loading import load
from rtresnet.runtime.session import Session

OnnxFile = Callable[..., Path]
Images = Callable[..., np.ndarray]


@pytest.fixture
def copied(onnx_file: OnnxFile, tmp_path: Path) -> Path:
    """An FP32 file with its sidecar, to spoil."""
    source = onnx_file("resnet8", "fp32")
    shutil.copy(source, tmp_path)
    shutil.copy(sidecar_path(source), tmp_path)
    return tmp_path / source.name


@pytest.fixture
def plan(copied: Path) -> Path:
    """What says of itself that it is a plan of the installed RTX; it is never deserialized."""
    trt = pytest.importorskip("tensorrt_rtx")
    parent = artifacts.read_sidecar(copied)
    assert parent is not None
    path = copied.parent / "net.plan"
    artifacts.publish(
        path,
        lambda temporary: temporary.write_bytes(b"not really a plan"),
        dataclasses.replace(
            parent,
            kind="plan",
            parent=artifacts.link_to(copied, path),
            plan=Plan(
                builder="tensorrt_rtx",
                version=trt.__version__,
                targets=("sm_86", "sm_89"),
                profiles=(Profile(min=1, opt=8, max=32),),
                seconds=1.0,
            ),
            made_by={"command": "rtresnet build net.onnx --target sm_86,sm_89"},
        ),
    )
    return path


def rewrite(path: Path, **changes: object) -> None:
    """Change fields of the plan's part of a sidecar, as another machine would have written."""
    sidecar = artifacts.read_sidecar(path)
    assert sidecar is not None and sidecar.plan is not None
    changed = dataclasses.replace(
        sidecar,
        plan=dataclasses.replace(sidecar.plan, **changes),  # type: ignore[arg-type]
    )
    atomic_io.write_text(sidecar_path(path), to_json(changed))


def untouched(*arguments: object, **options: object) -> None:
    raise AssertionError("something was loaded before the sidecar was checked")


def test_an_onnx_file_runs(onnx_file: OnnxFile, images: Images) -> None:
    path = onnx_file("resnet8", "fp32")
    with rtresnet.load(path, provider="cpu") as session:
        logits = session(images(3))
        assert logits.shape == (3, 10) and np.isfinite(logits).all()
        assert session.path == path
        assert session.sidecar == artifacts.read_sidecar(path)
        assert session.preprocess.size == 32


def test_leaving_the_block_closes_the_backend(onnx_file: OnnxFile) -> None:
    class Counting:
        closed = 0

        def close(self) -> None:
            self.closed += 1

    backend = Counting()
    with Session(Path("x.onnx"), None, backend) as session:  # type: ignore[arg-type]
        assert backend.closed == 0
    assert backend.closed == 1
    with pytest.raises(KeyError), session:
        raise KeyError
    assert backend.closed == 2


def test_the_description_has_what_belongs_beside_a_figure(onnx_file: OnnxFile) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    with load(onnx_file("resnet8", "fp32"), provider="cpu", threads=1) as session:
        described = session.describe()
    assert described["device"] == hardware.cpu()
    assert described["provider"] == "ONNX Runtime CPU"
    assert described["threads"] == 1
    placement = described["placement"]
    assert isinstance(placement, dict)
    if hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):  # from 1.24
        assert (
            list(placement) == ["CPUExecutionProvider"] and placement["CPUExecutionProvider"] > 20
        )
    else:
        assert placement == {}
    versions = described["versions"]
    assert isinstance(versions, dict) and {"python", "onnxruntime", "numpy"} <= set(versions)


def test_a_file_that_does_not_match_is_refused_before_anything_is_loaded(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtresnet.runtime.ort.OrtBackend", untouched)
    data = bytearray(copied.read_bytes())
    data[len(data) // 2] ^= 1
    copied.write_bytes(data)
    with pytest.raises(ArtifactError, match="match its sidecar"):
        load(copied)
    copied.write_bytes(data[:1000])
    with pytest.raises(ArtifactError, match="truncated"):
        load(copied)
    copied.write_bytes(b"")
    with pytest.raises(ArtifactError, match="empty"):
        load(copied)


def test_a_plan_that_does_not_match_is_refused_before_anything_is_loaded(
    plan: Path, with_gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtresnet.runtime.trt_plan.open_cuda", untouched)
    plan.write_bytes(b"quite another plan")
    with pytest.raises(ArtifactError, match="match its sidecar"):
        load(plan)


def test_a_broken_sidecar_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtresnet.runtime.ort.OrtBackend", untouched)
    sidecar_path(copied).write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        load(copied)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.onnx.*no such file"):
        load(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("name", ["best.pt", "model.engine", "model", "model.onnx.json"])
def test_what_is_neither_onnx_nor_plan_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"something")
    with pytest.raises(InputError, match="ONNX file") as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_unknown_device_suggests_the_nearest(onnx_file: OnnxFile) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cuda'"):
        load(onnx_file("resnet8", "fp32"), device="cudaa")


def test_a_device_and_a_provider_that_contradict_are_refused(onnx_file: OnnxFile) -> None:
    """What is asked for is what runs."""
    for device, provider in (("cuda", "cpu"), ("cuda", "openvino"), ("cpu", "cuda")):
        with pytest.raises(InputError, match=provider):
            load(onnx_file("resnet8", "fp32"), device=device, provider=provider)


def test_a_file_without_sidecar_runs_but_knows_no_preprocessing(
    copied: Path, images: Images
) -> None:
    sidecar_path(copied).unlink()
    with load(copied, provider="cpu") as session:
        assert session.sidecar is None
        assert session(images(2)).shape == (2, 10)
        with pytest.raises(InputError, match=rf"{copied.name}\.json") as caught:
            _ = session.preprocess
    assert "rtresnet adopt" in (caught.value.fix or "")


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_a_plan_without_a_gpu_names_the_onnx_file(plan: Path, copied: Path, device: str) -> None:
    with pytest.raises(UnavailableError, match="NVIDIA GPU") as caught:
        load(plan, device=device)
    assert caught.value.exit_code == 3
    assert str(copied) in str(caught.value)


@pytest.mark.parametrize("options", [{"provider": "openvino"}, {"threads": 2}])
def test_a_plan_takes_no_provider_and_no_threads(plan: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="apply to ONNX files"):
        load(plan, **options)


def test_a_sidecar_names_a_builder_and_no_other_module(
    plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sidecar_path(plan)
    record = json.loads(path.read_text())
    record["plan"]["builder"] = "antigravity"
    path.write_text(json.dumps(record))
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    with pytest.raises(ArtifactError, match="names the builder 'antigravity'"):
        load(plan)
    assert "antigravity" not in sys.modules


@pytest.mark.usefixtures("without_gpu")
def test_a_plan_without_sidecar_and_gpu_is_refused_in_the_same_way(plan: Path) -> None:
    sidecar_path(plan).unlink()
    with pytest.raises(UnavailableError, match="its ONNX file"):
        load(plan)


def test_a_plan_asked_onto_the_cpu_is_not_told_that_there_is_no_gpu(
    plan: Path, copied: Path, with_gpu: Gpu
) -> None:
    with pytest.raises((UnavailableError, InputError)) as caught:
        load(plan, device="cpu")
    assert str(copied) in str(caught.value)
    assert "this machine has none" not in str(caught.value)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_plan_of_another_version_names_the_rebuild_command(
    plan: Path, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    result = (Gpu(name="Test GPU", capability=(8, 9), memory=1),) if gpu else ()
    monkeypatch.setattr(hardware, "gpus", lambda: result)
    monkeypatch.setattr("rtresnet.runtime.trt_plan.open_cuda", untouched)
    rewrite(plan, version="1.2.3.4")
    with pytest.raises(ArtifactError, match=r"built by tensorrt_rtx 1\.2\.3\.4") as caught:
        load(plan)
    message = str(caught.value)
    assert trt.__version__ in message
    assert "rtresnet build net.onnx --target sm_86,sm_89" in message


def test_a_plan_for_another_gpu_names_both(
    plan: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(name="Test GPU", capability=(12, 0), memory=1)
    monkeypatch.setattr(hardware, "gpus", lambda: (gpu,))
    monkeypatch.setattr("rtresnet.runtime.trt_plan.open_cuda", untouched)
    with pytest.raises(ArtifactError, match=r"sm_86, sm_89.*Test GPU.*sm_120") as caught:
        load(plan)
    assert caught.value.fix is not None
    assert caught.value.fix.endswith(f"rtresnet build {copied} --target current")


def test_load_rtx_plan_on_an_h100_says_builder_tensorrt(
    plan: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory=1)
    monkeypatch.setattr(hardware, "gpus", lambda: (gpu,))
    monkeypatch.setattr("rtresnet.runtime.trt_plan.open_cuda", untouched)
    with pytest.raises(ArtifactError, match="H100") as caught:
        load(plan)
    assert caught.value.fix is not None
    assert caught.value.fix.endswith(f"rtresnet build {copied} --builder tensorrt")


def test_load_tensorrt_plan_of_another_gpu_is_refused_before_tensorrt_is_imported(
    plan: Path, with_gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtresnet.core.trt_loading.load_tensorrt", untouched)
    monkeypatch.setattr("rtresnet.runtime.trt_plan.open_cuda", untouched)
    rewrite(plan, builder="tensorrt", targets=("sm_90",))
    with pytest.raises(ArtifactError, match=r"built for sm_90.*sm_89"):
        load(plan)


@pytest.mark.usefixtures("without_gpu")
def test_a_plan_of_a_builder_that_is_not_installed_names_its_package(
    plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "installed", lambda module: module != "tensorrt")
    rewrite(plan, builder="tensorrt")
    with pytest.raises(UnavailableError, match="pip install tensorrt-cu13") as caught:
        load(plan)
    assert caught.value.exit_code == 3


def test_the_parent_of_a_plan_may_be_gone(plan: Path, copied: Path) -> None:
    copied.unlink()
    sidecar: Sidecar | None = artifacts.verify(plan)
    assert sidecar is not None
    assert sidecar.parent == Link(file=copied.name, sha256=sidecar.parent.sha256)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("profiles", "batch"),
    [
        ([(1, 1, 1)], 1),
        ([(8, 8, 8)], 8),
        ([(1, 8, 32)], None),
        ([(1, 1, 1), (8, 8, 8)], None),
    ],
)
def test_batch_of_a_plan_is_that_of_its_only_size(
    profiles: list[tuple[int, int, int]], batch: int | None
) -> None:
    backend: Any = SimpleNamespace(profiles=[Profile(min=a, opt=b, max=c) for a, b, c in profiles])
    session = Session(Path("net.plan"), None, backend)
    assert session.batch == batch
    assert (session.batch_note is None) == (batch is None)
