"""Find out whether images were used for training the nets that they are to measure."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core import artifacts
from rtresnet.core.errors import ArtifactError
from rtresnet.core.reporter import plural
from rtresnet.core.sidecar import Weights

if TYPE_CHECKING:
    from rtresnet.data.held_out import HeldOut
    from rtresnet.data.sources import Relabelled


def trained_on(
    nets: Iterable[tuple[str | os.PathLike[str], Weights | None]], source: Relabelled, split: str
) -> tuple[str, ...]:
    """Return a remark for each net that was trained on some of the images.

    Args:
        nets: Files and the origin of their weights, None if it is unknown.
        source: The images.
        split: The part of them that is used.
    """
    if source.splits and split == "test":
        return ()
    remarks = []
    for path, weights in nets:
        folder, held_out = _held_out(path, weights, source)
        if held_out is not None:
            remarks.append(
                f"{held_out.train:,} of these {plural(len(source), 'image')} are training images "
                f"of {path}, so the accuracy is too high; evaluate the "
                f"{plural(len(held_out.test), 'image')} that its run held out: --data run:{folder}"
            )
        elif weights is not None and _training_data(weights) == source.name:
            remarks.append(
                f"these images include training images of {path}; its accuracy on new images is "
                "probably lower"
            )
    return tuple(remarks)


def _held_out(
    path: str | os.PathLike[str], weights: Weights | None, source: Relabelled
) -> tuple[Path, HeldOut | None]:
    """Return the folder of the run that a net is from, and its split if it is one of `source`.

    A checkpoint is in that folder; the weights of a file that was exported from it name it.
    """
    from rtresnet.data.held_out import read_held_out

    folder = Path(path).parent
    source_file = weights.source if weights is not None and weights.origin == "trained" else None
    if source_file is not None and artifacts.sidecar_path(source_file).is_file():
        folder = Path(source_file).parent
    held_out = read_held_out(folder)
    if held_out is not None and held_out.fingerprint != source.fingerprint():
        held_out = None
    return folder, held_out


def _training_data(weights: Weights) -> str | None:
    """Return the data of a training run, which an ONNX file's weights name by their checkpoint."""
    if weights.origin != "trained" or weights.source is None:
        return None
    with contextlib.suppress(ArtifactError, OSError):
        if (checkpoint := artifacts.read_sidecar(weights.source)) is not None:
            return checkpoint.weights.source
    return weights.source
