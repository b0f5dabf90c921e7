"""Exported nets and their INT8 form."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from rtresnet.exporter.fold import fold
from rtresnet.exporter.writer import to_onnx
from rtresnet.models import zoo
from rtresnet.quantization import calibrate, qdq

pytest.importorskip("onnxruntime")

Exported = Callable[..., onnx.ModelProto]
Images = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def images() -> Images:
    """images(count, size, seed=0): standard normal float32 [count, 3, size, size]."""

    def make(count: int, size: int, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return rng.standard_normal((count, 3, size, size)).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def exported() -> Exported:
    """exported("resnet8", 32): a folded FP32 model with biases that are not zero. Read only."""

    @functools.cache
    def export(name: str, size: int, **options: str) -> onnx.ModelProto:
        torch.manual_seed(0)
        net = zoo.build(zoo.spec(name, **options))
        with torch.no_grad():
            for norm in net.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.weight.uniform_(0.5, 1.5)
                    norm.bias.normal_(0, 0.2)
        return to_onnx(fold(net.eval()), size=size, name=name)

    return export


@pytest.fixture(scope="session")
def quantized(exported: Exported, images: Images) -> Exported:
    """quantized("resnet8", 32): the same model in INT8, by `max` on eight images. Read only."""

    @functools.cache
    def quantize(name: str, size: int, **options: str) -> onnx.ModelProto:
        model = exported(name, size, **options)
        tensors = list(qdq.placement(model))
        calibration = calibrate.calibrate(model, tensors, lambda: [images(8, size)], "max")
        return qdq.insert(model, calibration.scales)

    return quantize
