"""One optimizer step: forward and backward pass over a batch's parts, then SGD.

Contains autocast, loss scaling, compilation and gradient clipping. Does not read images or files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rtresnet.core import hardware
from rtresnet.core.errors import CheckFailedError, InputError, UnavailableError
from rtresnet.models.nets import Net
from rtresnet.models.resnet import ResNet
from rtresnet.training.config import Precision, Recipe
from rtresnet.training.distributed import World
from rtresnet.training.ema import ModelEma
from rtresnet.training.loader import DEPTH, MicroBatch
from rtresnet.training.qat import FakeQuantized
from rtresnet.training.teacher import Teacher

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MIN_LOSS_SCALE = 2.0**-8  # in fp16: below it, the gradients overflow at any scale


def resolve_precision(recipe: Recipe, device: str) -> Precision:
    """Replace "auto" by a precision; check one that the user chose.

    Returns:
        "bf16" if the device has instructions for it (not in emulation); "fp16" on GPUs with fp16
        tensor cores only (sm_70, sm_75); else "fp32". Quantization-aware training is in "fp32".

    Raises:
        InputError: FP16 on a CPU, where it is slower than FP32.
    """
    if recipe.precision == "auto" and recipe.qat:
        return "fp32"
    on_gpu = device.startswith("cuda")
    if recipe.precision == "auto" and on_gpu:
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return "bf16"
            return "fp16" if torch.cuda.get_device_capability() >= (7, 0) else "fp32"
    if recipe.precision == "auto":
        return "bf16" if hardware.native_bf16() else "fp32"
    if recipe.precision == "fp16" and not on_gpu:
        raise InputError("precision=fp16 needs a GPU", fix="add --set precision=bf16")
    return recipe.precision


def check_compiler(recipe: Recipe, device: str) -> None:
    """Check that torch.compile has a C++ compiler, which it needs on a CPU.

    Raises:
        UnavailableError: There is no compiler.
    """
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    if recipe.compile and device == "cpu" and not any(shutil.which(n) for n in names if n):
        raise UnavailableError(
            "torch.compile needs a C++ compiler, but none is installed",
            fix="apt install g++, or leave --compile out",
        )


@contextlib.contextmanager
def cudnn_benchmark(device: str) -> Iterator[None]:
    """Let cuDNN time its convolution algorithms for each new shape, and use the fastest.

    On a GPU, two runs may add in different orders with and without it. No effect on a CPU.
    """
    before = torch.backends.cudnn.benchmark
    if device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Stepper:
    """A net in training, with its optimizer.

    In fp16 the loss is scaled so that small gradients do not vanish. A step whose gradients
    overflow changes no weights and halves the scale. It still counts as a step, because learning
    rate and images follow from the step's number.

    Args:
        net: On its device; changed by every step.
        recipe: The recipe, with a resolved precision.
        world: Processes that average their gradients.
        device: Device of the net.
        class_weights: float32 [classes], on the device, if the recipe balances the loss.
        teacher: Net to distill from, on the device.
    """

    def __init__(
        self,
        net: Net | FakeQuantized,
        recipe: Recipe,
        world: World,
        device: str,
        *,
        class_weights: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.net, self.recipe = net, recipe
        self.class_weights, self.teacher = class_weights, teacher
        self.fake = net if isinstance(net, FakeQuantized) else None
        self.kind = "cuda" if device.startswith("cuda") else "cpu"
        self.frozen = freeze(net.net if isinstance(net, FakeQuantized) else net, recipe.freeze)
        self.optimizer = torch.optim.SGD(
            _groups(net, recipe),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            fused=True,
        )
        if recipe.momentum:  # else torch's fused SGD has garbage in it if its first step is skipped
            for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.average = ModelEma(net, recipe.ema) if recipe.ema else None
        self.scaler = torch.amp.GradScaler(self.kind, enabled=recipe.precision == "fp16")
        self.depth = StochasticDepth(net, recipe) if recipe.stochastic_depth else None
        self.wrapped = world.wrap(net, device, some_unused=self.depth is not None)
        self.forward = torch.compile(self.wrapped) if recipe.compile else self.wrapped

    @property
    def kept(self) -> nn.Module:
        """The net to evaluate and to save: the moving average, if there is one."""
        return self.average.net if self.average else self.net

    def train(self) -> None:
        """Switch to training mode; frozen parts stay in evaluation mode."""
        self.net.train()
        for part in self.frozen:
            part.eval()

    def loss_scale(self) -> float | None:
        """Return the loss scale in fp16, None in other precisions. Waits for the GPU.

        Raises:
            CheckFailedError: The scale is minimal, and the gradients of every step overflow.
        """
        if not self.scaler.is_enabled():
            return None
        scale = float(self.scaler.get_scale())
        if scale < MIN_LOSS_SCALE:
            raise CheckFailedError(
                f"the gradients overflow in fp16 even at a loss scale of {scale:g}, so no step "
                "changes the weights",
                fix=f"start again with --lr {self.recipe.lr / 4:g}, or with --set precision=fp32",
            )
        return scale

    def step(
        self, micros: Sequence[MicroBatch], lr: float, number: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Update the weights once.

        Args:
            micros: Parts of the batch.
            lr: Learning rate.
            number: Number of the step, which determines stochastic depth.

        Returns:
            Mean loss and number of correct predictions of this process's images, on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)  # older checkpoints have none
        self.optimizer.zero_grad(set_to_none=True)
        losses, hits = [], []
        with self.depth.drawn(number) if self.depth else contextlib.nullcontext():
            for part, micro in enumerate(micros):
                context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
                is_last = part == len(micros) - 1  # gradients are averaged with the last part
                if not is_last and isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
                    context = self.wrapped.no_sync()
                with context:
                    loss, correct = self._backward(micro, len(micros))
                losses.append(loss)
                hits.append(correct)
        self.scaler.unscale_(self.optimizer)
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
        scales = self.fake.scales.detach().clone() if self.fake else None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.fake and scales is not None:
            self.fake.hold_scales(scales)
        if self.average:
            self.average.update(self.net)
        return torch.stack(losses).mean(), torch.stack(hits).sum()

    def _backward(self, micro: MicroBatch, parts: int) -> tuple[Tensor, Tensor]:
        cast = AUTOCAST.get(self.recipe.precision)
        with torch.autocast(self.kind, cast or torch.bfloat16, enabled=cast is not None):
            logits = self.forward(micro.inputs)
            answers = self.teacher(micro.inputs) if self.teacher is not None else None
        logits = logits.float()
        loss = self._cross_entropy(logits, micro.labels)
        if micro.share != 1:
            other = self._cross_entropy(logits, micro.others)
            loss = micro.share * loss + (1 - micro.share) * other
        if answers is not None:
            soft = distillation(logits, answers.float(), self.recipe.temperature)
            loss = (1 - self.recipe.distill) * loss + self.recipe.distill * soft
        self.scaler.scale(loss / parts).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), (logits.argmax(1) == micro.labels).sum()

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.recipe.label_smoothing
        if self.class_weights is None:
            return functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        losses = functional.cross_entropy(
            logits, labels, label_smoothing=smoothing, reduction="none"
        )
        return (losses * self.class_weights[labels]).mean()


class StochasticDepth:
    """Skips residual functions at random in training (Huang et al., 2016).

    The probability of skipping one rises linearly with its position. The others are divided
    by their probability of staying, so that evaluation and export need no change.

    Raises:
        InputError: The net has no residual functions.
    """

    def __init__(self, net: nn.Module, recipe: Recipe) -> None:
        blocks = list(net.blocks().values()) if isinstance(net, ResNet) else []
        if not blocks or any(block.add is None for block in blocks):
            raise InputError(
                "stochastic_depth: the net has no shortcuts, so its blocks cannot be skipped",
                fix="add --set stochastic_depth=0",
            )
        self.blocks, self.seed = blocks, recipe.seed
        self.probabilities = recipe.stochastic_depth * np.arange(1, len(blocks) + 1) / len(blocks)

    @contextlib.contextmanager
    def drawn(self, step: int) -> Iterator[None]:
        """Skip the drawn blocks of a step; the same ones in every process."""
        rng = np.random.default_rng((self.seed, DEPTH, step))
        dropped = rng.random(len(self.blocks)) < self.probabilities
        for block, drop, probability in zip(self.blocks, dropped, self.probabilities, strict=True):
            block.dropped, block.scale = bool(drop), float(1 / (1 - probability))
        try:
            yield
        finally:
            for block in self.blocks:
                block.dropped, block.scale = False, 1.0


def freeze(net: Net, parts: int) -> list[nn.Module]:
    """Freeze the first `parts` of stem and stages; return their modules."""
    if not parts:
        return []
    frozen = [module for part in net.leading_parts()[:parts] for module in part]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def distillation(logits: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """Compute the loss of a student against its teacher (Hinton, Vinyals and Dean, 2015).

    The Kullback-Leibler divergence of the softened outputs, times the squared temperature, so that
    its gradients have the size of those of the cross-entropy.

    Args:
        logits: Logits of the student, float32 [N, classes].
        answers: The teacher's logits, float32 [N, classes].
        temperature: Divides both.
    """
    return temperature**2 * functional.kl_div(
        functional.log_softmax(logits / temperature, 1),
        functional.log_softmax(answers / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )


def _groups(net: Net | FakeQuantized, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the parameters by weight decay and, below a layer decay of 1, by part of the net."""
    fake = isinstance(net, FakeQuantized)
    parts = (net.net if isinstance(net, FakeQuantized) else net).leading_parts()
    part_of = {
        parameter: number
        for number, modules in enumerate(parts if recipe.layer_decay != 1 else ())
        for module in modules
        for parameter in module.parameters()
    }
    groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            scales = fake and name == "scales"  # of activations
            spared = scales or (parameter.ndim == 1 and not recipe.decay_norms)
            key = spared, part_of.get(parameter, len(parts))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if spared else recipe.weight_decay,
            "factor": recipe.layer_decay ** (len(parts) - part),
        }
        for (spared, part), parameters in sorted(groups.items(), key=lambda entry: entry[0])
    ]
