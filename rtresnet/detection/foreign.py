"""Detectors of detectron2 (Faster R-CNN, C4) as checkpoints, by the names of their tensors.

    backbone.stem.conv1                        conv1
    backbone.res2.0.conv1, .norm, .shortcut    layer1.0.conv1, bn1, downsample
    roi_heads.res5.0.conv1                     layer4.0.conv1
    proposal_generator.rpn_head                rpn
    roi_heads.box_predictor                    score, offset

Its C4 nets take BGR pixels and have the background as the last class; both are converted. Only .pth
and .safetensors files are read: the .pkl files of its model zoo are pickles, which can run code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rtresnet.core import atomic_io
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Detection, Weights
from rtresnet.models import checkpoint, zoo
from rtresnet.models.checkpoint import Checkpoint

MARK = "proposal_generator.rpn_head.conv.weight"
DEPTHS = {6: 50, 23: 101, 36: 152}  # blocks of res4
# Its default for C4: BGR pixels from 0 to 255, of which these means are subtracted.
MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
STD = (1 / 255, 1 / 255, 1 / 255)
ANCHORS = {15: (32.0, 64.0, 128.0, 256.0, 512.0), 12: (64.0, 128.0, 256.0, 512.0),
           9: (128.0, 256.0, 512.0)}  # fmt: skip
# Tensors of torchvision's detectors, with and without a pyramid, and of detectron2's with one.
OTHERS = (
    "backbone.fpn.inner_blocks.0.weight", "backbone.fpn.inner_blocks.0.0.weight",
    "roi_heads.box_head.fc6.weight", "backbone.fpn_lateral2.weight",
)  # fmt: skip
IGNORED = ("pixel_mean", "pixel_std")
PLAIN = {
    "proposal_generator.rpn_head.conv": "rpn.conv",
    "proposal_generator.rpn_head.objectness_logits": "rpn.score",
    "proposal_generator.rpn_head.anchor_deltas": "rpn.offset",
    "roi_heads.box_predictor.cls_score": "score",
    "roi_heads.box_predictor.bbox_pred": "offset",
    "backbone.stem.conv1": "conv1",
    "backbone.stem.conv1.norm": "bn1",
}
BLOCK = re.compile(r"(?:backbone|roi_heads)\.res([2-5])\.(\d+)\.(conv[123]|shortcut)(\.norm)?")


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    """Return the tensors of a detectron2 C4 detector; None of any other file.

    Raises:
        InputError: A .pkl file.
    """
    path = Path(path)
    if path.suffix.lower() == ".pkl":
        raise InputError(
            f"{path}: is a pickle, which can run code, so it is not loaded",
            fix="if you trust it, convert it to .pth: torch.save(state_dict, FILE)",
        )
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            payload: object = load_file(path)
        else:
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a broken file raises almost anything; the caller reports it
        return None
    if isinstance(payload, dict) and isinstance(payload.get("model"), dict):
        payload = payload["model"]
    if isinstance(payload, dict) and any(name in payload for name in OTHERS):
        raise InputError(
            f"{path}: a Faster R-CNN with a feature pyramid (FPN) or a head of fully connected "
            "layers, as in torchvision; only C4 nets are supported",
            fix="start from the backbone's classifier: --weights imagenet",
        )
    if not isinstance(payload, dict) or MARK not in payload:
        return None
    return {str(name): tensor for name, tensor in payload.items() if isinstance(tensor, Tensor)}


def load(path: str | os.PathLike[str]) -> Checkpoint | None:
    """Import a detectron2 C4 detector; None of any other file.

    Raises:
        ArtifactError: Tensors that no net of the zoo has.
    """
    state = read_state(path)
    if state is None:
        return None
    blocks = {int(match[2]) for name in state if (match := BLOCK.match(name)) and match[1] == "4"}
    depth = DEPTHS.get(len(blocks))
    if depth is None or "roi_heads.res5.0.conv1.weight" not in state:
        raise ArtifactError(f"{path}: not a Faster R-CNN C4 of 50, 101 or 152 layers")
    spec = zoo.spec(f"resnet{depth}", stride_in="1x1")
    kinds = len(state["proposal_generator.rpn_head.objectness_logits.weight"])
    if kinds not in ANCHORS:
        raise ArtifactError(f"{path}: {kinds} anchors per position, expected 9, 12 or 15")
    classes = len(state["roi_heads.box_predictor.bbox_pred.bias"]) // 4
    return Checkpoint(
        model=checkpoint.model_of(spec, tuple(str(index) for index in range(classes))),
        input=Preprocess.for_size(spec.size, mean=MEAN, std=STD),
        weights=Weights(origin="file", sha256=atomic_io.sha256(path), source=os.fspath(path)),
        state=_renamed(path, state),
        assumed=(
            "input: BGR means of detectron2's C4 configs, no division by std",
            "model: stride in the first 1x1 convolution, RoIAlign with 2 samples where detectron2 "
            "adapts their number",
        ),
        detection=Detection(
            shorter=800, longer=1333, anchors=ANCHORS[kinds], anchor_offset=0.0, pool=14,
            class_iou=0.5,
        ),
    )  # fmt: skip


def _renamed(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        owner, _, field = name.rpartition(".")
        match = BLOCK.fullmatch(owner)
        if owner in PLAIN:
            target = PLAIN[owner]
        elif match is not None:
            block, part = f"layer{int(match[1]) - 1}.{match[2]}", match[3]
            if part == "shortcut":
                target = f"{block}.downsample.{1 if match[4] else 0}"
            else:
                target = f"{block}.{part.replace('conv', 'bn') if match[4] else part}"
        elif "anchor_generator" in name or name in IGNORED:
            continue
        else:
            raise ArtifactError(f"{path}: {name} is unknown in a Faster R-CNN C4")
        renamed[f"{target}.{field}"] = tensor.float()
        if field == "running_var":
            renamed[f"{target}.num_batches_tracked"] = torch.tensor(0)
    renamed["conv1.weight"] = renamed["conv1.weight"].flip(1)
    for field in ("weight", "bias"):
        renamed[f"score.{field}"] = renamed[f"score.{field}"].roll(1, 0)
    return renamed
