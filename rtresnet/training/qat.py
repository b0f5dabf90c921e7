"""Fine-tuning with fake quantization: the net learns with the rounding that its INT8 file will do.

`rtresnet train --weights FILE --qat` reaches it. What is computed is what `quantize/qdq.py` writes:
batch norms folded, their statistics frozen; weights rounded to int8, one scale an output channel;
activations rounded at the file's own places, since `quantize/places.py` names both. An activation's
scale is a parameter (Esser et al., 2020). Rounding passes gradients straight through. Scales and
biases are rounded as well, so that the file's sums come out the same everywhere
(`quantize/exact.py`).

The weights stay those of the net with its batch norms, which are folded again in every step: a
checkpoint remains an ordinary one, that can be exported in float or trained on.

Knows nothing of ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtresnet.core.errors import ArtifactError
from rtresnet.models.resnet import Add, ResNet
from rtresnet.models.tracing import INPUT, folded, trace
from rtresnet.quantization.calibrators import mse, scale
from rtresnet.quantization.histogram import Histogram
from rtresnet.quantization.low_bit_scales import ACTIVATION_BITS, WEIGHT_BITS, at_least, nearest
from rtresnet.quantization.placement import branches, places

CALIBRATION_IMAGES = 512  # of the training images, for the scales to begin with
TYPES: dict[type[nn.Module], str] = {nn.Conv2d: "Conv", nn.Linear: "Gemm", Add: "Add"}
SMALLEST = torch.finfo(torch.float32).tiny

At = Callable[[str, Tensor], Tensor]
"""What becomes of an activation where the file has a Q/DQ pair."""

Made = Callable[[str, Tensor], None]

Used = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""What becomes of weight and bias of an operation that reads the named activation."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A module of the net with the tensors it reads and makes, named as in the ONNX file.

    Attributes:
        norm: The batch norm that is folded into it; empty where there is none.
    """

    name: str
    op_type: str
    input: tuple[str, ...]
    output: tuple[str, ...]
    norm: str = ""


def operations(net: ResNet) -> list[Operation]:
    """The folded net, in order of execution."""
    traced = trace(net)
    modules = dict(traced.named_modules())
    found: dict[str, Operation] = {}
    tensors: dict[Any, str] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            tensors[node] = INPUT
        elif node.op == "call_module":
            name, module = str(node.target), modules[node.target]
            reads = tuple(tensors[argument] for argument in node.all_input_nodes)
            if isinstance(module, nn.BatchNorm2d):
                found[reads[0]] = replace(found[reads[0]], norm=name)
                tensors[node] = reads[0]
            else:
                kind = TYPES.get(type(module), type(module).__name__)
                found[name] = Operation(name=name, op_type=kind, input=reads, output=(name,))
                tensors[node] = name
    return list(found.values())


class FakeQuantized(nn.Module):
    """A net that computes what its INT8 file will compute, and learns.

    Args:
        net: Float32. Its parameters are the ones that learn; its batch norms' statistics stay.

    Attributes:
        places: The activations that are quantized, as `qdq.placement` has them.
        scales: Of them, float32 [places].
        branches: The float tensors that are added to the shortcuts, as `extents.py` has them.
    """

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        self.net = net
        self.operations = operations(net)
        found = places(self.operations)
        self.places = tuple(found)
        self.scales = nn.Parameter(torch.ones(len(found)))
        self.uses = {(use.node, use.index) for uses in found.values() for use in uses}
        self.branches = tuple(branches(self.operations))
        # So that a tensor is freed when nothing reads it any more, as in the net itself.
        last = {name: number for number, op in enumerate(self.operations) for name in op.input}
        self.free: list[list[str]] = [[] for _ in self.operations]
        for name, number in last.items():
            self.free[number].append(name)

    def forward(self, images: Tensor, made: Made | None = None) -> Tensor:
        """Normalized float images [N, 3, H, W] to logits [N, classes].

        Args:
            images: float32, on the net's device.
            made: Shown every operation's result.
        """
        scales = dict(zip(self.places, exact_scales(self.scales).unbind(), strict=True))
        return self._run(
            images,
            lambda name, values: quantized(values, scales[name]),
            lambda name, weight, bias: rounded(weight, bias, scales[name]),
            made,
        )

    def observe(self, images: Tensor, at: At) -> Tensor:
        """The same in float; `at` sees the activations that would be quantized."""
        return self._run(images, at, lambda name, weight, bias: (weight, bias))

    def _run(self, images: Tensor, at: At, used: Used, made: Made | None = None) -> Tensor:
        values, taken = {INPUT: images}, dict[str, Tensor]()
        for operation, free in zip(self.operations, self.free, strict=True):
            inputs = []
            for index, name in enumerate(operation.input):
                if (operation.name, index) not in self.uses:
                    inputs.append(values[name])
                    continue
                if name not in taken:  # quantized once, whoever reads it
                    taken[name] = at(name, values[name])
                inputs.append(taken[name])
            values[operation.name] = self._operate(operation, inputs, used)
            if made is not None:
                made(operation.name, values[operation.name])
            for name in free:
                del values[name]
                taken.pop(name, None)
        (logits,) = values.values()
        return logits

    def _operate(self, operation: Operation, inputs: list[Tensor], used: Used) -> Tensor:
        module = self.net.get_submodule(operation.name)
        if isinstance(module, nn.Conv2d):
            norm = self.net.get_submodule(operation.norm)
            assert isinstance(norm, nn.BatchNorm2d)
            weight, bias = used(operation.input[0], *folded(module, norm))
            return functional.conv2d(inputs[0], weight, bias, module.stride, module.padding)
        if isinstance(module, nn.Linear):
            return functional.linear(
                inputs[0], *used(operation.input[0], module.weight, module.bias)
            )
        result: Tensor = module(*inputs)
        return result

    def named_scales(self) -> dict[str, float]:
        """Activation tensor to scale."""
        return dict(zip(self.places, self.scales.detach().cpu().tolist(), strict=True))

    @torch.no_grad()
    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Takes scales in, one for each of `places`.

        Raises:
            ArtifactError: They are of another net.
        """
        if scales.keys() != set(self.places):
            raise ArtifactError("the learned scales are of other tensors than this net's")
        self.scales.copy_(torch.tensor([scales[name] for name in self.places]))

    @torch.no_grad()
    def hold_scales(self, before: Tensor) -> None:
        """After a step that went too far: no scale falls below half of what it was."""
        self.scales.copy_(torch.maximum(self.scales, before / 2))


def calibrate(net: FakeQuantized, batches: Iterable[Tensor]) -> None:
    """Gives a net the scales to begin with: those of least squared error on some images.

    Args:
        net: Its scales are replaced.
        batches: float32 [N, 3, S, S], normalized, on the net's device.
    """
    found = {name: Histogram(name) for name in net.places}

    def look(name: str, values: Tensor) -> Tensor:
        found[name].add(values.cpu().numpy())
        return values

    with torch.inference_mode():
        for images in batches:
            net.observe(images, look)
    net.set_scales({name: scale(mse(seen)) for name, seen in found.items()})


def extents(net: FakeQuantized, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
    """How far each branch goes: its lowest and highest value, 0 included.

    Args:
        net: In evaluation mode.
        batches: float32 [N, 3, S, S], normalized, on the net's device.
    """
    found = dict.fromkeys(net.branches, (0.0, 0.0))

    def look(name: str, values: Tensor) -> None:
        if name in found:
            low, high = found[name]
            found[name] = min(low, float(values.min())), max(high, float(values.max()))

    with torch.inference_mode():
        for images in batches:
            net(images, look)
    return found


def quantized(values: Tensor, scale: Tensor) -> Tensor:
    """Rounds to int8 and back, as QuantizeLinear and DequantizeLinear with zero point 0 do.

    Half goes to even. A value beyond the range is clipped and learns nothing; the scale learns
    from the rounding errors and from what is clipped, its gradient divided by
    sqrt(127 * values an image) so that it moves at the pace of the weights (Esser et al., 2020,
    sections 2.1 and 2.2).

    Args:
        values: float32 [N, ...].
        scale: float32 scalar, positive.
    """
    result: Tensor = _Quantized.apply(values, scale)  # type: ignore[no-untyped-call]
    return result


def rounded(weight: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias as the file has them; gradients pass unchanged.

    The weight is rounded to int8 [-127, 127] and back, one scale an output channel, bit for bit
    what `qdq.quantize_weight` stores with `exact.weight_scales`; the bias as `exact.bias` does it.

    Args:
        weight: float32 [out, ...].
        bias: float32 [out].
        scale: Of the activation that the weight is multiplied with; float32 scalar.
    """
    with torch.no_grad():
        steps = weight.abs().amax(tuple(range(1, weight.ndim))).double() / 127
        fine = torch.where(steps >= SMALLEST, steps, 1).to(weight.dtype)
        pattern = at_least(fine.view(torch.int32), WEIGHT_BITS)
        scales = pattern.view(torch.float32)
        shaped = scales.view((-1,) + (1,) * (weight.ndim - 1))
        whole = weight.div(shaped).round_().clamp_(-127, 127).mul_(shaped)
        units = scale.double() * scales.double()
        offset = bias.double().div_(units).round_().mul_(units).to(bias.dtype)
    return _replaced(weight, whole), _replaced(bias, offset)


def exact_scales(scales: Tensor) -> Tensor:
    """Scales of activations as `exact.scale` has them; gradients pass unchanged."""
    with torch.no_grad():
        pattern = nearest(scales.view(torch.int32), ACTIVATION_BITS)
    return _replaced(scales, pattern.view(torch.float32))


def _replaced(value: Tensor, by: Tensor) -> Tensor:
    result: Tensor = _Replaced.apply(value, by)  # type: ignore[no-untyped-call]
    return result


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(values, scale)
        return values.div(scale).round_().clamp_(-128, 127).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        values, scale = ctx.saved_tensors
        steps = values / scale
        clipped = steps.clamp(-128, 127)
        inside = steps == clipped
        passed = gradient * inside if ctx.needs_input_grad[0] else None
        # d(scale * q)/d(scale): q - steps where the value moves with the scale, q where clipped.
        errors = clipped.round_().sub_(steps.mul_(inside))
        share = math.sqrt(127 * values[0].numel())
        return passed, torch.sum(gradient * errors) / share


class _Replaced(torch.autograd.Function):
    """Another value, the same gradient: straight through."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, by: Tensor) -> Tensor:
        return by.view_as(by)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
