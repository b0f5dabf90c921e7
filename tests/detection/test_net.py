"""The detector's net: names, shapes, and outputs of untrained weights."""

from __future__ import annotations

import pytest
import torch

from rtresnet.core.errors import InputError
from rtresnet.core.sidecar import Detection
from rtresnet.detection import net as detector
from rtresnet.models import zoo

SMALL = Detection(anchors=(32.0, 64.0), pool=7, width=0.25, candidates=200, regions=20,
                  detections=10)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "pool"),
    [("resnet18", 7), ("resnet50", 14), ("plain18", 7), ("vgg16", 7), ("vgg16_bn", 7)],
)
def test_detector_outputs_have_fixed_shapes(name: str, pool: int) -> None:
    import dataclasses

    torch.manual_seed(0)
    spec = dataclasses.replace(SMALL, pool=pool)
    net = detector.build(zoo.spec(name), spec, 3).eval()
    images = torch.randn(1, 3, 96, 128)
    result = detector.detect(net, images, torch.tensor([[90.0, 120.0]]))
    assert result["boxes"].shape == (1, 10, 4) and result["scores"].shape == (1, 10)
    assert result["labels"].shape == (1, 10) and result["unsettled"].shape == (1,)
    valid = result["scores"] > 0
    assert valid.any() and (result["boxes"][valid][:, 2:] <= [120, 90]).all()
    assert ((result["labels"] >= 0) == valid).all()
    assert (result["scores"][0][:-1] >= result["scores"][0][1:]).all()


def test_detector_keeps_the_classifiers_names() -> None:
    classifier = zoo.build(zoo.spec("resnet18")).state_dict()
    own = detector.build(zoo.spec("resnet18"), Detection(pool=7), 20).state_dict()
    shared = {name for name in classifier if not name.startswith("fc.")}
    assert shared <= own.keys()
    assert all(own[name].shape == classifier[name].shape for name in shared)


def test_detector_at_pool_7_has_no_stride_in_the_last_stage() -> None:
    net = detector.build(zoo.spec("resnet50"), Detection(pool=7), 2, device="meta")
    crops = torch.empty(5, 1024, 7, 7, device="meta")
    assert net.layer4(crops).shape == (5, 2048, 7, 7)
    net = detector.build(zoo.spec("resnet50"), Detection(pool=14), 2, device="meta")
    assert net.layer4(torch.empty(5, 1024, 14, 14, device="meta")).shape == (5, 2048, 7, 7)


def test_detector_of_vgg_keeps_the_classifiers_names_and_fc_layers() -> None:
    classifier = zoo.build(zoo.spec("vgg16"), device="meta").state_dict()
    own = detector.build(zoo.spec("vgg16"), Detection(pool=7), 20, device="meta").state_dict()
    shared = {name for name in classifier if not name.startswith("classifier.6.")}
    assert shared <= own.keys()
    assert all(own[name].shape == classifier[name].shape for name in shared)
    assert own["score.weight"].shape == (21, 4096)
    with pytest.raises(InputError):
        detector.build(zoo.spec("vgg16"), Detection(pool=14), 2, device="meta")


def test_build_cifar_net_is_refused() -> None:
    with pytest.raises(InputError):
        detector.build(zoo.spec("resnet20"), Detection(), 2)


@pytest.mark.parametrize("canvas", [(600, 800), (16, 64), (0, 32)])
def test_on_canvas_needs_whole_strides(canvas: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        detector.on_canvas(Detection(), canvas)
    assert detector.on_canvas(Detection(), (608, 800)).canvas == (608, 800)
