"""Quantization-aware fine-tuning: training with the rounding of the INT8 or FP8 file.

`rtresnet train --weights FILE --qat` uses it. The net computes what `quantization/qdq.py` writes:
batch norms folded, with frozen statistics; weights rounded with one scale per output channel;
activations rounded at the same tensors, which `quantization/placement.py` names for both. An
activation's scale is a parameter (Esser et al., 2020). Gradients pass through rounding unchanged.

In INT8, scales and biases are also rounded, so that the file's sums are exact everywhere
(`quantization/number_formats.py`). In FP8 that is impossible: E4M3 spans 17 powers of two, so a sum
of products needs more bits than float32 has. Weights and quantizers are those of the file bit for
bit, and sums differ in the last bit from one library to another; a value on the border between two
FP8 values then differs by a step. The first convolution stays in float.

The weights stay those of the net with its batch norms, which are folded again in every step: the
checkpoint is an ordinary one, which can be exported in float or trained further. Independent of
ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtresnet.core.errors import ArtifactError
from rtresnet.models.nets import INPUT, Net, Operation, folded, operations
from rtresnet.quantization.calibrators import Histogram, mse, scale
from rtresnet.quantization.number_formats import (
    ACTIVATION_BITS,
    FORMATS,
    FP8,
    INT8,
    WEIGHT_BITS,
    NumberFormat,
    round_to_bits,
    round_up_to_bits,
)
from rtresnet.quantization.placement import place_quantizers, residual_branches, stem

CALIBRATION_IMAGES = 512  # number of training images for the initial scales
SMALLEST = torch.finfo(torch.float32).tiny

ActivationHook = Callable[[str, Tensor], Tensor]
"""Replaces an activation where the file has a Q/DQ pair."""

Observer = Callable[[str, Tensor], None]

WeightHook = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Replaces weight and bias of an operation that reads the named activation."""


class FakeQuantized(nn.Module):
    """A net that computes what its INT8 or FP8 file will compute, and is trained.

    Args:
        net: Float32. Its parameters are trained; its batch norms' statistics stay.
        number_format: "int8", or "fp8" with the first convolution in float.

    Attributes:
        number_format: The number format.
        places: Names of the activations that are quantized (`quantization/placement.py`).
        scales: Their scales, float32 [places].
        branches: Names of the float tensors that are added to the shortcuts.
    """

    def __init__(self, net: Net, number_format: str = "int8") -> None:
        super().__init__()
        self.net, self.number_format = net, FORMATS[number_format]
        self.operations = operations(net)
        excluded = stem(self.operations) if self.number_format == FP8 else ()
        quantizers = place_quantizers(self.operations, nodes_to_exclude=excluded)
        self.places = tuple(quantizers)
        self.scales = nn.Parameter(torch.ones(len(quantizers)))
        self.uses = {(use.node, use.index) for uses in quantizers.values() for use in uses}
        self.branches = tuple(residual_branches(self.operations))
        # Tensors to free after each operation, so that memory use is that of the net itself.
        last = {name: number for number, op in enumerate(self.operations) for name in op.input}
        self.free: list[list[str]] = [[] for _ in self.operations]
        for name, number in last.items():
            self.free[number].append(name)

    def forward(self, images: Tensor, observer: Observer | None = None) -> Tensor:
        """Compute logits [N, classes].

        Args:
            images: float32 [N, 3, H, W], normalized, on the net's device.
            observer: Called with the name and the value of every operation's result.
        """
        kind = self.number_format
        rows = exact_scales(self.scales) if kind == INT8 else self.scales
        scales = dict(zip(self.places, rows.unbind(), strict=True))
        return self._run(
            images,
            lambda name, values: quantized(values, scales[name], kind),
            lambda name, weight, bias: rounded(weight, bias, scales[name], kind),
            observer,
        )

    def observe(self, images: Tensor, activation: ActivationHook) -> Tensor:
        """Compute the logits in float; `activation` receives what would be quantized."""
        return self._run(images, activation, lambda name, weight, bias: (weight, bias))

    def _run(
        self,
        images: Tensor,
        activation: ActivationHook,
        weights: WeightHook,
        observer: Observer | None = None,
    ) -> Tensor:
        values, quantized_values = {INPUT: images}, dict[str, Tensor]()
        for operation, free in zip(self.operations, self.free, strict=True):
            inputs = []
            for index, name in enumerate(operation.input):
                if (operation.name, index) not in self.uses:
                    inputs.append(values[name])
                    continue
                if name not in quantized_values:  # quantized once for all readers
                    quantized_values[name] = activation(name, values[name])
                inputs.append(quantized_values[name])
            values[operation.name] = self._operate(operation, inputs, weights)
            if observer is not None:
                observer(operation.name, values[operation.name])
            for name in free:
                del values[name]
                quantized_values.pop(name, None)
        (logits,) = values.values()
        return logits

    def _operate(self, operation: Operation, inputs: list[Tensor], weights: WeightHook) -> Tensor:
        module = self.net.get_submodule(operation.name)
        if isinstance(module, nn.Conv2d):
            own = (module.weight, module.bias)
            if operation.norm:
                norm = self.net.get_submodule(operation.norm)
                assert isinstance(norm, nn.BatchNorm2d)
                own = folded(module, norm)
            assert own[1] is not None
            if (operation.name, 0) in self.uses:
                own = weights(operation.input[0], own[0], own[1])
            return functional.conv2d(inputs[0], *own, module.stride, module.padding)
        if isinstance(module, nn.Linear):
            return functional.linear(
                inputs[0], *weights(operation.input[0], module.weight, module.bias)
            )
        result: Tensor = module(*inputs)
        return result

    def named_scales(self) -> dict[str, float]:
        """Return the scale of each activation."""
        return dict(zip(self.places, self.scales.detach().cpu().tolist(), strict=True))

    @torch.no_grad()
    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Set the scales, one for each of `places`.

        Raises:
            ArtifactError: The scales belong to another net.
        """
        if scales.keys() != set(self.places):
            raise ArtifactError("the trained scales do not belong to this net's tensors")
        self.scales.copy_(torch.tensor([scales[name] for name in self.places]))

    @torch.no_grad()
    def hold_scales(self, before: Tensor) -> None:
        """Limit the effect of a step: no scale falls below half of its value before."""
        self.scales.copy_(torch.maximum(self.scales, before / 2))


def calibrate(net: FakeQuantized, batches: Iterable[Tensor]) -> None:
    """Set the initial scales: those with the least squared error on some images.

    Args:
        net: The net whose scales are replaced.
        batches: float32 [N, 3, S, S], normalized, on the net's device.
    """
    histograms = {name: Histogram(name) for name in net.places}

    def add(name: str, values: Tensor) -> Tensor:
        histograms[name].add(values.cpu().numpy())
        return values

    with torch.inference_mode():
        for images in batches:
            net.observe(images, add)
    kind = net.number_format
    net.set_scales({name: scale(mse(entry, kind), kind) for name, entry in histograms.items()})


def branch_ranges(net: FakeQuantized, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
    """Measure the lowest and highest value of each branch, including 0.

    Args:
        net: The net, in evaluation mode.
        batches: float32 [N, 3, S, S], normalized, on the net's device.
    """
    ranges = dict.fromkeys(net.branches, (0.0, 0.0))

    def update(name: str, values: Tensor) -> None:
        if name in ranges:
            low, high = ranges[name]
            ranges[name] = min(low, float(values.min())), max(high, float(values.max()))

    with torch.inference_mode():
        for images in batches:
            net(images, update)
    return ranges


def quantized(values: Tensor, scale: Tensor, number_format: NumberFormat = INT8) -> Tensor:
    """Round and back, as QuantizeLinear and DequantizeLinear with zero point 0 do.

    Halves are rounded to even. A clipped value has gradient 0; the scale's gradient comes from
    rounding errors and clipped values, and is divided by sqrt(largest * values per image), with
    the format's largest value, so that the scale changes as fast as the weights (Esser et al.,
    2020, sections 2.1 and 2.2).

    Args:
        values: float32 [N, ...].
        scale: float32 scalar, positive.
        number_format: INT8 or FP8.
    """
    result: Tensor = _Quantized.apply(values, scale, number_format)  # type: ignore[no-untyped-call]
    return result


def rounded(
    weight: Tensor, bias: Tensor, scale: Tensor, number_format: NumberFormat = INT8
) -> tuple[Tensor, Tensor]:
    """Round weight and bias as in the file; gradients pass unchanged.

    The weight is rounded and back with one scale per output channel, bit for bit as
    `formats.quantize_weight` stores it: in INT8 to [-127, 127] with `low_bit_weight_scales`, and
    the bias as in `low_bit_bias`. In FP8 the bias stays.

    Args:
        weight: float32 [out, ...].
        bias: float32 [out].
        scale: Scale of the activation that the weight multiplies; float32 scalar.
        number_format: INT8 or FP8.
    """
    with torch.no_grad():
        peaks = weight.abs().amax(tuple(range(1, weight.ndim))).double()
        steps = peaks / number_format.largest
        scales = torch.where(steps >= SMALLEST, steps, 1).to(weight.dtype)
        if number_format == INT8:
            pattern = round_up_to_bits(scales.view(torch.int32), WEIGHT_BITS)
            scales = pattern.view(torch.float32)
        shaped = scales.view((-1,) + (1,) * (weight.ndim - 1))
        largest = number_format.largest
        whole = _round(weight.div(shaped).clamp_(-largest, largest), number_format).mul_(shaped)
        units = scale.double() * scales.double()
        offset = bias.double().div_(units).round_().mul_(units).to(bias.dtype)
    return _replaced(weight, whole), _replaced(bias, offset) if number_format == INT8 else bias


def _round(steps: Tensor, number_format: NumberFormat) -> Tensor:
    """Round values within the format's range half to even; may change its argument."""
    if number_format == INT8:
        return steps.round_()
    return steps.to(torch.float8_e4m3fn).to(steps.dtype)


def exact_scales(scales: Tensor) -> Tensor:
    """Round scales of activations as in the file; gradients pass unchanged."""
    with torch.no_grad():
        pattern = round_to_bits(scales.view(torch.int32), ACTIVATION_BITS)
    return _replaced(scales, pattern.view(torch.float32))


def _replaced(value: Tensor, by: Tensor) -> Tensor:
    result: Tensor = _Replaced.apply(value, by)  # type: ignore[no-untyped-call]
    return result


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, kind: NumberFormat) -> Tensor:
        ctx.save_for_backward(values, scale)
        ctx.kind, ctx.bounds = kind, (-128 if kind == INT8 else -kind.largest, kind.largest)
        return _round(values.div(scale).clamp_(*ctx.bounds), kind).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        values, scale = ctx.saved_tensors
        steps = values / scale
        clipped = steps.clamp(*ctx.bounds)
        inside = steps == clipped
        passed = gradient * inside if ctx.needs_input_grad[0] else None
        # d(scale * q)/d(scale): q - steps where the value moves with the scale, q where clipped.
        errors = _round(clipped, ctx.kind).sub_(steps.mul_(inside))
        share = math.sqrt(ctx.kind.largest * values[0].numel())
        return passed, torch.sum(gradient * errors) / share, None


class _Replaced(torch.autograd.Function):
    """Replaces a value without changing its gradient (straight-through)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, by: Tensor) -> Tensor:
        return by.view_as(by)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
