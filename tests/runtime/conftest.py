"""ONNX files with sidecars in three precisions, with or without a fake GPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import published

Images = Callable[..., np.ndarray]

# Tests have no package to be imported from: `import fake_gpu` and others find it here.
for _name in ("fake_gpu", "stub_gpu", "hide_vnni"):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parent / f"{_name}.py")
    assert _spec is not None and _spec.loader is not None
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])


@pytest.fixture(scope="session")
def images() -> Images:
    """images(count, size=32, seed=0): standard normal float32 [count, 3, size, size]."""

    return published.noise


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """onnx_file("resnet8", "int8", size=32): a file with its sidecar. Read only."""
    pytest.importorskip("onnxruntime")
    return published.maker(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="session")
def without_vnni(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables for a process that takes this CPU for one with AVX2 and no more."""
    hide_vnni = sys.modules["hide_vnni"]
    try:
        return dict(hide_vnni.environment(tmp_path_factory.mktemp("no_vnni")))
    except hide_vnni.CannotHideError as error:
        pytest.skip(str(error))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A fake GPU with a fake TensorRT on it; see fake_gpu.py."""
    return sys.modules["fake_gpu"].Bench(monkeypatch, tmp_path)
