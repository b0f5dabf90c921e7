"""What a run leaves in its folder, and how it is taken up again.

    best.pt     the epoch with the highest accuracy on the held-out images, the last of equals
    last.pt     the latest state, with all that --resume needs
    log.jsonl   a line an epoch

Files are replaced whole, best.pt before last.pt. last.pt holds what does not follow from the number
of a step: weights, momentum, averages, the step, the epoch's sums so far, the log.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import torch

from rtresnet.core import atomic_io
from rtresnet.core.errors import InputError
from rtresnet.core.sidecar import Model, Weights
from rtresnet.models import checkpoint
from rtresnet.models.checkpoint import Checkpoint
from rtresnet.onnxlib.metadata import TrainedScales
from rtresnet.training.config import TrainJob
from rtresnet.training.distributed import World
from rtresnet.training.qat import FakeQuantized
from rtresnet.training.run_state import as_kept, as_loaded, check_same, on_cpu, saved_run
from rtresnet.training.step import Stepper


@dataclass(kw_only=True)
class EpochStats:
    """What an epoch's record is made of, so far. Counts are of all processes' images."""

    loss: float = 0.0
    hits: float = 0.0
    seen: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class RunState:
    """Where a run stands: steps done, best accuracy so far in %, the epochs' records."""

    step: int = 0
    best: float = -1.0
    sums: EpochStats = field(default_factory=EpochStats)
    log: list[dict[str, Any]] = field(default_factory=list)


def load_state(job: TrainJob, world: World) -> Checkpoint:
    """A run's last.pt, to go on from.

    Raises:
        InputError: There is none, or its recipe is not the job's.
    """
    if world.is_main:  # which drops a stale sidecar before the others read it
        saved_run(job.out)
    world.barrier()
    last = saved_run(job.out)
    check_same(job.out, last.training, job.recipe)
    return last


class CheckpointManager:
    """Writes a run's folder; of several processes, the first does.

    Args:
        job: Whose folder.
        model: What is trained, as its checkpoints say.
        total: Steps of the whole run.
        images: How many it trains on.
        data: What was found out about its images; see `DataReport.record`.
        world: Which of several processes this is.
    """

    def __init__(
        self,
        job: TrainJob,
        model: Model,
        *,
        total: int,
        images: int,
        data: dict[str, Any],
        world: World,
    ) -> None:
        self.job, self.model, self.world = job, model, world
        self.total, self.images, self.data = total, images, data
        self.fingerprint = job.source.fingerprint()

    def save_best(self, at: RunState, stepper: Stepper) -> None:
        """best.pt: the net as it is now."""
        if self.world.is_main:
            kept = self._checkpoint(stepper, self._about(), at)
            checkpoint.save(self.job.out / "best.pt", kept)

    def save_last(self, at: RunState, stepper: Stepper) -> None:
        """last.pt: all that `restore` needs."""
        if not self.world.is_main:
            return
        state = self._about() | {
            "step": at.step,
            "best": at.best,
            "log": at.log,
            "sums": dataclasses.asdict(at.sums),
            "launch": self.world.launch,
            "optimizer": stepper.optimizer.state_dict(),
            "scaler": stepper.scaler.state_dict(),
            # Nothing draws from it in training; kept so that nothing can come to depend on it.
            "random": torch.get_rng_state(),
        }
        if stepper.average:
            state |= {"weights": on_cpu(stepper.net), "updates": stepper.average.updates}
        checkpoint.save(self.job.out / "last.pt", self._checkpoint(stepper, state, at))

    def write_log(self, at: RunState) -> None:
        """log.jsonl, whole."""
        if self.world.is_main:
            lines = "".join(json.dumps(entry) + "\n" for entry in at.log)
            atomic_io.write_text(self.job.out / "log.jsonl", lines)

    def restore(self, stepper: Stepper, last: Checkpoint) -> RunState:
        """Takes up the state of last.pt.

        Raises:
            InputError: It is of another run.
        """
        out, saved = self.job.out, last.training
        if last.model != self.model or saved["fingerprint"] != self.fingerprint:
            raise InputError(
                f"{out}: its run is {last.model.architecture} on {saved['data']}, or "
                "those images have changed since",
                fix="train into another --out",
            )
        if stepper.average:
            stepper.average.restore(as_loaded(stepper.average.net, last), saved["updates"])
        stepper.net.load_state_dict(
            saved["weights"] if stepper.average else as_loaded(stepper.net, last)
        )
        stepper.optimizer.load_state_dict(saved["optimizer"])
        stepper.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["random"])
        return RunState(
            step=saved["step"],
            best=saved["best"],
            log=saved["log"],
            sums=EpochStats(**saved["sums"]),
        )

    def _about(self) -> dict[str, Any]:
        return {
            "recipe": dataclasses.asdict(self.job.recipe),
            "data": self.job.source.name,
            "fingerprint": self.fingerprint,
            "total": self.total,
            "images": self.data,
        }

    def _checkpoint(self, stepper: Stepper, training: dict[str, Any], at: RunState) -> Checkpoint:
        measured = {}
        if at.log:
            measured = {name: at.log[-1][name] for name in ("val_top1", "val_n", "epoch")}
        return Checkpoint(
            model=self.model,
            input=self.job.preprocess,
            weights=Weights(origin="trained", source=self.job.source.name),
            state=as_kept(stepper.kept),
            learned=self._learned(stepper),
            training=training,
            measured=measured,
        )

    def _learned(self, stepper: Stepper) -> TrainedScales | None:
        kept = stepper.kept
        if not isinstance(kept, FakeQuantized):
            return None
        return TrainedScales(
            scales=kept.named_scales(),
            images=self.job.source.name,
            images_sha256=self.fingerprint,
            n=self.images,
        )
