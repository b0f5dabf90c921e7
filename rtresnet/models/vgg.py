"""VGG-16 and VGG-19 (Simonyan and Zisserman, 2015): the paper's points of comparison.

Section 3.3 compares multiply-adds with VGG-19, and the detection experiments use VGG-16. Module
names follow torchvision (`features.0`, `classifier.6`), so that its weights load without renaming.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtresnet.models.zoo import VGG_HIDDEN, VGG_POOLED

DROPOUT = 0.5


class VGG(nn.Module):
    """Stages of 3x3 convolutions with a max pool after each, and three fully connected layers.

    Args:
        counts: Number of convolutions in each stage.
        widths: Number of channels in each stage.
        batch_norm: Whether batch norm follows each convolution.
        num_classes: Number of logits.
        hidden: Width of the first two FC layers.
    """

    def __init__(
        self,
        *,
        counts: Sequence[int],
        widths: Sequence[int],
        batch_norm: bool,
        num_classes: int,
        hidden: int = VGG_HIDDEN,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, self.stage_ends = 3, list[int]()
        for count, width in zip(counts, widths, strict=True):
            for _ in range(count):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                channels = width
            layers.append(nn.MaxPool2d(2, 2))
            self.stage_ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(VGG_POOLED)
        self.flatten = nn.Flatten(1)
        self.classifier = nn.Sequential(
            nn.Linear(channels * VGG_POOLED**2, hidden),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(hidden, num_classes),
        )
        if not self.classifier[0].weight.is_meta:
            self.apply(initialize)

    @property
    def fc(self) -> nn.Linear:
        """The layer that computes the logits."""
        last = self.classifier[-1]
        assert isinstance(last, nn.Linear)
        return last

    def leading_parts(self) -> list[list[nn.Module]]:
        """Return the stages, which `freeze` of a recipe counts."""
        starts = [0, *self.stage_ends]
        layers = list(self.features)
        return [layers[start:end] for start, end in zip(starts, self.stage_ends, strict=False)]

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [N, num_classes] of normalized images [N, 3, H, W], at least 32 x 32."""
        maps = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(self.flatten(maps))
        return logits

    def dense(self, x: Tensor, window: int | None = None) -> Tensor:
        """Return the fully convolutional net: FC layers as 7x7 and 1x1 convolutions.

        Args:
            x: Normalized float images [N, 3, H, W], at least 224 x 224.
            window: Ignored, because the first FC layer is a window of 7x7.

        Returns:
            A map of logits [N, num_classes, h, w].
        """
        maps: Tensor = self.features(x)
        linear = [layer for layer in self.classifier if isinstance(layer, nn.Linear)]
        for number, layer in enumerate(linear):
            side = 1 if number else VGG_POOLED
            kernel = layer.weight.view(layer.out_features, -1, side, side)
            maps = nn.functional.conv2d(maps, kernel, layer.bias)
            if layer is not linear[-1]:
                maps = nn.functional.relu(maps)
        return maps


def initialize(module: nn.Module) -> None:
    """Initialize as torchvision does: He for convolutions, deviation 0.01 for FC layers."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def pooled_by_weight(weight: Tensor, side: int) -> Tensor:
    """Return the first FC layer's weight for a map of `side` x `side` without pooling to 7x7.

    Adaptive average pooling is linear, so its matrix is multiplied into the weight.

    Args:
        weight: [out, channels * 7 * 7].
        side: Side of the last stage's map, in pixels.

    Returns:
        [out, channels * side * side].
    """
    units = torch.eye(side * side, dtype=torch.float64).view(side * side, 1, side, side)
    matrix = nn.functional.adaptive_avg_pool2d(units, VGG_POOLED).view(side * side, -1)
    split = weight.double().view(len(weight), -1, VGG_POOLED**2)
    return (split @ matrix.T).reshape(len(weight), -1).to(weight.dtype)
