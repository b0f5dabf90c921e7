"""Which files are detectors, and how one is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core import artifacts
from rtresnet.core.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from rtresnet.runtime.session import Session


def is_detector(path: str | os.PathLike[str]) -> bool:
    """Whether an artifact is a detector: as its sidecar says, or the file itself without one."""
    try:
        sidecar = artifacts.read_sidecar(path)
    except ArtifactError:  # the step that loads the file reports it
        return False
    if sidecar is not None:
        return sidecar.detection is not None
    kind = artifacts.SUFFIXES.get(Path(path).suffix.lower())
    if not Path(path).is_file() or kind is None:
        return False
    if kind == "onnx":
        from rtresnet.onnxlib import io, metadata

        try:
            described = metadata.described(Path(path), io.load(path))
        except (InputError, ImportError):
            return False
        return described is not None and described.detection is not None
    if kind == "plan":
        from rtresnet.core import plan_info

        described = plan_info.described(Path(path))
        return described is not None and described.detection is not None
    return _is_detector_checkpoint(Path(path))


def _is_detector_checkpoint(path: Path) -> bool:
    import torch

    from rtresnet.detection import foreign

    if path.suffix.lower() != ".safetensors":
        try:
            payload: object = torch.load(path, map_location="meta", weights_only=True)
        except Exception:  # a broken file raises almost anything; loading it reports it
            return False
        if isinstance(payload, dict) and "rtresnet" in payload:
            return "detection" in payload
    return foreign.read_state(path) is not None


def load_checkpoint(path: Path, device: str) -> Session:
    """Loads a detector's checkpoint in torch.

    Args:
        path: The file.
        device: "cpu" or "cuda".

    Raises:
        ArtifactError: It is broken, or its weights do not fit its net.
    """
    from rtresnet.detection import checkpoint
    from rtresnet.detection.backend import TorchDetector
    from rtresnet.runtime.session import Session

    loaded = checkpoint.load(path)
    net = checkpoint.build(loaded, name=os.fspath(path))
    return Session(
        path,
        artifacts.read_sidecar(path),
        TorchDetector(net.to(device)),
        input=loaded.input,
        classes=loaded.model.classes,
        precision="fp32",
        weights=loaded.weights.sha256,
        assumed=loaded.assumed,
        detection=loaded.detection,
    )


def require_detector(session: Session) -> None:
    """Raises InputError of a classifier."""
    if session.detection is None:
        raise InputError(
            f"{session.path}: a classifier, and a detector is needed",
            fix="train one with: rtresnet train --task detect",
        )
