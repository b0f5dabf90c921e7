"""The analyses that train nothing, or a few steps: gradients, layer responses and lesions.

Gradients by layer: section 4.1 says that they do not vanish in plain nets, because of batch norm,
and that this is not why deep plain nets have higher training errors.

Layer responses (section 4.2, figure 7): the standard deviation of each 3x3 layer's output,
after batch norm and before ReLU and addition. Residual nets respond less than plain ones, and
deeper nets less than shallow ones. This is evidence that the residual functions are near zero.

Lesions: accuracy of a trained net without one of its blocks (Veit, Wilber, Belongie, 2016). Only
the shortcut of the block remains. A plain net has no shortcuts; there, only a block whose input and
output have the same shape can be left out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rtresnet.core.errors import InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.data import loader
from rtresnet.data.sources import Source
from rtresnet.models import zoo
from rtresnet.models.nets import Net
from rtresnet.models.resnet import ResNet
from rtresnet.models.zoo import Spec
from rtresnet.study.results import GradientNorms

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4  # the paper's values for CIFAR-10 (section 4.2)


def measure_gradients(
    net: nn.Module, images: torch.Tensor, labels: torch.Tensor, step: int
) -> GradientNorms:
    """Return the gradients of a batch. Leaves the net in training mode, with gradients set.

    Args:
        net: A net with 3x3 convolutions.
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
        steps: Steps at which to measure, ascending; the run ends with the last one.
        batch: Images in a batch.
        seed: Random seed of the weights and the order of the images.
        device: "cpu" or "cuda".
    """
    torch.manual_seed(seed)
    net = zoo.build(spec, len(source.classes)).to(device)
    rate = LR / 10 if spec.depth >= 110 else LR
    optimizer = torch.optim.SGD(net.parameters(), rate, MOMENTUM, weight_decay=WEIGHT_DECAY)
    required = set(steps)
    for step, (images, labels) in enumerate(_batches(source, preprocess, batch, seed)):
        batch_on_device = images.to(device), labels.to(device)
        if step in required:
            yield measure_gradients(net, *batch_on_device, step)
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


def layer_responses(net: nn.Module, batches: Iterable[np.ndarray]) -> dict[str, float]:
    """Run images through a net and observe its batch norms.

    Args:
        net: The net; left in evaluation mode.
        batches: float32 [N, 3, S, S].

    Returns:
        Standard deviation of the normalized output by 3x3 convolution, in layer order.
    """
    sums: dict[str, Tensor] = {}
    handles = []
    modules = dict(net.named_modules())
    for name, module in modules.items():
        if not isinstance(module, nn.Conv2d) or module.kernel_size != (3, 3):
            continue
        norm = modules[name.replace("conv", "bn")]

        def watch(_: nn.Module, __: object, out: Tensor, name: str = name) -> None:
            values = out.double()
            moments = torch.stack(
                [torch.tensor(float(out.numel())).double(), values.sum(), values.square().sum()]
            )
            sums[name] = sums[name] + moments if name in sums else moments

        handles.append(norm.register_forward_hook(watch))
    try:
        with torch.inference_mode():
            for images in batches:
                net.eval()(torch.from_numpy(images))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: math.sqrt(max(float(square / n - (total / n) ** 2), 0.0))
        for name, (n, total, square) in sums.items()
    }


def removable_blocks(net: Net, name: str) -> list[str]:
    """Return the blocks that can be removed from a net, in order of execution.

    Args:
        net: The net.
        name: Name of the net, for error messages.

    Raises:
        InputError: It has none.
    """
    blocks = net.blocks() if isinstance(net, ResNet) else {}
    removable = [block for block, module in blocks.items() if module.removable]
    if not removable:
        raise InputError(f"{name}: has no removable blocks", fix="use a residual net")
    return removable


@contextlib.contextmanager
def without(net: Net, block: str) -> Iterator[None]:
    """Remove a block from a net within the `with` statement."""
    assert isinstance(net, ResNet)
    module = net.blocks()[block]
    module.dropped = True
    try:
        yield
    finally:
        module.dropped = False
