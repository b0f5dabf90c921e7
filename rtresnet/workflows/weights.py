"""Move weights between rtresnet and other tools, as safetensors files without pickled code."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core import locks, reporter
from rtresnet.core.errors import InputError
from rtresnet.core.reporter import Reporter
from rtresnet.workflows.loading import require_torch

if TYPE_CHECKING:
    from rtresnet.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class WeightsResult:
    """A file of weights that was written.

    Attributes:
        path: The file.
        model: Architecture.
        classes: Number of classes.
        bytes: Size of the file.
        sha256: SHA-256 of the file.
        license: License of the weights; None if not stated.
        assumed: What was assumed of the source.
    """

    path: Path
    model: str
    classes: int
    bytes: int
    sha256: str
    license: str | None
    assumed: tuple[str, ...]


def export_weights(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> WeightsResult:
    """Write a checkpoint's weights as a safetensors file, without the state of its training.

    The tensors have torchvision's and timm's names. Architecture, class names, input and accuracy
    are in the file's metadata, so rtresnet reads it as its own.

    Args:
        weights: A checkpoint, or published weights such as "imagenet" and "hf:OWNER/NAME".
        out: A file name in .safetensors.
        model: Architecture of a checkpoint that does not state it.
        reporter: Receives progress.

    Returns:
        The file and its content.

    Raises:
        InputError: A wrong suffix, or weights that do not exist.
        ArtifactError: Not a readable checkpoint.
        UnavailableError: torch or safetensors is not installed.
    """
    return _convert(weights, Path(out), ".safetensors", model, reporter)


def import_weights(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> WeightsResult:
    """Write weights from rtresnet or another tool as a checkpoint.

    Args:
        weights: A safetensors file or another checkpoint, or published weights.
        out: A file name in .pt.
        model: Architecture of weights that do not state it.
        reporter: Receives progress.

    Returns:
        The file and its content.

    Raises:
        InputError: A wrong suffix, or weights that do not exist.
        ArtifactError: Not weights of a supported net.
        UnavailableError: torch or safetensors is not installed.
    """
    return _convert(weights, Path(out), ".pt", model, reporter)


def _convert(
    weights: str | os.PathLike[str],
    out: Path,
    suffix: str,
    model: str | None,
    reporter: Reporter,
) -> WeightsResult:
    require_torch("weights")
    from rtresnet.models import checkpoint, download

    if out.suffix.lower() != suffix:
        raise InputError(
            f"{out}: does not end in {suffix}", fix=f"use --out {out.with_suffix(suffix)}"
        )
    if Path(weights).resolve() == out.resolve():
        raise InputError(f"{out}: would overwrite its source", fix="choose another --out")
    published = download.published(str(weights), model, reporter)
    loaded: Checkpoint = published or checkpoint.load(weights, model=model)
    with locks.hold_file(out, warn=reporter.note):
        sidecar = checkpoint.save(out, dataclasses.replace(loaded, training={}))
    return WeightsResult(
        path=out,
        model=loaded.model.architecture,
        classes=len(loaded.model.classes),
        bytes=sidecar.bytes,
        sha256=sidecar.sha256,
        license=loaded.weights.license,
        assumed=loaded.assumed,
    )
