from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rtresnet.exporter.fold import fold, fold_pair
from rtresnet.models.resnet import ResNet

NETS = [
    ("resnet8", "A"),
    ("resnet8", "B"),
    ("resnet14", "C"),
    ("plain8", None),
    ("resnet18", "A"),
    ("resnet18", "B"),
    ("resnet50", "A"),
    ("resnet50", "B"),
    ("resnet50", "C"),
    ("plain18", None),
]


def images(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


def logits(net: nn.Module, images: Tensor) -> Tensor:
    """Compute logits in float64, so that only the rounding of the weights is measured."""
    with torch.inference_mode():
        return copy.deepcopy(net).double()(images)


def error(got: Tensor, reference: Tensor) -> float:
    return float((got - reference).norm() / reference.norm())


@pytest.mark.parametrize(("name", "shortcut"), NETS)
def test_the_folded_net_is_the_same_function(
    name: str, shortcut: str | None, make_net: Callable[..., ResNet]
) -> None:
    net = make_net(name, shortcut=shortcut)
    batch = images(2, 32)
    assert error(logits(fold(net), batch), logits(net, batch)) < 3e-7


@pytest.mark.parametrize(("name", "shortcut"), NETS)
def test_no_batch_norm_is_left_and_every_convolution_has_a_bias(
    name: str, shortcut: str | None, make_net: Callable[..., ResNet]
) -> None:
    net = make_net(name, shortcut=shortcut)
    folded = fold(net)
    before = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    after = {n: m for n, m in folded.named_modules() if isinstance(m, nn.Conv2d)}
    assert sorted(after) == sorted(before)
    assert all(convolution.bias is not None for convolution in after.values())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@pytest.mark.parametrize("bias", [False, True])
def test_weights_are_rounded_once(bias: bool) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=bias)
    norm = nn.BatchNorm2d(7, eps=1e-3)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.01, 3)  # type: ignore[union-attr]
    folded = fold_pair(convolution, norm)
    variance = norm.running_var.double()  # type: ignore[union-attr]
    factor = norm.weight.double() / (variance + norm.eps).sqrt()
    weight = convolution.weight.double() * factor.reshape(-1, 1, 1, 1)
    shift = norm.bias.double() - norm.running_mean.double() * factor  # type: ignore[union-attr]
    if convolution.bias is not None:
        shift = shift + convolution.bias.double() * factor
    assert torch.equal(folded.weight, weight.float())
    assert folded.bias is not None and torch.equal(folded.bias, shift.float())
    assert (folded.stride, folded.padding) == ((2, 2), (1, 1))


@pytest.mark.parametrize("training", [True, False])
def test_the_original_net_is_not_changed(training: bool, make_net: Callable[..., ResNet]) -> None:
    net = make_net("resnet8").train(training)
    before = copy.deepcopy(net.state_dict())
    modules = list(dict(net.named_modules()))
    fold(net)
    assert list(dict(net.named_modules())) == modules
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training is training
    assert net.bn1.training is training


def test_the_folded_net_is_a_copy(make_net: Callable[..., ResNet]) -> None:
    net = make_net("resnet8")
    folded = fold(net)
    folded.half()
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def test_a_net_in_training_mode_folds_as_in_evaluation(make_net: Callable[..., ResNet]) -> None:
    net = make_net("resnet8")
    batch = images(3, 32)
    expected = logits(net, batch)
    assert error(logits(fold(net.train()), batch), expected) < 3e-7


def test_folding_before_half_precision_beats_folding_after_it(
    make_net: Callable[..., ResNet],
) -> None:
    batch = images(4, 32)
    before, after = [], []
    for seed in range(6):
        net = make_net("resnet8", seed=seed)
        reference = logits(net, batch)
        rounded = copy.deepcopy(net).half().float()
        before.append(error(logits(copy.deepcopy(fold(net)).half(), batch), reference))
        after.append(error(logits(copy.deepcopy(fold(rounded)).half(), batch), reference))
    assert sum(before) * 1.2 < sum(after)
