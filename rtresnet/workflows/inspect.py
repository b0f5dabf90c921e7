"""Show an artifact and its provenance, without a GPU."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core import artifacts, atomic_io, hardware, plan_info
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.plan_info import Header, NameField
from rtresnet.core.sidecar import Sidecar
from rtresnet.workflows.loading import require_torch

if TYPE_CHECKING:
    from rtresnet.builder.layers import Layers


SELF_DESCRIBED = "no sidecar, described by its own metadata"


@dataclass(frozen=True, kw_only=True)
class ChainEntry:
    """An artifact of a chain.

    Attributes:
        state: "ok", "missing", "changed" or "no sidecar", and how it was recognized.
        sidecar: Its record, or the file's own description; None if it has neither.
    """

    path: Path
    state: str
    sidecar: Sidecar | None


@dataclass(frozen=True, kw_only=True)
class InspectResult:
    """Result of `inspect`: everything known about an artifact.

    Attributes:
        kind: "checkpoint", "onnx" or "plan".
        chain: The artifact and its ancestors, back to the origin.
        header: Header of a TensorRT-RTX plan.
        manifest: Content of a plan's name field.
        operations: Number of nodes of each operator of an ONNX file.
    """

    kind: str
    chain: tuple[ChainEntry, ...]
    header: Header | None = None
    manifest: NameField | None = None
    operations: dict[str, int] | None = None

    def require_unchanged(self) -> None:
        """Raise ArtifactError if a file of the chain changed after the next was made from it."""
        last = self.chain[-1]
        if last.state == "changed":
            raise ArtifactError(
                f"{last.path}: changed since {self.chain[0].path} was made from it",
                fix="run the commands above again for the later files",
            )


@dataclass(frozen=True, kw_only=True)
class ArtifactSummary:
    """An artifact in a folder."""

    path: Path
    kind: str
    architecture: str | None
    precision: str | None
    bytes: int
    state: str


@dataclass(frozen=True, kw_only=True)
class FolderResult:
    """The artifacts in a folder and the folders in it."""

    folder: Path
    artifacts: tuple[ArtifactSummary, ...]

    def require_unchanged(self) -> None:
        """Raise ArtifactError if a file is not the one that its sidecar describes."""
        wrong = [e.path for e in self.artifacts if e.state in ("changed", "broken sidecar")]
        if wrong:
            raise ArtifactError(
                f"{', '.join(map(str, wrong))}: does not match its sidecar",
                fix=f"see: rtresnet inspect {wrong[0]}",
            )


def inspect(path: str | os.PathLike[str]) -> InspectResult:
    """Read an artifact's sidecars, header and graph.

    Args:
        path: A checkpoint, an ONNX file or a plan.

    Returns:
        The artifact's kind, chain and header.

    Raises:
        InputError: No such file, or of another kind.
        ArtifactError: The file is damaged or does not match its sidecar.
        UnavailableError: torch is needed to read a checkpoint without sidecar.
    """
    path = atomic_io.require_file(path, fix="list artifacts with: rtresnet inspect FOLDER")
    kind = artifacts.kind_of(path)
    chain = [
        ChainEntry(path=link, state=state, sidecar=record)
        for link, record, state in artifacts.chain(path)
    ]
    sidecar = chain[0].sidecar
    if sidecar is not None and chain[0].state == "changed":
        raise artifacts.mismatch(path, sidecar)
    if kind == "checkpoint" and sidecar is None:
        return _foreign_checkpoint(path)
    head = plan_info.read_header(path) if kind == "plan" else None
    if kind == "plan" and head is None and sidecar is None:
        raise ArtifactError(
            f"{path}: has no sidecar and is not a TensorRT-RTX plan, so its content is unknown"
        )
    operations = None
    if kind == "onnx" and hardware.installed("onnx"):
        from rtresnet.onnxlib import io, metadata

        model = io.load(path, checked=True)
        operations = dict(Counter(node.op_type for node in model.graph.node).most_common())
        if sidecar is None and (record := metadata.described(path, model)) is not None:
            chain = [ChainEntry(path=path, state=SELF_DESCRIBED, sidecar=record)]
    name = plan_info.read_name_field(path) if kind == "plan" else None
    if sidecar is None and name is not None and name.sidecar is not None:
        chain = [ChainEntry(path=path, state=SELF_DESCRIBED, sidecar=plan_info.described(path))]
    return InspectResult(
        kind=kind,
        chain=tuple(chain),
        header=head,
        manifest=name,
        operations=operations,
    )


def inspect_folder(folder: str | os.PathLike[str]) -> FolderResult:
    """List the artifacts in a folder and the folders in it, and check their hashes.

    Args:
        folder: The folder.

    Returns:
        A summary of each artifact.

    Raises:
        InputError: There are none.
    """
    entries = tuple(
        ArtifactSummary(
            path=path,
            kind=artifacts.kind_of(path),
            architecture=sidecar.model.architecture if sidecar else None,
            precision=sidecar.precision if sidecar else None,
            bytes=path.stat().st_size,
            state=state,
        )
        for path, sidecar, state in artifacts.under(folder)
    )
    if not entries:
        raise InputError(f"{folder}: no checkpoint, ONNX file or plan in this folder")
    return FolderResult(folder=Path(folder), artifacts=entries)


def inspect_layers(path: str | os.PathLike[str]) -> Layers:
    """Read the fused layers from the file next to a plan.

    Args:
        path: The plan.

    Raises:
        InputError: The file is not a plan, or it has no layer file.
        ArtifactError: It does not match its sidecar.
    """
    from rtresnet.builder import layers

    if artifacts.kind_of(path) != "plan":
        raise InputError(f"{path}: only a plan has fused layers", fix="see: rtresnet build --help")
    return layers.load(Path(path), artifacts.verify(path))


def _foreign_checkpoint(path: Path) -> InspectResult:
    require_torch("reading a checkpoint without sidecar")
    from rtresnet.models import checkpoint

    loaded = checkpoint.load(path)
    record = Sidecar(
        kind="checkpoint",
        file=path.name,
        model=loaded.model,
        input=loaded.input,
        weights=loaded.weights,
        precision="fp32",
        assumed=loaded.assumed,
    )
    entry = ChainEntry(path=path, state="no sidecar, recognized by its tensors", sidecar=record)
    return InspectResult(kind="checkpoint", chain=(entry,))
