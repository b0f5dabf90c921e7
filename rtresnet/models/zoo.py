"""The nets by name: table 1 of the paper, the 6n+2 rule for CIFAR, and VGG for comparison.

`rtresnet models` prints them. Needs no torch except in `build`, so that names can be checked and
costs counted without it.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rtresnet.core.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from rtresnet.models.nets import Net

IMAGENET_COUNTS: dict[int, tuple[str, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)
VGG_COUNTS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
VGG_HIDDEN, VGG_POOLED = 4096, 7  # width of the first two FC layers; side of the map they read
SHORTCUTS, STRIDES_IN = ("A", "B", "C"), ("1x1", "3x3")
BLOCK_LAYERS = {"basic1": 1, "basic": 2, "basic3": 3, "bottleneck": 3, "vgg": 1}

_RESNET = re.compile(r"(resnet|plain)(\d+)((?:-[a-z0-9.]+)*)", re.IGNORECASE)
_VGG = re.compile(r"vgg(\d+)([_-]bn)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One net, except for its number of classes.

    Attributes:
        name: Name on the command line, for example "resnet50", "resnet50-v1", "resnet34-C".
        family: "imagenet", "cifar" or "vgg": the stem, the default input size and classes.
        depth: Number of weighted layers; projection shortcuts are not counted.
        block: "basic" (two 3x3 layers), "bottleneck", "basic1" and "basic3" (one and three 3x3
            layers), or "vgg".
        counts: Number of blocks in each stage.
        shortcut: "A", "B" or "C" (section 4.1); None for a net without shortcuts.
        stride_in: The convolution of a bottleneck that has the stride: "1x1" (v1, the paper) or
            "3x3" (v1.5, public weights).
        batch_norm: Whether batch norm follows each convolution; False only for VGG.
    """

    name: str
    family: str
    depth: int
    block: str
    counts: tuple[int, ...]
    shortcut: str | None
    stride_in: str
    batch_norm: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of channels in each stage; of a bottleneck, in its 3x3 convolution."""
        return {
            "cifar": (16, 32, 64),
            "imagenet": (64, 128, 256, 512),
            "vgg": (64, 128, 256, 512, 512),
        }[self.family]

    @property
    def size(self) -> int:
        """Default side of the input, in pixels."""
        return 32 if self.family == "cifar" else 224

    @property
    def min_size(self) -> int:
        """Smallest side of the input, in pixels: VGG halves it five times."""
        return 32 if self.family == "vgg" else 4

    def require_size(self, side: int) -> None:
        """Raise InputError if images of `side` x `side` pixels are too small for the net."""
        if side < self.min_size:
            raise InputError(
                f"{self.name} needs images of at least {self.min_size} x {self.min_size} "
                f"pixels, got {side} x {side}",
                fix=f"use --size {self.min_size} or more",
            )

    @property
    def num_classes(self) -> int:
        """Default number of classes."""
        return 10 if self.family == "cifar" else 1000

    @property
    def plain(self) -> str | None:
        """The name of the net without shortcuts that has the same layers, if there is one."""
        if self.family == "vgg" or self.block == "bottleneck":
            return None
        return f"plain{self.depth}"


def names() -> list[str]:
    """Return the nets of the paper, shallow to deep, residual before plain, then VGG.

    `spec` also accepts other depths of 6n+2, and the suffixes of shortcut options and blocks.
    """
    return [
        *(f"resnet{depth}" for depth in IMAGENET_COUNTS),
        *(f"resnet{depth}-v1" for depth, (block, _) in IMAGENET_COUNTS.items()
          if block == "bottleneck"),
        *("plain18", "plain34"),
        *(f"resnet{depth}" for depth in CIFAR_DEPTHS),
        *(f"plain{depth}" for depth in CIFAR_DEPTHS),
        *(f"vgg{depth}{norm}" for depth in VGG_COUNTS for norm in ("", "_bn")),
    ]  # fmt: skip


def spec(name: str, *, shortcut: str | None = None, stride_in: str | None = None) -> Spec:
    """Look a net up.

    A depth of 6n+2 that is not an ImageNet net is a CIFAR net, for example resnet8 and resnet26.
    Suffixes select a variant:

    - `-A`, `-B`, `-C`: the shortcut option (resnet34-A, resnet20-C).
    - `-v1`: a bottleneck strides in its first 1x1 convolution (resnet50-v1). The default is v1.5.
    - `-block1`, `-block3`: residual functions of one or three 3x3 layers (resnet20-block1).

    Args:
        name: For example "resnet50", "resnet50-v1", "plain20" or "vgg16_bn".
        shortcut: "A", "B" or "C"; the default is the name's suffix, else B for ImageNet and A for
            CIFAR.
        stride_in: "1x1" or "3x3"; the default is the name's suffix, else "3x3".

    Raises:
        UnknownNameError: Unknown net, shortcut option or stride position.
        InputError: The net does not have this variant.
    """
    vgg = _VGG.fullmatch(name)
    if vgg is not None and int(vgg[1]) in VGG_COUNTS and name == name.lower():
        if shortcut is not None:
            raise InputError(f"{name} has no shortcuts, so it has no shortcut option")
        return _vgg(int(vgg[1]), batch_norm=vgg[2] is not None)
    match = _RESNET.fullmatch(name)
    if match is None or not name.startswith(("resnet", "plain")):
        raise UnknownNameError("model", name, names())
    kind, depth = match[1], int(match[2])
    named_shortcut, named_stride, block_layers = _suffixes(name, match[3])
    family, block, counts = _layout(name, kind, depth)
    shortcut = _one("shortcut option", name, named_shortcut, shortcut)
    if kind == "plain":
        if shortcut is not None or block_layers:
            raise InputError(
                f"{name} is a plain net: it has no shortcut options and no residual blocks",
                fix=f"use --model resnet{depth}{match[3]}",
            )
    else:
        shortcut = shortcut or _default_shortcut(family)
        if shortcut not in SHORTCUTS:
            raise UnknownNameError("shortcut option", shortcut, SHORTCUTS)
    stride_in = _one("stride position", name, named_stride, stride_in) or "3x3"
    if stride_in not in STRIDES_IN:
        raise UnknownNameError("stride position", stride_in, STRIDES_IN)
    if named_stride and block != "bottleneck":
        raise InputError(
            f"{name}: v1 and v1.5 are variants of bottlenecks, which {kind}{depth} does not have",
            fix=f"use --model {kind}{depth}",
        )
    if block_layers and block_layers != 2:
        if block != "basic" or any(2 * count % block_layers for count in counts):
            raise InputError(
                f"{name}: a stage of {kind}{depth} cannot be divided into blocks of "
                f"{block_layers} 3x3 layers",
                fix="use --model resnet20-block3, or another depth of 18n+2",
            )
        block = f"basic{block_layers}"
        counts = tuple(2 * count // block_layers for count in counts)
    return Spec(
        name=_full_name(kind, depth, family, block, shortcut, stride_in),
        family=family,
        depth=depth,
        block=block,
        counts=counts,
        shortcut=shortcut,
        stride_in=stride_in,
    )


lookup = spec  # for functions with an argument of that name


def matches(name: str, spec: Spec) -> bool:
    """Return whether a name means this net; variants that the name does not state may be any.

    Raises:
        UnknownNameError, InputError: The name does not belong to a net.
    """
    named, match = lookup(name), _RESNET.fullmatch(name)
    if match is None or named.shortcut is None:
        return named == spec
    shortcut, stride_in, layers = _suffixes(name, match[3])
    return (
        spec.shortcut is not None
        and (named.depth, named.family) == (spec.depth, spec.family)
        and shortcut in (None, spec.shortcut)
        and stride_in in (None, spec.stride_in)
        and (layers is None or named.block == spec.block)
    )


def variant(spec: Spec, *, shortcut: str | None = None, stride_in: str | None = None) -> Spec:
    """Return the same net with another shortcut option or stride position."""
    shortcut, stride_in = shortcut or spec.shortcut, stride_in or spec.stride_in
    name = _full_name("resnet", spec.depth, spec.family, spec.block, shortcut, stride_in)
    return dataclasses.replace(spec, name=name, shortcut=shortcut, stride_in=stride_in)


def states_shortcut(name: str) -> bool:
    """Return whether a net's name states its shortcut option."""
    match = _RESNET.fullmatch(name)
    return match is not None and _suffixes(name, match[3])[0] is not None


def _layout(name: str, kind: str, depth: int) -> tuple[str, str, tuple[int, ...]]:
    """Return family, block and counts of a depth."""
    if depth in IMAGENET_COUNTS and (kind == "resnet" or f"plain{depth}" in names()):
        return "imagenet", *IMAGENET_COUNTS[depth]
    if depth % 6 == 2 and depth >= 8 and depth not in IMAGENET_COUNTS:
        return "cifar", "basic", ((depth - 2) // 6,) * 3
    raise UnknownNameError("model", name, names())


def _suffixes(name: str, text: str) -> tuple[str | None, str | None, int | None]:
    """Return shortcut option, stride position and layers of a block by a name's suffixes."""
    shortcut = stride = layers = None
    for suffix in text.split("-")[1:]:
        if suffix.upper() in SHORTCUTS and shortcut is None:
            shortcut = suffix.upper()
        elif suffix in ("v1", "v1.5") and stride is None:
            stride = "1x1" if suffix == "v1" else "3x3"
        elif suffix in ("block1", "block2", "block3") and layers is None:
            layers = int(suffix[-1])
        else:
            raise UnknownNameError("model", name, names())
    return shortcut, stride, layers


def _one(option: str, name: str, suffix: str | None, argument: str | None) -> str | None:
    if suffix and argument and suffix != argument:
        raise InputError(f"{name}: the name and the {option} {argument} contradict each other")
    return suffix or argument


def _default_shortcut(family: str) -> str:
    return "A" if family == "cifar" else "B"


def _full_name(
    kind: str, depth: int, family: str, block: str, shortcut: str | None, stride_in: str
) -> str:
    """Return the name with the suffixes of everything that is not the default."""
    suffixes = ""
    if block == "bottleneck" and stride_in == "1x1":
        suffixes += "-v1"
    if block in ("basic1", "basic3"):
        suffixes += f"-block{BLOCK_LAYERS[block]}"
    if shortcut is not None and shortcut != _default_shortcut(family):
        suffixes += f"-{shortcut}"
    return f"{kind}{depth}{suffixes}"


def _vgg(depth: int, *, batch_norm: bool) -> Spec:
    return Spec(
        name=f"vgg{depth}" + ("_bn" if batch_norm else ""),
        family="vgg",
        depth=depth,
        block="vgg",
        counts=VGG_COUNTS[depth],
        shortcut=None,
        stride_in="3x3",
        batch_norm=batch_norm,
    )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Size of a net with its default number of classes and input size.

    Attributes:
        parameters: Trainable values: convolutions, batch norm, FC layers.
        multiply_adds: Multiply-adds of convolutions and FC layers, for one image.
        fc_parameters: Parameters of the FC layers.
        fc_multiply_adds: Multiply-adds of the FC layers.
    """

    parameters: int
    multiply_adds: int
    fc_parameters: int
    fc_multiply_adds: int


def cost(spec: Spec) -> Cost:
    """Count parameters and multiply-adds from the table, without torch (see `nets.multiply_adds`).

    Args:
        spec: The result of `spec()`.
    """
    parameters = multiply_adds = 0
    for c_in, c_out, kernel, side in _convolutions(spec):
        weights = c_in * c_out * kernel**2
        biases = 0 if spec.family != "vgg" else c_out
        parameters += weights + biases + (2 * c_out if spec.batch_norm else 0)
        multiply_adds += weights * side**2
    sides: tuple[int, ...]
    if spec.family == "vgg":
        sides = (spec.widths[-1] * VGG_POOLED**2, VGG_HIDDEN, VGG_HIDDEN, spec.num_classes)
    else:
        sides = (spec.widths[-1] * (4 if spec.block == "bottleneck" else 1), spec.num_classes)
    products = sum(a * b for a, b in itertools.pairwise(sides))
    return Cost(
        parameters=parameters + products + sum(sides[1:]),
        multiply_adds=multiply_adds + products,
        fc_parameters=products + sum(sides[1:]),
        fc_multiply_adds=products,
    )


def _convolutions(spec: Spec) -> Iterator[tuple[int, int, int, int]]:
    """Yield input channels, output channels, kernel and output side of every convolution."""
    channels, side = spec.widths[0], spec.size
    if spec.family == "vgg":
        channels = 3
    elif spec.family == "imagenet":
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
                for _ in range(BLOCK_LAYERS[spec.block] - 1):
                    yield width, width, 3, out
            changes = stride != 1 or channels != c_out
            if spec.shortcut == "C" or (spec.shortcut == "B" and changes):
                yield channels, c_out, 1, out
            channels, side = c_out, out


def build(
    spec: Spec,
    num_classes: int | None = None,
    *,
    device: str = "cpu",
    mean_image: int | None = None,
) -> Net:
    """Make the net with newly initialized weights.

    Args:
        spec: The result of `spec()`.
        num_classes: Number of logits; by default that of the spec.
        device: Device; "meta" creates shapes without data.
        mean_image: Side of a per-pixel mean image that the net subtracts first, in pixels; None
            subtracts nothing.

    Raises:
        InputError: A mean image for VGG, which does not support it.
    """
    import torch

    from rtresnet.models.resnet import BLOCKS, ResNet
    from rtresnet.models.vgg import VGG

    classes = num_classes or spec.num_classes
    with torch.device(device):
        if spec.family == "vgg":
            if mean_image is not None:
                raise InputError(
                    f"{spec.name} does not support a mean image", fix="add --set mean_image=false"
                )
            return VGG(
                counts=spec.counts,
                widths=spec.widths,
                batch_norm=spec.batch_norm,
                num_classes=classes,
            )
        return ResNet(
            block=BLOCKS[spec.block],
            counts=spec.counts,
            widths=spec.widths,
            stem=spec.family,
            shortcut=spec.shortcut,
            stride_in=spec.stride_in,
            num_classes=classes,
            mean_image=mean_image,
        )
