"""Small nets as ONNX files with sidecars, for tests of the builder and the runtime."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from rtresnet.core import artifacts
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Sidecar, Weights
from rtresnet.exporter.fold import fold
from rtresnet.exporter.writer import to_onnx
from rtresnet.models import checkpoint, zoo
from rtresnet.quantization import calibrate, half, qdq


def noise(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Return standard normal float32 [count, 3, size, size]."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3, size, size)).astype(np.float32)


def publish(
    model: onnx.ModelProto,
    path: Path,
    precision: str,
    size: int = 32,
    shortcut: str | None = None,
) -> Sidecar:
    """Write a model with the sidecar of the net that its graph is named after."""
    return artifacts.publish(
        path,
        lambda temporary: temporary.write_bytes(model.SerializeToString()),
        Sidecar(
            kind="onnx",
            file=path.name,
            model=checkpoint.model_of(zoo.spec(model.graph.name, shortcut=shortcut)),
            input=Preprocess.for_size(size),
            weights=Weights(origin="untrained"),
            precision=precision,
            measured={"parity": {"n": 3}},
        ),
    )


def maker(folder: Path) -> Callable[..., Path]:
    """Return a function that writes a file once, as in make("resnet8", "int8", size=32)."""

    @cache
    def make(name: str, precision: str, size: int = 32, shortcut: str | None = None) -> Path:
        torch.manual_seed(0)
        net = zoo.build(zoo.spec(name, shortcut=shortcut))
        with torch.no_grad():
            for norm in net.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.bias.normal_(0, 0.2)
        model = to_onnx(fold(net.eval()), size=size, name=name)
        if precision == "fp16":
            model = half.to_half(model)
        elif precision == "int8":
            tensors = list(qdq.placement(model))
            images = noise(16, size, seed=9)
            scales = calibrate.calibrate(model, tensors, lambda: [images], "max").scales
            model = qdq.insert(model, scales)
        path = folder / f"{name}{shortcut or ''}-{precision}.onnx"
        publish(model, path, precision, size, shortcut)
        return path

    return make
