"""Faster R-CNN with the net's own last stage as the head (C4), as in the paper's appendix A.

The layers of stride 16 (conv1 to conv4; VGG-16's 13 convolutions without the last pooling) are
shared by a region proposal network and by the head: RoIAlign, conv5 and global pooling (VGG: fc6
and fc7), then K + 1 scores and 4K offsets. Modules keep the classifier's names, so that its weights
load as they are. `proposals`, `align` and `select` are modules too; the ONNX writer has its own
code for them.

The net takes one image at a time: an ONNX file has a fixed batch of 1. `training.py` trains it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from rtresnet.core.detector_preprocess import STRIDE
from rtresnet.core.errors import InputError
from rtresnet.core.sidecar import Detection
from rtresnet.detection import boxes
from rtresnet.models import zoo
from rtresnet.models.nets import Net
from rtresnet.models.resnet import BLOCKS, BasicBlock, Bottleneck, ResNet
from rtresnet.models.vgg import VGG
from rtresnet.models.zoo import VGG_HIDDEN

SAMPLES = 2  # of RoIAlign, along each axis of a bin
HIDDEN = 512  # channels of the region proposal network's convolution


class Proposals(nn.Module):
    """Regions from the scores and offsets of the anchors.

    Decodes boxes, clips them to the image, keeps the `candidates` with the highest scores, applies
    NMS, and keeps the first `regions`. Boxes without an area rank last and are never detections.

    Args:
        spec: Numbers of boxes and thresholds.
        rounds: Repetitions of `boxes.nms`; None repeats until nothing changes.
    """

    traced_whole = True

    def __init__(self, spec: Detection, rounds: int | None = None) -> None:
        super().__init__()
        self.spec, self.rounds = spec, rounds

    def forward(self, scores: Tensor, offsets: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the regions of one image.

        Args:
            scores: Logits of the anchors [1, A, h, w].
            offsets: [1, 4 * A, h, w].
            extent: Height and width of the image on the canvas, in pixels [1, 2].

        Returns:
            Regions [regions, 4], filled up with zeros, and how many boxes are not settled [].
        """
        spec = self.spec
        flat, decoded = self.decoded(scores, offsets, extent)
        count = min(spec.candidates, len(flat))
        order = torch.sort(flat, descending=True, stable=True).indices[:count]
        candidates = decoded[order]
        keep, changed = boxes.nms(candidates, spec.region_iou, self.rounds)
        return first_kept(candidates, keep, min(spec.regions, count)), changed

    def decoded(self, scores: Tensor, offsets: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [N] and boxes [N, 4] of all anchors, position by position."""
        flat, steps = flattened(scores, offsets)
        base = boxes.anchors(
            scores.shape[2], scores.shape[3], STRIDE, self.spec.anchors, self.spec.anchor_offset
        )
        decoded = boxes.clip(boxes.decode(steps, base.to(scores)), extent[0])
        return torch.where(boxes.area(decoded) > 0, flat, -1e4), decoded


def flattened(scores: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten [1, A, h, w] and [1, 4 * A, h, w] to [N] and [N, 4], ordered as `boxes.anchors`."""
    _, kinds, height, width = scores.shape
    flat = scores[0].permute(1, 2, 0).reshape(-1)
    return flat, offsets[0].reshape(kinds, 4, height, width).permute(2, 3, 0, 1).reshape(-1, 4)


def first_kept(candidates: Tensor, keep: Tensor, count: int) -> Tensor:
    """Return the first `count` of the kept rows [N, 4] in their order, then zeros."""
    total = len(candidates)
    # Distinct whole numbers, so that no two runtimes can order equal ones differently.
    rank = keep * torch.arange(total, 0, -1, dtype=keep.dtype, device=keep.device)
    values, order = torch.topk(rank, count)
    return candidates[order] * (values > 0).to(candidates.dtype)[:, None]


class Align(nn.Module):
    """RoIAlign of the shared map."""

    traced_whole = True

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, features: Tensor, regions: Tensor) -> Tensor:
        """Map [1, C, h, w] and [R, 4] to [R, C, bins, bins]."""
        return boxes.roi_align(features[0], regions, 1 / STRIDE, self.bins, SAMPLES)


class Select(nn.Module):
    """Detections from the head's scores and offsets: class by class suppression, then the best."""

    traced_whole = True

    def __init__(self, spec: Detection, classes: int) -> None:
        super().__init__()
        self.spec, self.classes = spec, classes

    def forward(
        self, scores: Tensor, offsets: Tensor, regions: Tensor, extent: Tensor, unsettled: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the detections of one image.

        Args:
            scores: Logits [R, classes + 1], the background first.
            offsets: [R, 4 * classes].
            regions: [R, 4].
            extent: As in `Proposals`.
            unsettled: From `Proposals`, [].

        Returns:
            Boxes [1, detections, 4], scores [1, detections] from high to low, classes [1,
            detections], and how many boxes are not settled, those of `Proposals` included [1].
            Unused rows are zeros, class -1.
        """
        spec, count = self.spec, len(regions)
        real = (boxes.area(regions) > 0).to(scores.dtype)
        chances = torch.softmax(scores, 1)[:, 1:] * real[:, None]
        steps = offsets.reshape(count, self.classes, 4)
        decoded = boxes.clip(boxes.decode(steps, regions[:, None], boxes.REGION_STD), extent[0])
        chances, order = torch.sort(chances.T, dim=1, descending=True, stable=True)
        decoded = torch.gather(decoded.transpose(0, 1), 1, order[..., None].expand(-1, -1, 4))
        keep, changed = boxes.nms(decoded, spec.class_iou, spec.rounds)
        masked = (chances * keep * (chances > spec.least_score)).reshape(-1)
        best, order = torch.topk(masked, min(spec.detections, len(masked)))
        valid = best > 0
        labels = torch.where(valid, order // count, -1)
        picked = decoded.reshape(-1, 4)[order] * valid.to(decoded.dtype)[:, None]
        return picked[None], best[None], labels[None], (unsettled + changed.sum())[None]


class RegionProposalNet(nn.Module):
    """A 3x3 convolution, and for each anchor a score and four offsets."""

    def __init__(self, channels: int, hidden: int, kinds: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, hidden, 3, padding=1)
        self.relu = nn.ReLU()
        self.score = nn.Conv2d(hidden, kinds, 1)
        self.offset = nn.Conv2d(hidden, 4 * kinds, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map [1, C, h, w] to scores [1, A, h, w] and offsets [1, 4 * A, h, w]."""
        hidden = self.relu(self.conv(features))
        return self.score(hidden), self.offset(hidden)


class Detector(nn.Module):
    """The detector of one backbone.

    Args:
        backbone: A classifier of the zoo; its last layer is left out.
        spec: Sizes and numbers of boxes.
        classes: Number of classes, the background not counted.

    Raises:
        InputError: Regions of a size that the backbone's head does not take.
    """

    def __init__(self, backbone: Net, spec: Detection, classes: int) -> None:
        super().__init__()
        self.spec, self.classes = spec, classes
        sizes = (7,) if isinstance(backbone, VGG) else (7, 14)
        if spec.pool not in sizes:
            raise InputError(
                f"pool={spec.pool}: must be {' or '.join(map(str, sizes))}",
                fix=f"add --set pool={sizes[0]}",
            )
        if isinstance(backbone, VGG):
            # The 13 convolutions without the last pooling; fc6 and fc7.
            self.shared_names: tuple[str, ...] = ("features",)
            self.head_names: tuple[str, ...] = ("flatten", "classifier")
            self.features = backbone.features[:-1]
            self.classifier = backbone.classifier[:-1]
            convolutions = [m for m in backbone.features if isinstance(m, nn.Conv2d)]
            shared = convolutions[-1].out_channels
            self._parts = backbone.leading_parts()[:-1]
        else:
            stages = tuple(backbone.stages)
            self.shared_names = ("conv1", "bn1", "relu", "maxpool", *stages[:-1])
            self.head_names = (stages[-1], "avgpool", "flatten")
            for name, module in backbone.named_children():
                if name not in ("fc", "avgpool", "flatten"):
                    self.add_module(name, module)
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            shared = _channels(self, stages[-2])
            if spec.pool == 7:
                _without_stride(getattr(self, stages[-1])[0])
            self._parts = backbone.leading_parts()[:-1]
        self.flatten = nn.Flatten(1)
        hidden = max(16, round(HIDDEN * spec.width))
        self.rpn = RegionProposalNet(shared, hidden, 3 * len(spec.anchors))
        self.proposals = Proposals(spec, spec.rounds)
        self.align = Align(spec.pool)
        self.score = nn.Linear(backbone.fc.in_features, classes + 1)
        self.offset = nn.Linear(backbone.fc.in_features, 4 * classes)
        self.select = Select(spec, classes)
        for layer, std in (
            (self.rpn.conv, 0.01), (self.rpn.score, 0.01), (self.rpn.offset, 0.01),
            (self.score, 0.01), (self.offset, 0.001),
        ):  # fmt: skip
            if not layer.weight.is_meta:
                nn.init.normal_(layer.weight, std=std)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def shared(self, images: Tensor) -> Tensor:
        """Compute the map of stride 16 [N, C, H / 16, W / 16] of normalized images [N, 3, H, W]."""
        x = images
        for name in self.shared_names:
            x = self.get_submodule(name)(x)
        return x

    def leading_parts(self) -> list[list[nn.Module]]:
        """Return the shared parts, which `freeze` of a recipe counts."""
        return self._parts

    def head(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits [R, K + 1] and offsets [R, 4K] of region features [R, C, pool, pool]."""
        x = crops
        for name in self.head_names:
            x = self.get_submodule(name)(x)
        return self.score(x), self.offset(x)

    def forward(self, images: Tensor, extent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the detections of one image.

        Args:
            images: Normalized float32 [1, 3, H, W], sides divisible by 16.
            extent: Height and width of the image on the canvas [1, 2], in pixels.

        Returns:
            Boxes [1, D, 4], scores [1, D], classes [1, D], unsettled boxes [1]; see `Select`.
        """
        features = self.shared(images)
        scores, offsets = self.rpn(features)
        regions, unsettled = self.proposals(scores, offsets, extent)
        logits, steps = self.head(self.align(features, regions))
        result: tuple[Tensor, Tensor, Tensor, Tensor] = self.select(
            logits, steps, regions, extent, unsettled
        )
        return result


def _channels(net: nn.Module, stage: str) -> int:
    block = getattr(net, stage)[-1]
    last = block.conv3 if isinstance(block, Bottleneck) else block.conv2
    return int(last.out_channels)


def _without_stride(block: BasicBlock | Bottleneck) -> None:
    """Make the last stage work on crops of 7x7 instead of every second position of 14x14."""
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)


def build(spec: zoo.Spec, detection: Detection, classes: int, *, device: str = "cpu") -> Detector:
    """Build a detector with freshly initialized weights.

    Args:
        spec: The backbone, an ImageNet or a VGG net.
        detection: Sizes and numbers of boxes.
        classes: Number of classes, the background not counted.
        device: "meta" makes shapes only.

    Raises:
        InputError: A CIFAR net, whose maps have another stride.
    """
    if spec.family not in ("imagenet", "vgg"):
        raise InputError(
            f"{spec.name}: has no layers of stride 16 to share", fix="as in --backbone resnet50"
        )
    with torch.device(device):
        widths = [max(4, round(width * detection.width)) for width in spec.widths]
        backbone: Net
        if spec.family == "vgg":
            backbone = VGG(
                counts=spec.counts, widths=widths, batch_norm=spec.batch_norm, num_classes=1,
                hidden=max(16, round(VGG_HIDDEN * detection.width)),
            )  # fmt: skip
        else:
            backbone = ResNet(
                block=BLOCKS[spec.block], counts=spec.counts, widths=widths, stem=spec.family,
                shortcut=spec.shortcut, stride_in=spec.stride_in, num_classes=1,
            )  # fmt: skip
        return Detector(backbone, detection, classes)


def on_canvas(spec: Detection, canvas: tuple[int, int]) -> Detection:
    """Return the same detector for files that take `canvas` (height, width).

    Raises:
        InputError: A side of the canvas is not a multiple of the stride.
    """
    if any(side < 2 * STRIDE or side % STRIDE for side in canvas):
        raise InputError(
            f"canvas {canvas[0]}x{canvas[1]}: both sides must be multiples of {STRIDE}",
            fix=f"as in --canvas {-(-canvas[0] // STRIDE) * STRIDE}x"
            f"{-(-canvas[1] // STRIDE) * STRIDE}",
        )
    return dataclasses.replace(spec, canvas=canvas)


def detect(net: Detector, image: Tensor, extent: Tensor) -> dict[str, np.ndarray]:
    """Return one image's detections as NumPy arrays, under the names of the ONNX file's outputs."""
    with torch.inference_mode():
        outputs = net(image, extent)
    names = ("boxes", "scores", "labels", "unsettled")
    return {name: value.numpy(force=True) for name, value in zip(names, outputs, strict=True)}
