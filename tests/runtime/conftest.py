"""ONNX files with sidecars in three precisions, and a machine with or without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rtresnet.core import artifacts
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Sidecar, Weights
from rtresnet.exporter.fold import fold
from rtresnet.exporter.writer import to_onnx
from rtresnet.models import checkpoint, zoo
from rtresnet.quantization import calibrate, fp16, qdq

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

    def make(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return rng.standard_normal((count, 3, size, size)).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory, images: Images) -> Callable[..., Path]:
    """onnx_file("resnet8", "int8", size=32): a file with its sidecar. Read only."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def make(name: str, precision: str, size: int = 32, shortcut: str | None = None) -> Path:
        torch.manual_seed(0)
        spec = zoo.spec(name, shortcut=shortcut)
        net = zoo.build(spec)
        with torch.no_grad():
            for norm in net.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.bias.normal_(0, 0.2)
        model = to_onnx(fold(net.eval()), size=size, name=name)
        if precision == "fp16":
            model = fp16.to_half(model)
        elif precision == "int8":
            tensors = list(qdq.placement(model))
            model = qdq.insert(
                model,
                calibrate.calibrate(
                    model, tensors, lambda: [images(16, size, seed=9)], "max"
                ).scales,
            )
        path = folder / f"{name}{shortcut or ''}-{precision}.onnx"
        artifacts.publish(
            path,
            lambda temporary: temporary.write_bytes(model.SerializeToString()),
            Sidecar(
                kind="onnx",
                file=path.name,
                model=checkpoint.model_of(spec),
                input=Preprocess.for_size(size),
                weights=Weights(origin="untrained"),
                precision=precision,
            ),
        )
        return path

    return make


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
