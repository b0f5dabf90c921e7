"""Detectors of detectron2: names, channel order, class order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.sidecar import Detection
from rtresnet.detection import checkpoint, foreign
from rtresnet.detection import net as nets
from rtresnet.models import zoo
from rtresnet.workflows.detect import is_detector


def theirs(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a detector under detectron2's names, with its order of channels and classes."""
    state = {}
    for name, tensor in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        new = re.sub(r"^layer([123])\.", lambda m: f"backbone.res{int(m[1]) + 1}.", name)
        new = re.sub(r"^layer4\.", "roi_heads.res5.", new)
        new = re.sub(r"\.downsample\.0\.", ".shortcut.", new)
        new = re.sub(r"\.downsample\.1\.", ".shortcut.norm.", new)
        new = re.sub(r"(^|\.)bn(\d)\.", r"\1conv\2.norm.", new)
        new = re.sub(r"^conv1\.", "backbone.stem.conv1.", new)
        new = new.replace("rpn.conv", "proposal_generator.rpn_head.conv")
        new = new.replace("rpn.score", "proposal_generator.rpn_head.objectness_logits")
        new = new.replace("rpn.offset", "proposal_generator.rpn_head.anchor_deltas")
        new = re.sub(r"^score\.", "roi_heads.box_predictor.cls_score.", new)
        new = re.sub(r"^offset\.", "roi_heads.box_predictor.bbox_pred.", new)
        if name == "conv1.weight":
            tensor = tensor.flip(1)
        if name.startswith("score."):
            tensor = tensor.roll(-1, 0)
        state[new] = tensor
    return state


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    spec = Detection(anchors=(128.0, 256.0, 512.0))
    return nets.build(zoo.spec("resnet50", stride_in="1x1"), spec, 3)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_detectron2_file_becomes_the_same_tensors(
    net: torch.nn.Module, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"model": theirs(net), "__author__": "x"}, path)
    else:
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file({name: tensor.contiguous() for name, tensor in theirs(net).items()}, path)
    assert is_detector(path)
    loaded = checkpoint.load(path)
    assert loaded.model.architecture.startswith("resnet50") and len(loaded.model.classes) == 3
    assert loaded.detection is not None and loaded.detection.anchor_offset == 0
    own = net.state_dict()
    assert own.keys() == loaded.state.keys()
    assert all(torch.equal(own[name], loaded.state[name]) for name in own)
    checkpoint.build(loaded)


def test_other_files_are_not_taken_for_detectors(tmp_path: Path) -> None:
    path = tmp_path / "classifier.pth"
    torch.save({"fc.weight": torch.zeros(2, 3)}, path)
    assert not is_detector(path) and foreign.load(path) is None
    path.write_bytes(b"broken")
    assert not is_detector(path)


def test_unknown_tensor_and_pickle_are_refused(net: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "fpn.pth"
    torch.save({**theirs(net), "backbone.res6.weight": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="res6"):
        checkpoint.load(path)
    pickled = tmp_path / "model.pkl"
    pickled.write_bytes(b"")
    with pytest.raises(InputError, match="pickle"):
        checkpoint.load(pickled)


@pytest.mark.parametrize(
    "name", ["backbone.fpn.inner_blocks.0.0.weight", "backbone.fpn_lateral2.weight"]
)
def test_detector_with_a_pyramid_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    path = tmp_path / "fpn.pth"
    torch.save({"model": {name: torch.zeros(1), foreign.MARK: torch.zeros(1)}}, path)
    with pytest.raises(InputError, match="FPN") as caught:
        checkpoint.load(path)
    assert "imagenet" in str(caught.value.fix)
