"""Residual nets and their plain counterparts (He, Zhang, Ren, Sun, 2015).

Sections 3.3, 4.1 (ImageNet) and 4.2 (CIFAR-10). Module names follow the public checkpoints
(`conv1`, `layer1.0.conv1`, `layer2.0.downsample.0`, `fc`), so that weights trade without
renaming. Every operation, the addition included, is a module of its own: it has a name that
survives into the ONNX file, the engine and the profile.

Deliberately unaware of names such as "resnet50": see `zoo.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SHORTCUTS = ("A", "B", "C")
STRIDES_IN = ("1x1", "3x3")


class Add(nn.Module):
    """Element-wise sum of the residual branch (first) and the shortcut (second)."""

    def forward(self, residual: Tensor, shortcut: Tensor) -> Tensor:
        """Both [N, C, H, W]."""
        return residual + shortcut


class PadShortcut(nn.Module):
    """Option A where dimensions change: every stride-th pixel, new channels filled with zeros.

    Free of parameters, so a residual net has exactly its plain net's. The zeros go half before
    and half after the old channels, as in the public CIFAR checkpoints; the paper leaves it open.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] to [N, c_out, ceil(H / stride), ceil(W / stride)]."""
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, self.before, self.after))


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias (BN follows) that keeps the size at stride 1."""
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


def shortcut_module(option: str, c_in: int, c_out: int, stride: int) -> nn.Module | None:
    """The shortcut's own operation, or None where it is the identity (section 4.1, A to C)."""
    changes = stride != 1 or c_in != c_out
    if option == "C" or (option == "B" and changes):
        return nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))
    return PadShortcut(c_in, c_out, stride) if changes else None


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (figure 2); without a shortcut, two layers of a plain net."""

    expansion = 1

    def __init__(
        self, c_in: int, width: int, stride: int, shortcut: str | None, stride_in: str
    ) -> None:
        super().__init__()
        self.conv1 = conv(c_in, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut_module(shortcut, c_in, width, stride) if shortcut else None
        self.add = Add() if shortcut else None
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] to [N, width, H / stride, W / stride]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.add is not None:
            out = self.add(out, x if self.downsample is None else self.downsample(x))
        activated: Tensor = self.relu2(out)
        return activated


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with four times the width out (figure 5).

    `stride_in` "1x1" is the paper's (v1); "3x3" is what public weights use (v1.5).
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
        self.downsample = shortcut_module(shortcut, c_in, c_out, stride) if shortcut else None
        self.add = Add() if shortcut else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] to [N, 4 * width, H / stride, W / stride]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.add is not None:
            out = self.add(out, x if self.downsample is None else self.downsample(x))
        activated: Tensor = self.relu3(out)
        return activated


class ResNet(nn.Module):
    """A stem, stages of blocks, global average pooling and a fully connected layer.

    Args:
        block: BasicBlock or Bottleneck.
        counts: Blocks a stage.
        widths: Channels of the 3x3 convolutions, a stage.
        stem: "imagenet" (7x7/2 and max pool) or "cifar" (one 3x3).
        shortcut: "A", "B", "C", or None for a plain net.
        stride_in: Where a bottleneck strides: "1x1" or "3x3".
        num_classes: Number of logits.
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
    ) -> None:
        super().__init__()
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

    def features(self, x: Tensor) -> Tensor:
        """Normalized float images [N, 3, H, W] to the last stage's map [N, C, h, w]."""
        x = self.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Normalized float images [N, 3, H, W] to logits [N, num_classes]."""
        logits: Tensor = self.fc(self.flatten(self.avgpool(self.features(x))))
        return logits


def initialize(module: nn.Module) -> None:
    """He initialization of convolutions (section 3.4, reference 13); the FC's bias is zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def multiply_adds(model: nn.Module, size: int) -> int:
    """Multiply-adds of convolutions and the FC for one image of `size` by `size` pixels.

    Counted on a run of the net itself, as the paper counts: BN, ReLU, pooling and the addition
    are left out. On the meta device nothing is computed.
    """
    total, training = 0, model.training

    def count(module: nn.Module, _: object, out: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        positions = out.numel() // module.weight.shape[0]
        total += positions * module.weight.numel()

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    weight = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=weight.device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return total
