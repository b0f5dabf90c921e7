"""The folder of a run: written, resumed.

    best.pt     the epoch with the highest accuracy on the held-out images; the last of equal ones
    last.pt     the latest state, with everything that --resume needs
    log.jsonl   one line per epoch
    split.json  the held-out images, if the data set has no test images (`data/held_out.py`)

Files are replaced atomically, best.pt before last.pt. last.pt contains what does not follow from
the number of the step: weights, momentum, averages, the step, the epoch's sums so far, the log.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rtresnet.core import artifacts, atomic_io
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.labels import LabelMap, match
from rtresnet.core.sidecar import Measurements, Model, Weights
from rtresnet.data.held_out import HeldOut
from rtresnet.data.sources import Source
from rtresnet.models import checkpoint
from rtresnet.models.checkpoint import Checkpoint
from rtresnet.onnxlib.metadata import TrainedScales
from rtresnet.training.config import EpochRecord, Recipe, TrainJob
from rtresnet.training.data_report import DataReport
from rtresnet.training.dataset import Dataset
from rtresnet.training.distributed import World
from rtresnet.training.qat import FakeQuantized
from rtresnet.training.step import Stepper

FC = tuple(f"{layer}.{part}" for layer in ("fc", "classifier.6") for part in ("weight", "bias"))


@dataclass(kw_only=True)
class EpochStats:
    """Sums over the steps of an epoch so far, over all processes' images."""

    loss: float = 0.0
    hits: float = 0.0
    seen: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass(kw_only=True)
class RunState:
    """State of a run.

    Attributes:
        step: Steps done.
        best: Best accuracy so far, in %.
        sums: Sums of the epoch so far.
        log: The epochs' records.
        warmed: First step after a warm-up that the training error ends; None before.
        recent_hits, recent_seen: Sums since the training error was last compared.
    """

    step: int = 0
    best: float = -1.0
    sums: EpochStats = field(default_factory=EpochStats)
    log: list[EpochRecord] = field(default_factory=list)
    warmed: int | None = None
    recent_hits: float = 0.0
    recent_seen: int = 0

    def note_error(self, hits: float, count: int, *, least: int, until: float) -> None:
        """End the warm-up if the training error of at least `least` images is below `until` %."""
        if not until or self.warmed is not None:
            return
        self.recent_hits, self.recent_seen = self.recent_hits + hits, self.recent_seen + count
        if self.recent_seen >= least:
            if 100 * (1 - self.recent_hits / self.recent_seen) < until:
                self.warmed = self.step
            self.recent_hits, self.recent_seen = 0.0, 0


class CheckpointManager:
    """Writes a run's folder; with several processes, the main one does.

    Args:
        job: The job of the run.
        model: The net's description for checkpoints.
        total: Steps of the whole run.
        report: Counts and problems of its images.
        world: This process among several.
    """

    def __init__(
        self,
        job: TrainJob,
        model: Model,
        *,
        total: int,
        report: DataReport,
        world: World,
    ) -> None:
        self.job, self.model, self.world = job, model, world
        self.total, self.report = total, report
        self.fingerprint = job.source.fingerprint()
        self.license = job.start.weights.license if job.start else None

    def save_best(self, state: RunState, stepper: Stepper) -> None:
        """Write best.pt: the net as it is now."""
        if self.world.is_main:
            best = self._checkpoint(stepper, self._run_record(), state)
            checkpoint.save(self.job.out / "best.pt", best)

    def save_last(self, state: RunState, stepper: Stepper) -> None:
        """Write last.pt, with everything that `restore` needs."""
        if not self.world.is_main:
            return
        record = self._run_record() | {
            "step": state.step,
            "best": state.best,
            "log": state.log,
            "sums": dataclasses.asdict(state.sums),
            "warmup": [state.warmed, state.recent_hits, state.recent_seen],
            "launch": self.world.launch,
            "optimizer": stepper.optimizer.state_dict(),
            "scaler": stepper.scaler.state_dict(),
            # Training draws nothing from it; kept so that nothing can come to depend on it.
            "random": torch.get_rng_state(),
        }
        if stepper.average:
            weights = {name: t.detach().cpu() for name, t in stepper.net.state_dict().items()}
            record |= {"weights": weights, "updates": stepper.average.updates}
        checkpoint.save(self.job.out / "last.pt", self._checkpoint(stepper, record, state))

    def write_log(self, state: RunState) -> None:
        """Write log.jsonl."""
        if self.world.is_main:
            lines = "".join(json.dumps(entry) + "\n" for entry in state.log)
            atomic_io.write_text(self.job.out / "log.jsonl", lines)

    def write_split(self, data: Dataset) -> None:
        """Write split.json, if the data set has no test images."""
        parts, indices = data.parts, data.indices
        if self.world.is_main and parts.test is not None:
            HeldOut(
                data=self.job.source.name, fingerprint=self.fingerprint, train=len(parts.train),
                val=indices[parts.val].tolist(), test=indices[parts.test].tolist(),
            ).write(self.job.out)  # fmt: skip

    def restore(self, stepper: Stepper, last: Checkpoint) -> RunState:
        """Restore the state of last.pt.

        Raises:
            InputError: It belongs to another net or other images.
        """
        out, saved = self.job.out, last.training
        if last.model != self.model or saved["fingerprint"] != self.fingerprint:
            raise InputError(
                f"{out}: its run is {last.model.architecture} on {saved['data']}, or "
                "those images have changed",
                fix="train into another --out",
            )
        if stepper.average:
            stepper.average.net.load_state_dict(state_from(last, stepper.average.net))
            stepper.average.updates = saved["updates"]
        stepper.net.load_state_dict(
            saved["weights"] if stepper.average else state_from(last, stepper.net)
        )
        stepper.optimizer.load_state_dict(saved["optimizer"])
        stepper.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["random"])
        self.license = last.weights.license
        sums = EpochStats(**saved["sums"])
        warmed, hits, count = saved.get("warmup", (None, 0.0, 0))
        return RunState(
            step=saved["step"], best=saved["best"], log=saved["log"], sums=sums,
            warmed=warmed, recent_hits=hits, recent_seen=count,
        )  # fmt: skip

    def _run_record(self) -> dict[str, Any]:
        teacher = self.job.teacher
        return {
            "recipe": dataclasses.asdict(self.job.recipe),
            "data": self.job.source.name,
            "fingerprint": self.fingerprint,
            "total": self.total,
            "images": {k: v for k, v in vars(self.report).items() if k != "classes"},
            **({"teacher": dataclasses.asdict(teacher.weights)} if teacher else {}),
        }

    def _checkpoint(
        self, stepper: Stepper, training: dict[str, Any], state: RunState
    ) -> Checkpoint:
        net, measured, learned = stepper.kept, Measurements(), None
        if state.log:
            last = state.log[-1]
            measured = {
                "val_top1": last["val_top1"],
                "val_n": last["val_n"],
                "epoch": last["epoch"],
            }
        if isinstance(net, FakeQuantized):
            learned = TrainedScales(
                scales=net.named_scales(),
                format=self.job.recipe.qat_format,
                images=self.job.source.name,
                images_sha256=self.fingerprint,
                n=sum(self.report.counts["train"]),
            )
        return Checkpoint(
            model=self.model,
            input=self.job.preprocess,
            weights=Weights(origin="trained", source=self.job.source.name, license=self.license),
            state=state_of(net),
            learned=learned,
            training=training,
            measured=measured,
        )


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """Return a net's tensors for a checkpoint: on the CPU, under the zoo's names."""
    plain = net.net if isinstance(net, FakeQuantized) else net
    return {name: tensor.detach().cpu() for name, tensor in plain.state_dict().items()}


def state_from(saved: Checkpoint, net: nn.Module) -> dict[str, Tensor]:
    """Return what `net.load_state_dict` takes, including trained scales; see `state_of`."""
    if not isinstance(net, FakeQuantized):
        return saved.state
    assert saved.learned is not None
    scales = torch.tensor([saved.learned.scales[name] for name in net.places])
    return {f"net.{name}": tensor for name, tensor in saved.state.items()} | {"scales": scales}


def check_folder(out: Path, resume: bool) -> None:
    """Check that a run may start, or resume, in a folder.

    Raises:
        InputError: The folder contains a run and `resume` is False, or no run and `resume` is True.
    """
    exists = (out / "last.pt").exists()
    if exists and not resume:
        raise InputError(
            f"{out}: already contains a run", fix="add --resume, or choose another --out"
        )
    if resume and not exists:
        raise InputError(f"{out}: no saved state to resume", fix="start without --resume")


def saved_run(out: Path) -> Checkpoint:
    """Load the state of a run from its last.pt.

    Raises:
        InputError: There is no such file, or it contains only a net.
    """
    check_folder(out, resume=True)
    for name in ("best.pt", "last.pt"):
        drop_stale_sidecar(out / name)
    last = checkpoint.load(out / "last.pt")
    if not {"recipe", "fingerprint", "step", "sums", "optimizer"} <= last.training.keys():
        raise InputError(
            f"{out / 'last.pt'}: contains no training state",
            fix=f"train from it instead: --weights {out / 'last.pt'} with another --out",
        )
    return last


def check_same_recipe(out: Path, stored: Mapping[str, Any], recipe: Recipe) -> None:
    """Check that a run is resumed with its own recipe.

    Raises:
        InputError: Names the fields that differ.
    """
    changed = recipe.changes_from(stored)
    if changed:
        raise InputError(
            f"{out}: its run has a different recipe ({', '.join(changed)})",
            fix="resume with the same options, or train into another --out",
        )


def drop_stale_sidecar(path: Path) -> None:
    """Remove an old sidecar that a kill left between replacing a file and its sidecar.

    The file is complete, because it is replaced atomically, and describes itself.
    """
    try:
        artifacts.verify(path)
    except ArtifactError:
        artifacts.sidecar_path(path).unlink(missing_ok=True)
    except InputError:  # no such file yet
        return


def load_start(net: nn.Module, start: Checkpoint, source: Source) -> str | None:
    """Load the weights to start from.

    If the classes are the same, the rows of the last layer are reused, in the order of the new
    data; else the last layer stays untrained.

    Args:
        net: The net; changed in place.
        start: The weights.
        source: The training images.

    Returns:
        A note on the last layer, unless it is unchanged.

    Raises:
        InputError: The checkpoint has another architecture.
    """
    state = dict(start.state)
    own = net.state_dict()
    if checkpoint.MEAN_IMAGE in own:  # else it is computed from the training images
        state.setdefault(checkpoint.MEAN_IMAGE, own[checkpoint.MEAN_IMAGE])
    mapping, note = _same_classes(start, source)
    for name in [name for name in FC if name in own and name in state]:
        if mapping is None or state[name].shape != own[name].shape:
            state[name] = own[name]
        else:
            state[name] = state[name][list(mapping.indices)]
    if any(name not in state or state[name].shape != own[name].shape for name in own):
        raise InputError(
            f"the weights are those of {start.model.architecture}",
            fix=f"use --model {start.model.architecture}",
        )
    net.load_state_dict(state)
    return note


def _same_classes(start: Checkpoint, source: Source) -> tuple[LabelMap | None, str | None]:
    """Match the data's classes with a checkpoint's: the map (None if they differ) and a note."""
    try:
        mapping = match(
            start.model.classes, source.classes, data_named=source.named,
            model_name="the checkpoint", data_name=source.name,
        )  # fmt: skip
    except InputError:
        mapping = None
    if mapping is None or not mapping.is_permutation:
        return None, "the checkpoint has different classes: the last layer (fc) starts untrained"
    note = None
    if mapping.by == "position":
        note = f"the last layer (fc) is reused; {mapping.assumptions()[0]}"
    elif not mapping.in_order:
        note = "the last layer (fc) is reused, with its rows in the order of the data's classes"
    return mapping, note
