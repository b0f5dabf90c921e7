"""Gradients by layer: do they vanish in plain nets?

Section 4.1 says that they do not, because of batch norm, and that this is not why deep plain nets
have higher training errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from rtresnet.core.preprocess import Preprocess
from rtresnet.data import loader
from rtresnet.data.sources import Source
from rtresnet.models import zoo
from rtresnet.models.zoo import Spec
from rtresnet.study.results import GradientNorms

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4  # of the paper's runs on CIFAR-10 (section 4.2)


def measure(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, step: int) -> GradientNorms:
    """Return the gradients of a batch; the net is in training mode afterwards, its gradients set.

    Args:
        net: With 3x3 convolutions.
        images: float32 [N, 3, S, S].
        labels: int64 [N].
        step: Steps done before.
    """
    loss = _backward(net, images, labels)
    norms = {
        name: float(module.weight.grad.norm())
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.weight.grad is not None
    }
    values = list(norms.values())
    return GradientNorms(step=step, loss=loss, norms=norms, ratio=values[0] / values[-1])


def _backward(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    net.train().zero_grad()
    loss = nn.functional.cross_entropy(net(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def along_a_run(
    spec: Spec,
    source: Source,
    preprocess: Preprocess,
    *,
    steps: Sequence[int],
    batch: int,
    seed: int,
    device: str = "cpu",
) -> Iterator[GradientNorms]:
    """Train with plain SGD and yield the gradients after the given numbers of steps.

    The rate is the paper's 0.1, and 0.01 for 110 layers and more, with which the paper starts them.
    Images are not augmented; every measurement is on the batch of the next step.

    Args:
        spec: The net, initialized with `seed`.
        source: Labelled training images.
        preprocess: How an image becomes input.
        steps: When to measure, ascending; the run ends with the last.
        batch: Images in a batch.
        seed: Of the weights and the order of the images.
        device: "cpu" or "cuda".
    """
    torch.manual_seed(seed)
    net = zoo.build(spec, len(source.classes)).to(device)
    rate = LR / 10 if spec.depth >= 110 else LR
    optimizer = torch.optim.SGD(net.parameters(), rate, MOMENTUM, weight_decay=WEIGHT_DECAY)
    wanted = set(steps)
    for step, (images, labels) in enumerate(_batches(source, preprocess, batch, seed)):
        batch_on_device = images.to(device), labels.to(device)
        if step in wanted:
            yield measure(net, *batch_on_device, step)
        else:
            _backward(net, *batch_on_device)
        if step == max(steps):
            return
        optimizer.step()


def _batches(
    source: Source, preprocess: Preprocess, batch: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(source))
        whole = order[: max(len(order) // batch, 1) * batch]
        for images, labels in loader.batches(source, preprocess, batch, indices=whole):
            yield torch.from_numpy(images), torch.from_numpy(labels).long()
