from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rtresnet.cli.main import main
from rtresnet.core import hardware, trt_loading
from rtresnet.core.errors import UnavailableError
from rtresnet.core.hardware import Gpu

pytest.importorskip("onnxruntime")


def doctor(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(file)]) == 0
    result: dict[str, Any] = json.loads(file.read_text())["result"]
    return result


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """CUDA opens on an RTX 40; `error` makes it fail, `capability` is another GPU's."""
    state = SimpleNamespace(error=None, capability=(8, 9), calls=0)

    @contextlib.contextmanager
    def active() -> Iterator[None]:
        yield

    def open_cuda() -> SimpleNamespace:
        state.calls += 1
        if state.error:
            raise UnavailableError(state.error)
        return SimpleNamespace(active=active, memory=lambda: (1, 2))

    def gpus() -> tuple[Gpu, ...]:
        return (Gpu(name="Test GPU", capability=state.capability, memory=1 << 30),)

    def load(module: str) -> SimpleNamespace:
        if module == "tensorrt":
            raise UnavailableError("tensorrt is not installed", fix="pip install tensorrt-cu13")
        return SimpleNamespace(__name__=module, __version__="1.7.1.116")

    monkeypatch.setattr("rtresnet.runtime.cuda.open_cuda", open_cuda)
    monkeypatch.setattr(hardware, "gpus", gpus)
    monkeypatch.setattr(hardware, "cuda_version", lambda: (13, 0))
    monkeypatch.setattr(trt_loading, "load_tensorrt", load)
    return state


def test_doctor_opens_cuda_before_it_says_that_plans_run(
    opened: SimpleNamespace, tmp_path: Path
) -> None:
    assert doctor(tmp_path)["runs"]["plans run on"] == "Test GPU, by TensorRT-RTX 1.7.1.116"
    assert opened.calls == 1


def test_doctor_with_a_driver_that_is_too_old_says_which_is_needed(
    opened: SimpleNamespace, tmp_path: Path
) -> None:
    opened.error = "cudaGetDevice failed: cudaErrorInsufficientDriver (35)"
    output = doctor(tmp_path)["runs"]["plans run on"]
    assert output.startswith("nothing") and "(35)" in output and "r580 or newer" in output


def test_doctor_asks_the_driver_for_its_version_where_cuda_opens_all_the_same(
    opened: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver API opens on every driver; TensorRT's libraries do not."""
    monkeypatch.setattr(hardware, "cuda_version", lambda: (12, 4))
    monkeypatch.setattr(hardware, "version", lambda *names: "1.7.1.116")
    output = doctor(tmp_path)["runs"]["plans run on"]
    assert output.startswith("nothing") and "r580 or newer" in output


def test_doctor_on_an_h100_with_tensorrt_rtx_only_says_that_plans_do_not_run(
    opened: SimpleNamespace, tmp_path: Path
) -> None:
    opened.capability = (9, 0)
    output = doctor(tmp_path)["runs"]["plans run on"]
    assert (
        output.startswith("nothing") and "sm_90" in output and "pip install tensorrt-cu13" in output
    )


def test_doctor_lists_what_only_a_gpu_needs_and_asks_for_it_there_only(
    opened: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hardware, "installed", lambda name: name in ("onnxruntime", "torch"))
    monkeypatch.setattr(hardware, "version", lambda *names: None)
    packages = {package["package"] for package in doctor(tmp_path)["packages"]}
    assert {"onnxruntime-gpu", "nvidia-ml-py"} <= packages
    output = " ".join(capsys.readouterr().out.split())
    assert "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'" in output
    assert "nvidia-ml-py" in output[output.index("Missing packages") :]
    monkeypatch.setattr(hardware, "gpus", tuple)
    doctor(tmp_path)
    output = " ".join(capsys.readouterr().out.split())
    assert "pip install 'onnxruntime-gpu" not in output
    assert "nvidia-ml-py" not in output[output.index("Missing packages") :]


@pytest.mark.parametrize(
    ("folders", "keep"),
    [
        ({"onnxruntime": "/a", "onnxruntime-gpu": "/a"}, "'onnxruntime-gpu[cuda,cudnn]'"),
        ({"onnxruntime": "/a", "onnxruntime-openvino": "/a"}, "'onnxruntime'"),
        ({"onnxruntime": "/a", "onnxruntime-openvino": "/b"}, None),
        ({"onnxruntime-gpu": "/a"}, None),
    ],
)
def test_doctor_sees_two_builds_of_onnx_runtime_in_one_folder(
    folders: dict[str, str],
    keep: str | None,
    opened: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = metadata.distribution

    def distribution(name: str) -> Any:
        if not name.startswith("onnxruntime") or "-ep-" in name:
            return real(name)
        if name not in folders:
            raise metadata.PackageNotFoundError(name)
        return SimpleNamespace(version="1.31.1", locate_file=Path(folders[name]).joinpath)

    monkeypatch.setattr(metadata, "distribution", distribution)
    conflicts = doctor(tmp_path)["conflicts"]
    output = " ".join(capsys.readouterr().out.split())
    if keep is None:
        assert conflicts == [] and "WARNING" not in output
        return
    (conflict,) = conflicts
    assert all(name in conflict for name in folders)
    names = " ".join(folders)
    assert conflict.endswith(f"pip uninstall -y {names} && pip install {keep}")
    assert "WARNING" in output


def test_doctor_names_an_onnx_runtime_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins
    import importlib
    import sys

    def broken(name: str, *rest: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("libonnxruntime.so.1: file too short")
        return real(name, *rest)

    real: Any = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", broken)
    real_import = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__",
        lambda name, *rest, **more: broken(name) if name == "onnxruntime"
        else real_import(name, *rest, **more),
    )  # fmt: skip
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(hardware, "installed", lambda name: name == "onnxruntime")
    result = doctor(tmp_path)
    versions = {package["package"]: package["version"] for package in result["packages"]}
    assert "file too short" in versions["onnxruntime"]
    assert "file too short" in result["runs"]["ONNX files run on"]
