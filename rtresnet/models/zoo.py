"""The named nets: a table for ImageNet (table 1 of the paper), the 6n+2 rule for CIFAR.

`rtresnet models` prints it. Pure Python but for `build`, so that names can be checked and
listed without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rtresnet.core.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from rtresnet.models.resnet import ResNet

IMAGENET_COUNTS: dict[int, tuple[str, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)

# Section 3.3 sets VGG-19's 19.6 billion multiply-adds next to the 34-layer nets' 3.6.
VGG19_MULTIPLY_ADDS = 19_600_000_000


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One net of the paper, up to its number of classes.

    Attributes:
        name: As on the command line.
        family: "imagenet" or "cifar": the stem, the input size, the customary classes.
        block: "basic" or "bottleneck".
        counts: Blocks a stage.
        shortcut: "A", "B" or "C"; None for a plain net.
        stride_in: Where a bottleneck strides: "1x1" (v1) or "3x3" (v1.5).
    """

    name: str
    family: str
    depth: int
    block: str
    counts: tuple[int, ...]
    shortcut: str | None
    stride_in: str

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels a stage."""
        return (16, 32, 64) if self.family == "cifar" else (64, 128, 256, 512)

    @property
    def size(self) -> int:
        """Customary side of the input, in pixels."""
        return 32 if self.family == "cifar" else 224

    @property
    def num_classes(self) -> int:
        """Customary number of classes."""
        return 10 if self.family == "cifar" else 1000


def names() -> list[str]:
    """Every net of the paper by name, shallow to deep, residual before plain."""
    return [
        *(f"resnet{depth}" for depth in IMAGENET_COUNTS),
        *("plain18", "plain34"),
        *(f"resnet{depth}" for depth in CIFAR_DEPTHS),
        *(f"plain{depth}" for depth in CIFAR_DEPTHS),
    ]


def spec(name: str, *, shortcut: str | None = None, stride_in: str | None = None) -> Spec:
    """Looks a net up.

    Any depth of 6n+2 that is not an ImageNet net is a CIFAR net: resnet8 and resnet26 work too.

    Args:
        name: For instance "resnet50" or "plain20".
        shortcut: "A", "B" or "C"; default B for ImageNet, A for CIFAR, as the paper.
        stride_in: "1x1" or "3x3" (default).

    Raises:
        UnknownNameError: No such net, option or stride.
        InputError: A shortcut option for a plain net.
    """
    match = re.fullmatch(r"(resnet|plain)(\d+)", name)
    if match is None:
        raise UnknownNameError("model", name, names())
    kind, depth = match[1], int(match[2])
    if depth in IMAGENET_COUNTS and (kind == "resnet" or f"plain{depth}" in names()):
        family = "imagenet"
        block, counts = IMAGENET_COUNTS[depth]
    elif depth % 6 == 2 and depth >= 8 and depth not in IMAGENET_COUNTS:
        family, block, counts = "cifar", "basic", ((depth - 2) // 6,) * 3
    else:
        raise UnknownNameError("model", name, names())
    if kind == "plain":
        if shortcut is not None:
            raise InputError(f"{name} is a plain net and takes no shortcut option")
    else:
        shortcut = shortcut or ("A" if family == "cifar" else "B")
        if shortcut not in ("A", "B", "C"):
            raise UnknownNameError("shortcut option", shortcut, ("A", "B", "C"))
    stride_in = stride_in or "3x3"
    if stride_in not in ("1x1", "3x3"):
        raise UnknownNameError("stride position", stride_in, ("1x1", "3x3"))
    return Spec(
        name=name,
        family=family,
        depth=depth,
        block=block,
        counts=counts,
        shortcut=shortcut,
        stride_in=stride_in,
    )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Size of a net with its customary number of classes.

    Attributes:
        parameters: Trainable values: convolutions, batch norm, the FC.
        multiply_adds: Of convolutions and the FC, for one image of the customary size.
    """

    parameters: int
    multiply_adds: int


def cost(spec: Spec) -> Cost:
    """Counts from the table alone what `resnet.multiply_adds` counts on a net, without torch.

    Args:
        spec: From `spec()`.
    """
    parameters = multiply_adds = 0
    for c_in, c_out, kernel, side in _convolutions(spec):
        weights = c_in * c_out * kernel**2
        parameters += weights + 2 * c_out  # and batch norm's scale and shift
        multiply_adds += weights * side**2
    features = spec.widths[-1] * (4 if spec.block == "bottleneck" else 1)
    weights = features * spec.num_classes
    return Cost(
        parameters=parameters + weights + spec.num_classes, multiply_adds=multiply_adds + weights
    )


def _convolutions(spec: Spec) -> Iterator[tuple[int, int, int, int]]:
    """Yields input channels, output channels, kernel and output side of every convolution."""
    channels, side = spec.widths[0], spec.size
    if spec.family == "imagenet":
        yield 3, channels, 7, side // 2
        side //= 4  # the stem's stride, then the max pool's
    else:
        yield 3, channels, 3, side
    for stage, (count, width) in enumerate(zip(spec.counts, spec.widths, strict=True)):
        for position in range(count):
            stride = 2 if stage > 0 and position == 0 else 1
            out = side // stride
            if spec.block == "bottleneck":
                c_out = 4 * width
                yield channels, width, 1, out if spec.stride_in == "1x1" else side
                yield width, width, 3, out
                yield width, c_out, 1, out
            else:
                c_out = width
                yield channels, width, 3, out
                yield width, width, 3, out
            changes = stride != 1 or channels != c_out
            if spec.shortcut == "C" or (spec.shortcut == "B" and changes):
                yield channels, c_out, 1, out
            channels, side = c_out, out


def build(spec: Spec, num_classes: int | None = None, *, device: str = "cpu") -> ResNet:
    """Makes the net with freshly initialized weights.

    Args:
        spec: From `spec()`.
        num_classes: Number of logits; the family's customary number by default.
        device: "meta" makes shapes only, at no cost.
    """
    import torch

    from rtresnet.models.resnet import BasicBlock, Bottleneck, ResNet

    with torch.device(device):
        return ResNet(
            block=Bottleneck if spec.block == "bottleneck" else BasicBlock,
            counts=spec.counts,
            widths=spec.widths,
            stem=spec.family,
            shortcut=spec.shortcut,
            stride_in=spec.stride_in,
            num_classes=num_classes or spec.num_classes,
        )
