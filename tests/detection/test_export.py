"""The ONNX file of a detector: equal to torch, and to a reference file of standard operators."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from rtresnet.core import detector_preprocess
from rtresnet.core.sidecar import Detection
from rtresnet.detection import export, parity
from rtresnet.detection import net as detector
from rtresnet.models import zoo
from tests.onnx_outputs import run_model

ort = pytest.importorskip("onnxruntime")
SPEC = Detection(
    canvas=(96, 128), anchors=(16.0, 32.0, 64.0), pool=7, width=0.25, candidates=200, regions=30,
    detections=20, least_score=0.01,
)  # fmt: skip
REFUSED = {"RoiAlign", "NonMaxSuppression", "NonZero", "Compress", "MaxRoiPool", "Loop"}


def random_net(name: str = "resnet18", spec: Detection = SPEC, classes: int = 4) -> Any:
    """Return an untrained net with adapted batch norm and scaled outputs, so classes differ."""
    torch.manual_seed(0)
    net = detector.build(zoo.spec(name), spec, classes)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        features = net.train().shared(torch.randn(2, 3, *spec.canvas))
        crops = features[..., :6, :6].repeat(2, 1, 3, 3)[..., : spec.pool, : spec.pool]
        net.head(crops + torch.rand_like(crops))
        net.eval()
        scores, offsets = net.rpn(features)
        logits, steps = net.head(crops)
        for layer, values, spread in (
            (net.rpn.score, scores, 2), (net.rpn.offset, offsets, 0.3), (net.score, logits, 2),
            (net.offset, steps, 1),
        ):  # fmt: skip
            layer.weight.mul_(spread / values.std())
    return net


def run(model: Any, images: np.ndarray, extent: np.ndarray) -> dict[str, np.ndarray]:
    names = list(detector_preprocess.OUTPUTS)
    values = run_model(model, {"images": images, "extent": extent}, names)
    return dict(zip(names, values, strict=True))


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    result = parity.compare(one, other)
    assert result.detections >= 5
    assert (result.unmatched, result.unsettled) == (0, 0), result
    assert result.score < 2e-4 and result.box < 0.05, result


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet18", {}),
        ("resnet18", {"canvas": (128, 96)}),
        ("resnet50", {"pool": 14, "width": 0.125}),
        ("plain18", {"anchors": (32.0,)}),
        ("vgg16", {"width": 0.125}),
    ],
)
def test_file_gives_the_detections_of_torch_and_of_the_reference_file(
    name: str, changes: dict[str, Any]
) -> None:
    spec = dataclasses.replace(SPEC, **changes)
    net = random_net(name, spec)
    model = export.to_onnx(net, name=name)
    assert not {node.op_type for node in model.graph.node} & REFUSED
    reference = export.to_onnx(net, name=name, standard=True)
    assert {node.op_type for node in reference.graph.node} & REFUSED == {
        "RoiAlign",
        "NonMaxSuppression",
    }
    rng = np.random.default_rng(1)
    assert spec.canvas is not None
    for _ in range(3):
        images = rng.standard_normal((1, 3, *spec.canvas)).astype(np.float32)
        extent = np.array([[spec.canvas[0] - 10, spec.canvas[1] - 20]], np.float32)
        images[..., int(extent[0, 0]) :, :] = 0
        own = run(model, images, extent)
        expected = detector.detect(net, torch.from_numpy(images), torch.from_numpy(extent))
        assert_same(own, expected)
        assert_same(own, run(reference, images, extent))


def test_file_with_too_few_rounds_says_so() -> None:
    spec = dataclasses.replace(SPEC, rounds=1)
    model = export.to_onnx(random_net(spec=spec), name="x")
    images = np.random.default_rng(1).standard_normal((1, 3, 96, 128)).astype(np.float32)
    assert run(model, images, np.array([[96, 128]], np.float32))["unsettled"].sum() > 0


def test_file_has_no_batch_norm_and_named_convolutions() -> None:
    net = random_net()
    model = export.to_onnx(net, name="x")
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    assert "layer4.1.conv2" in convolutions and "rpn.conv" in convolutions
    assert len(convolutions) == sum(isinstance(m, torch.nn.Conv2d) for m in net.modules())
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
