"""A run's folder: may it be written into, can it be gone on with, and with what; and how a net in
training goes into a checkpoint and comes out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtresnet.core import artifacts
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.labels import LabelMap, match
from rtresnet.data.sources import Source
from rtresnet.models import checkpoint
from rtresnet.models.checkpoint import Checkpoint
from rtresnet.training.qat import FakeQuantized
from rtresnet.training.recipe import Recipe, differences


def check_folder(out: Path, resume: bool) -> None:
    """Refuses to write over a run, and to resume where there is none.

    Raises:
        InputError: Either.
    """
    there = (out / "last.pt").exists()
    if there and not resume:
        raise InputError(f"{out}: holds a run already", fix="add --resume, or another --out")
    if resume and not there:
        raise InputError(f"{out}: no saved state to go on from", fix="start without --resume")


def check_start(recipe: Recipe, start: Checkpoint | None) -> None:
    """Refuses to learn INT8 from nothing: its batch norms' statistics would never be found.

    Raises:
        InputError: Fine-tuning for INT8 without weights.
    """
    if recipe.qat and start is None:
        raise InputError("--qat fine-tunes a trained net", fix="say which: --weights FILE")


def saved_run(out: Path) -> Checkpoint:
    """The state of a run, from its last.pt.

    Raises:
        InputError: There is none, or the file holds a net only.
    """
    check_folder(out, resume=True)
    for name in ("best.pt", "last.pt"):
        drop_stale_sidecar(out / name)
    last = checkpoint.load(out / "last.pt")
    if not {"recipe", "fingerprint", "step", "sums", "optimizer"} <= last.training.keys():
        raise InputError(
            f"{out / 'last.pt'}: holds no state of a run",
            fix=f"train from it instead: --weights {out / 'last.pt'} with another --out",
        )
    return last


def launch_of(out: Path) -> str | None:
    """Which launch of torchrun saved a run's state last; None where there is none to read."""
    try:
        return str(saved_run(out).training.get("launch", ""))
    except InputError:
        return None


def check_same(out: Path, saved: dict[str, Any], recipe: Recipe) -> None:
    """Refuses to go on with a run under another recipe.

    Raises:
        InputError: Names the fields that differ.
    """
    changed = differences(saved["recipe"], recipe)
    if changed:
        raise InputError(
            f"{out}: its run has another recipe ({', '.join(changed)})",
            fix="resume with the same options, or train into another --out",
        )


def drop_stale_sidecar(path: Path) -> None:
    """Removes the sidecar of another file, which a kill between the two replacements leaves behind.

    The file is whole, since it is replaced in one step, and says itself what it is.
    """
    try:
        artifacts.verify(path)
    except ArtifactError:
        artifacts.sidecar_path(path).unlink(missing_ok=True)
    except InputError:  # there is no such file yet
        return


def adopt_weights(net: torch.nn.Module, start: Checkpoint, source: Source) -> str | None:
    """Loads a checkpoint to go on from.

    Rows of the FC go with the names of their classes: on the same classes they are kept, in the
    order of the new data; on others the FC stays new.

    Args:
        net: Changed.
        start: The checkpoint.
        source: What will be trained on.

    Returns:
        What became of the FC, where that needs saying; None where it is kept as it was.

    Raises:
        InputError: The checkpoint is of another architecture.
    """
    state = dict(start.state)
    own = net.state_dict()
    mapping, told = _same_classes(start, source)
    for name in ("fc.weight", "fc.bias"):
        if mapping is None or state[name].shape != own[name].shape:
            state[name] = own[name]
        else:
            state[name] = state[name][list(mapping.indices)]
    if any(name not in state or state[name].shape != own[name].shape for name in own):
        raise InputError(
            f"the weights are of {start.model.architecture}",
            fix=f"--model {start.model.architecture}",
        )
    net.load_state_dict(state)
    return told


def _same_classes(start: Checkpoint, source: Source) -> tuple[LabelMap | None, str | None]:
    """How the data's classes match a checkpoint's, None where they are others, and what to say."""
    try:
        mapping = match(
            start.model.classes, source.classes, data_named=source.named,
            model_name="the checkpoint", data_name=source.name,
        )  # fmt: skip
    except InputError:
        mapping = None
    if mapping is None or not mapping.is_permutation:
        return None, "the checkpoint has other classes: the last layer (fc) starts untrained"
    if mapping.by == "position":
        return mapping, f"the last layer (fc) is kept; {mapping.assumptions()[0]}"
    if not mapping.in_order:
        return mapping, "the last layer (fc) is kept, its rows in the order of the data's classes"
    return mapping, None


def as_kept(net: torch.nn.Module) -> dict[str, Tensor]:
    """A net's weights as a checkpoint has them: on the CPU, under the zoo's names."""
    return on_cpu(net.net if isinstance(net, FakeQuantized) else net)


def as_loaded(net: torch.nn.Module, kept: Checkpoint) -> dict[str, Tensor]:
    """The reverse: what `net.load_state_dict` takes, learned scales included."""
    if not isinstance(net, FakeQuantized):
        return kept.state
    assert kept.learned is not None
    scales = torch.tensor([kept.learned.scales[name] for name in net.places])
    return {f"net.{name}": tensor for name, tensor in kept.state.items()} | {"scales": scales}


def on_cpu(net: torch.nn.Module) -> dict[str, Tensor]:
    """All of a net's tensors."""
    return {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
