"""Residual nets and their plain counterparts (He, Zhang, Ren, Sun, 2015).

Sections 3.3, 4.1 (ImageNet) and 4.2 (CIFAR-10). Module names follow the public checkpoints
(`conv1`, `layer1.0.conv1`, `layer2.0.downsample.0`, `fc`), so that their weights load without
renaming. Every operation, including the addition, is a module: its name appears in the ONNX file,
the engine and the profile.

Names such as "resnet50" are in `zoo.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Add(nn.Module):
    """Element-wise sum of the residual branch (first) and the shortcut (second)."""

    def forward(self, residual: Tensor, shortcut: Tensor) -> Tensor:
        """Add the branches, both [N, C, H, W]."""
        return residual + shortcut


class PadShortcut(nn.Module):
    """Option A for changing dimensions: every stride-th pixel, new channels filled with zeros.

    It has no parameters, so a residual net has exactly as many as its plain net. Half of the zeros
    come before the old channels and half after, as in the public CIFAR checkpoints; the paper does
    not specify it.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c_in, H, W] to [N, c_out, ceil(H / stride), ceil(W / stride)]."""
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, self.before, self.after))


class MeanImage(nn.Module):
    """Subtracts a per-pixel mean image (section 4.2), in the units of the normalized input.

    The image is a buffer: it is part of the checkpoint, and export writes it into the ONNX file.

    Args:
        size: Side of the image, in pixels.
    """

    image: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("image", torch.zeros(3, size, size))

    def forward(self, x: Tensor) -> Tensor:
        """Subtract the mean image from [N, 3, size, size]."""
        return x - self.image


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias (batch norm follows); stride 1 keeps the size."""
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


def shortcut_module(option: str, c_in: int, c_out: int, stride: int) -> nn.Module | None:
    """Return the shortcut's operation; None for the identity (section 4.1, options A, B, C)."""
    changes = stride != 1 or c_in != c_out
    if option == "C" or (option == "B" and changes):
        return nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))
    return PadShortcut(c_in, c_out, stride) if changes else None


class Block(nn.Module):
    """A residual function with its shortcut, or the same layers without one (figure 2).

    Attributes:
        downsample: The shortcut's operation; None if it is the identity or absent.
        add: The addition; None in a plain net.
        dropped: Whether the residual function is skipped, so that only the shortcut remains:
            set for a step by stochastic depth, and by `study lesions`.
        scale: Factor on the residual function, set for a step by stochastic depth.
    """

    expansion = 1
    dropped = False
    scale = 1.0
    downsample: nn.Module | None
    add: Add | None

    @property
    def removable(self) -> bool:
        """Whether the net still works without the residual function."""
        return self.add is not None or not self._changes

    def _connect(self, shortcut: str | None, c_in: int, c_out: int, stride: int) -> None:
        self._changes = stride != 1 or c_in != c_out
        self.downsample = shortcut_module(shortcut, c_in, c_out, stride) if shortcut else None
        self.add = Add() if shortcut else None

    def residual(self, x: Tensor) -> Tensor:
        """Return the residual function: [N, c_in, H, W] to [N, c_out, H / stride, W / stride]."""
        raise NotImplementedError

    def activate(self, x: Tensor) -> Tensor:
        """Return the ReLU after the addition."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c_in, H, W] to [N, c_out, H / stride, W / stride]."""
        if self.dropped:
            return self.activate(x if self.downsample is None else self.downsample(x))
        out = self.residual(x)
        if self.scale != 1:
            out = out * self.scale
        if self.add is not None:
            out = self.add(out, x if self.downsample is None else self.downsample(x))
        return self.activate(out)


class BasicBlock(Block):
    """Two 3x3 convolutions (figure 5, left)."""

    layers = 2
    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d

    def __init__(
        self, c_in: int, width: int, stride: int, shortcut: str | None, stride_in: str
    ) -> None:
        super().__init__()
        for number in range(1, self.layers + 1):
            first = number == 1
            convolution = conv(c_in if first else width, width, 3, stride if first else 1)
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"bn{number}", nn.BatchNorm2d(width))
            if number < self.layers:
                self.add_module(f"relu{number}", nn.ReLU())
        self._connect(shortcut, c_in, width, stride)
        self.add_module(f"relu{self.layers}", nn.ReLU())

    def residual(self, x: Tensor) -> Tensor:
        """Map [N, c_in, H, W] to [N, width, H / stride, W / stride]."""
        for number in range(1, self.layers + 1):
            x = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x))
            if number < self.layers:
                x = getattr(self, f"relu{number}")(x)
        return x

    def activate(self, x: Tensor) -> Tensor:
        """Return the ReLU after the addition."""
        activated: Tensor = getattr(self, f"relu{self.layers}")(x)
        return activated


class OneLayerBlock(BasicBlock):
    """One 3x3 convolution: y = W x + x is a linear layer (section 3.2, below equation 2)."""

    layers = 1


class ThreeLayerBlock(BasicBlock):
    """Three 3x3 convolutions (section 3.2: "two or three layers, while more are possible")."""

    layers = 3


class Bottleneck(Block):
    """1x1, 3x3 and 1x1, with four times the width at the end (figure 5, right).

    `stride_in` "1x1" is the paper's (v1); public weights use "3x3" (v1.5).
    """

    expansion = 4

    def __init__(
        self, c_in: int, width: int, stride: int, shortcut: str | None, stride_in: str
    ) -> None:
        super().__init__()
        c_out = width * self.expansion
        first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
        self.conv1 = conv(c_in, width, 1, first)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, 3, second)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(width, c_out, 1)
        self.bn3 = nn.BatchNorm2d(c_out)
        self._connect(shortcut, c_in, c_out, stride)
        self.relu3 = nn.ReLU()

    def residual(self, x: Tensor) -> Tensor:
        """Map [N, c_in, H, W] to [N, 4 * width, H / stride, W / stride]."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        out: Tensor = self.bn3(self.conv3(x))
        return out

    def activate(self, x: Tensor) -> Tensor:
        """Return the ReLU after the addition."""
        activated: Tensor = self.relu3(x)
        return activated


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {
    "basic1": OneLayerBlock,
    "basic": BasicBlock,
    "basic3": ThreeLayerBlock,
    "bottleneck": Bottleneck,
}


class ResNet(nn.Module):
    """A stem, stages of blocks, global average pooling and a fully connected layer.

    Args:
        block: Class of the blocks.
        counts: Number of blocks in each stage.
        widths: Number of channels of the 3x3 convolutions in each stage.
        stem: "imagenet" (7x7/2 and max pool) or "cifar" (one 3x3).
        shortcut: "A", "B", "C", or None for a plain net.
        stride_in: The convolution of a bottleneck that has the stride: "1x1" or "3x3".
        num_classes: Number of logits.
        mean_image: Side of a mean image that is subtracted first, in pixels, or None.
    """

    def __init__(
        self,
        *,
        block: type[BasicBlock] | type[Bottleneck],
        counts: Sequence[int],
        widths: Sequence[int],
        stem: str,
        shortcut: str | None,
        stride_in: str,
        num_classes: int,
        mean_image: int | None = None,
    ) -> None:
        super().__init__()
        self.mean_image = None if mean_image is None else MeanImage(mean_image)
        channels = widths[0]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, channels, 7, 2, padding=3, bias=False)
        else:
            self.conv1 = conv(3, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else None
        self.stages = [f"layer{index}" for index in range(1, len(counts) + 1)]
        for index, (name, count, width) in enumerate(zip(self.stages, counts, widths, strict=True)):
            blocks = []
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(channels, width, stride, shortcut, stride_in))
                channels = width * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(channels, num_classes)
        if not self.fc.weight.is_meta:
            self.apply(initialize)

    def blocks(self) -> dict[str, Block]:
        """Return the blocks by name ("layer1.0"), in order of execution."""
        return {
            f"{stage}.{name}": block
            for stage in self.stages
            for name, block in getattr(self, stage).named_children()
        }

    def leading_parts(self) -> list[list[nn.Module]]:
        """Return the stem and the stages, which `freeze` of a recipe counts."""
        return [[self.conv1, self.bn1], *([getattr(self, name)] for name in self.stages)]

    def features(self, x: Tensor) -> Tensor:
        """Compute the map of the last stage [N, C, h, w] of normalized images [N, 3, H, W]."""
        if self.mean_image is not None:
            x = self.mean_image(x)
        x = self.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [N, num_classes] of normalized float images [N, 3, H, W]."""
        logits: Tensor = self.fc(self.flatten(self.avgpool(self.features(x))))
        return logits

    def dense(self, x: Tensor, window: int | None = None) -> Tensor:
        """Return the fully convolutional net (section 3.4, testing): FC as a 1x1 convolution.

        Args:
            x: Normalized float images [N, 3, H, W] of any H and W.
            window: Side of the average pooling that slides over the last map with stride 1, as
                the net's own pooling of 7x7 would; None pools nothing, which gives the same mean
                over positions as one pooling of the whole map.

        Returns:
            A map of logits [N, num_classes, h, w].
        """
        maps = self.features(x)
        if window is not None:
            side = min(window, *maps.shape[2:])
            maps = nn.functional.avg_pool2d(maps, side, stride=1)
        return nn.functional.conv2d(maps, self.fc.weight[:, :, None, None], self.fc.bias)


def initialize(module: nn.Module) -> None:
    """Initialize convolutions by He's method (section 3.4), and the FC bias with zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
