"""Checkpoints of detectors: saved, loaded, and started from a classifier's weights."""

from __future__ import annotations

import os

from rtresnet.core import artifacts
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.detection import foreign
from rtresnet.detection import net as nets
from rtresnet.detection.net import Detector
from rtresnet.models import checkpoint
from rtresnet.models.checkpoint import Checkpoint


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a detector that `rtresnet train --task detect` wrote, or one of detectron2 (C4).

    Raises:
        ArtifactError: Not one, broken, or not matching its sidecar.
        InputError: A .pkl file.
    """
    # Only files of other tools have no sidecar; `checkpoint.load` checks it before it reads.
    if artifacts.read_sidecar(path) is None and (imported := foreign.load(path)) is not None:
        return imported
    loaded = checkpoint.load(path, detector=True)
    build(loaded, name=os.fspath(path))
    return loaded


def build(loaded: Checkpoint, *, name: str = "checkpoint") -> Detector:
    """Return the net of a checkpoint with its weights, in evaluation mode, on the CPU.

    Args:
        loaded: A detector's checkpoint.
        name: Name of its file, for the message.

    Raises:
        ArtifactError: The weights do not fit the net.
    """
    assert loaded.detection is not None
    net = nets.build(loaded.spec, loaded.detection, len(loaded.model.classes))
    own = net.state_dict()
    wrong = [
        key for key in own if key not in loaded.state or own[key].shape != loaded.state[key].shape
    ]
    wrong += [key for key in loaded.state if key not in own]
    if wrong:
        raise ArtifactError(
            f"{name}: does not fit its net: {', '.join(wrong[:3])}"
            + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
    net.load_state_dict(loaded.state)
    return net.eval()


def start_from(net: Detector, start: Checkpoint) -> None:
    """Load pre-trained weights: of the same detector, or of the classifier that is its backbone.

    The last layers of the head are initialized if the classes differ.

    Raises:
        InputError: The weights are of a different net.
    """
    own = net.state_dict()
    fits = {
        name: tensor
        for name, tensor in start.state.items()
        if name in own and own[name].shape == tensor.shape
    }
    needed = [name for name in own if not name.startswith(("rpn.", "score.", "offset."))]
    missing = [name for name in needed if name not in fits]
    if missing:
        width = start.detection.width if start.detection else 1.0
        raise InputError(
            f"the weights are of {start.model.architecture} with width={width:g} and do not fit "
            f"the backbone with width={net.spec.width:g} ({missing[0]})",
            fix=f"add --set width={width:g}"
            if net.spec.width != width
            else f"--backbone {start.model.architecture}",
        )
    net.load_state_dict(own | fits)
