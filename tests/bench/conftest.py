"""ONNX files of a ResNet-8 in three precisions, also under neutral names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from rtresnet.exporter.fold import fold
from rtresnet.exporter.writer import to_onnx
from rtresnet.models import zoo
from rtresnet.quantization import calibrate, half, qdq


@pytest.fixture(scope="session")
def net_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """net_file("int8", "resnet8", "B"): an ONNX file without sidecar. Read only."""
    folder = tmp_path_factory.mktemp("nets")

    def make(precision: str = "fp32", name: str = "resnet8", shortcut: str = "B") -> Path:
        path = folder / f"{name}{shortcut}-{precision}.onnx"
        if path.exists():
            return path
        torch.manual_seed(0)
        model = to_onnx(
            fold(zoo.build(zoo.spec(name, shortcut=shortcut)).eval()), size=32, name=name
        )
        if precision == "fp16":
            model = half.to_half(model)
        elif precision == "int8":
            images = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
            calibration = calibrate.calibrate(
                model, list(qdq.placement(model)), lambda: [images], "max"
            )  # fmt: skip
            model = qdq.insert(model, calibration.scales)
        elif precision == "nameless":
            tensors = [t for n in model.graph.node for t in (*n.input, *n.output)]
            renamed = {tensor: f"t{i}" for i, tensor in enumerate(dict.fromkeys(tensors))}
            for tensor in (*model.graph.initializer, *model.graph.input, *model.graph.output):
                tensor.name = renamed.get(tensor.name, tensor.name)
            for index, node in enumerate(model.graph.node):
                node.name = f"node_{node.op_type}_{index}"
                node.input[:] = [renamed[t] for t in node.input]
                node.output[:] = [renamed[t] for t in node.output]
            del model.graph.value_info[:]
        onnx.save(model, path)
        return path

    return make
