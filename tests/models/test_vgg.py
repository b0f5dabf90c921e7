from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rtresnet.cli.main import main
from rtresnet.models import zoo
from rtresnet.models.nets import DenseBackend, TorchBackend
from rtresnet.models.vgg import VGG, pooled_by_weight
from rtresnet.training import recipes


def narrow(batch_norm: bool = True) -> VGG:
    """Return VGG-16's layout with few channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        counts = zoo.VGG_COUNTS[16]
        widths = (4, 4, 8, 8, 8)
        net = VGG(counts=counts, widths=widths, batch_norm=batch_norm, num_classes=5, hidden=16)
        for layer in net.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.1)
        return net.eval()


@pytest.mark.parametrize("name", ["vgg16", "vgg19", "vgg16_bn", "vgg19_bn"])
def test_vgg_names_and_shapes_are_torchvisions(name: str) -> None:
    state = zoo.build(zoo.spec(name), device="meta").state_dict()
    last = {"vgg16": 28, "vgg19": 34, "vgg16_bn": 40, "vgg19_bn": 49}[name]
    assert f"features.{last}.weight" in state
    assert state["features.0.weight"].shape == (64, 3, 3, 3) and "features.0.bias" in state
    assert state["classifier.0.weight"].shape == (4096, 25088)
    assert state["classifier.6.weight"].shape == (1000, 4096)
    assert ("features.1.running_mean" in state) == name.endswith("bn")


def test_image_that_vgg_would_pool_to_nothing_is_refused(tmp_path: Path) -> None:
    images = np.zeros((40, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(40) % 2)
    data = ["--data", f"npz:{tmp_path / 'a.npz'}", "--out", str(tmp_path / "run")]
    assert main(["train", "--model", "vgg16", "--size", "16", *data]) == 2
    out = ["--weights", "untrained", "--size", "16", "--out", str(tmp_path / "a.onnx")]
    assert main(["export", "--model", "vgg16", *out]) == 2
    assert not (tmp_path / "run").exists() and not (tmp_path / "a.onnx").exists()


def test_smaller_training_images_are_not_smaller_than_vgg_takes() -> None:
    recipe = recipes.named("speed")
    spec = zoo.spec("vgg16")
    assert min(recipe.side_at(0, 10, size, spec.min_size) for size in (32, 40, 64)) == 32


def test_vgg_pools_after_each_stage() -> None:
    net = zoo.build(zoo.spec("vgg16"), device="meta")
    assert isinstance(net, VGG)
    assert net.features(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 512, 7, 7)
    assert [len(part) for part in net.leading_parts()] == [5, 5, 7, 7, 7]


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7])
def test_pooled_by_weight_equals_pooling_then_fc(side: int) -> None:
    weight, maps = torch.randn(6, 4 * 49), torch.randn(3, 4, side, side)
    pooled = nn.functional.adaptive_avg_pool2d(maps, 7).flatten(1)
    result = maps.flatten(1) @ pooled_by_weight(weight, side).T
    torch.testing.assert_close(result, pooled @ weight.T, atol=1e-4, rtol=1e-4)


def test_dense_vgg_at_its_own_size_equals_the_net() -> None:
    net = narrow()
    images = torch.randn(2, 3, 224, 224).numpy()
    dense = DenseBackend(net)(images)
    assert dense.shape == (2, 5, 1, 1)
    torch.testing.assert_close(
        torch.from_numpy(dense[:, :, 0, 0]), torch.from_numpy(TorchBackend(net)(images)),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    assert DenseBackend(net)(torch.randn(1, 3, 224, 288).numpy()).shape == (1, 5, 1, 3)


def test_build_vgg_with_a_mean_image_is_refused() -> None:
    with pytest.raises(zoo.InputError):
        zoo.build(zoo.spec("vgg16"), device="meta", mean_image=224)
