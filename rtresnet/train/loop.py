"""The training loop: SGD, one epoch after another, a checkpoint after each.

`rtresnet train` reaches it. It writes into one folder:

    best.pt     the epoch with the highest accuracy on the held-out images, the last of equals
    last.pt     the last finished epoch, with all that --resume needs
    log.jsonl   a line an epoch
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rtresnet import artifacts, metrics
from rtresnet.artifacts import Weights
from rtresnet.data import augment, loader
from rtresnet.data.sources import Source
from rtresnet.errors import DataError, GateMissed, InputError
from rtresnet.models import checkpoint, zoo
from rtresnet.models.checkpoint import Checkpoint
from rtresnet.models.reference import TorchBackend
from rtresnet.preprocess import Preprocess
from rtresnet.train import feed
from rtresnet.train.evaluate import evaluate
from rtresnet.train.recipe import Recipe, differences


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train on what. `test` is the set's own test split, or None."""

    spec: zoo.Spec
    source: Source
    test: Source | None
    preprocess: Preprocess
    recipe: Recipe
    out: Path
    device: str = "cpu"
    start: Checkpoint | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Told after every step."""

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    images_per_second: float


Listener = Callable[[Progress], None]


def train(
    job: Job,
    *,
    resume: bool = False,
    on_step: Listener = lambda progress: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """Trains, chooses on the held-out split, tests once.

    Args:
        job: What to train on what.
        resume: Go on from `job.out / "last.pt"`.
        on_step: For a progress line.
        on_epoch: Gets each log record.
        warn: Gets a line for each image that could not be read.

    Returns:
        The best epoch's checkpoint, with its test accuracy, as written to best.pt.

    Raises:
        GateMissed: The loss is no longer finite.
        InputError: The folder holds a run already, or a run that differs from this one.
    """
    check_folder(job.out, resume)
    torch.manual_seed(job.recipe.seed)
    tally = loader.Tally(len(job.source), warn)
    source = job.source
    if job.preprocess.size <= feed.SMALL:
        source = loader.materialize(source, job.preprocess, tally)
    parts = feed.split(source, job.recipe.seed)
    run = _Run(job, source, parts, tally)
    if resume:
        run.restore()
    for number in range(run.epoch, job.recipe.epochs):
        record = run.one_epoch(number, on_step)
        on_epoch(record)
    return run.finish()


def check_folder(out: Path, resume: bool) -> None:
    """Refuses to write over a run, and to resume where there is none.

    Raises:
        InputError: Either.
    """
    there = (out / "last.pt").exists()
    if there and not resume:
        raise InputError(f"{out}: holds a run already", fix="add --resume, or another --out")
    if resume and not there:
        raise InputError(f"{out}: no finished epoch to go on from", fix="start without --resume")


class _Run:
    def __init__(self, job: Job, source: Source, parts: feed.Split, tally: loader.Tally) -> None:
        self.job, self.source, self.parts, self.tally = job, source, parts, tally
        self.fingerprint = job.source.fingerprint()
        self.model = checkpoint.model_of(job.spec, source.classes)
        net = zoo.build(job.spec, len(source.classes))
        if job.start is not None:
            adopt_weights(net, job.start)
        self.net = net.to(job.device)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=job.recipe.lr,
            momentum=job.recipe.momentum,
            weight_decay=job.recipe.weight_decay,
        )
        self.steps = max(1, len(parts.train) // job.recipe.batch)
        self.epoch, self.best = 0, -1.0
        self.log: list[dict[str, Any]] = []

    def one_epoch(self, number: int, on_step: Listener) -> dict[str, Any]:
        recipe, job = self.job.recipe, self.job
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + number)
        self.net.train()
        losses, hits, seen, started = 0.0, 0, 0, time.perf_counter()
        batches = feed.epoch(
            self.source,
            self.parts.train,
            job.preprocess,
            batch=recipe.batch,
            seed=recipe.seed,
            number=number,
            tally=self.tally,
        )
        for index, (images, labels) in enumerate(batches):
            step = number * self.steps + index
            lr = recipe.lr_at(step, recipe.epochs * self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss, correct = self._step(images, labels, generator)
            if not math.isfinite(loss):
                raise GateMissed(
                    f"the loss is {loss} at step {step}, learning rate {lr:g}",
                    fix=f"start again with --lr {recipe.lr / 4:g}",
                )
            losses, hits, seen = losses + loss * len(labels), hits + correct, seen + len(labels)
            rate = seen / (time.perf_counter() - started)
            on_step(
                Progress(
                    epoch=number,
                    step=index,
                    steps=self.steps,
                    loss=loss,
                    lr=lr,
                    images_per_second=rate,
                )
            )
        if not seen:
            raise DataError(f"{self.source.name}: no training image could be decoded")
        seconds = time.perf_counter() - started
        val = self._accuracy(self.source, self.parts.val)
        record = {
            "epoch": number + 1,
            "loss": losses / seen,
            "lr": lr,
            "train_top1": 100 * hits / seen,
            "val_top1": val.top1_percent,
            "val_n": val.n,
            "images_per_second": seen / seconds,
            "seconds": time.perf_counter() - started,
            "skipped": len(self.tally.skipped),
        }
        self._save(number + 1, record)
        return record

    def _step(
        self, pixels: np.ndarray, truth: np.ndarray, generator: torch.Generator
    ) -> tuple[float, int]:
        recipe, device = self.job.recipe, self.job.device
        images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
        labels = torch.from_numpy(truth).to(device)
        if recipe.padding and self.job.preprocess.size <= feed.SMALL:
            images = augment.pad_and_crop(images, recipe.padding, generator)
        if recipe.flip:
            images = augment.flip(images, generator)
        inputs = augment.normalize(images, self.job.preprocess)
        logits = self.net(inputs.contiguous(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item(), int((logits.argmax(1) == labels).sum())

    def _accuracy(self, source: Source, indices: np.ndarray | None) -> metrics.Accuracy:
        backend = TorchBackend(self.net)
        return evaluate(
            backend,
            source,
            self.job.preprocess,
            indices=indices,
            tally=loader.Tally(len(source), self.tally.warn),
        )

    def _checkpoint(self, training: dict[str, Any], measured: dict[str, Any]) -> Checkpoint:
        return Checkpoint(
            model=self.model,
            input=self.job.preprocess,
            weights=Weights(origin="trained", source=self.job.source.name),
            state={name: tensor.detach().cpu() for name, tensor in self.net.state_dict().items()},
            training=training,
            measured=measured,
        )

    def _save(self, epoch: int, record: dict[str, Any]) -> None:
        self.log.append(record)
        out, improved = self.job.out, record["val_top1"] >= self.best
        self.best = max(self.best, record["val_top1"])
        recipe = dataclasses.asdict(self.job.recipe)
        measured = {"val_top1": record["val_top1"], "val_n": record["val_n"], "epoch": epoch}
        about = {"recipe": recipe, "data": self.job.source.name, "fingerprint": self.fingerprint}
        if improved:
            checkpoint.save(out / "best.pt", self._checkpoint(about, measured))
        state = about | {
            "epoch": epoch,
            "best": self.best,
            "log": self.log,
            "optimizer": self.optimizer.state_dict(),
        }
        checkpoint.save(out / "last.pt", self._checkpoint(state, measured))
        lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
        artifacts.write_text(out / "log.jsonl", lines)

    def restore(self) -> None:
        last = checkpoint.load(self.job.out / "last.pt")
        saved = last.training
        changed = differences(saved["recipe"], self.job.recipe)
        if changed:
            raise InputError(
                f"{self.job.out}: its run has another recipe ({', '.join(changed)})",
                fix="resume with the same options, or train into another --out",
            )
        if last.model != self.model or saved["fingerprint"] != self.fingerprint:
            raise InputError(
                f"{self.job.out}: its run is {last.model.architecture} on {saved['data']}, or "
                "those images have changed since",
                fix="train into another --out",
            )
        self.net.load_state_dict(last.state)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epoch, self.best, self.log = saved["epoch"], saved["best"], saved["log"]

    def finish(self) -> Checkpoint:
        """Tests the best epoch, once, and notes the result in its checkpoint."""
        path = self.job.out / "best.pt"
        best = checkpoint.load(path)
        self.net.load_state_dict(best.state)
        if self.job.test is not None:
            accuracy = self._accuracy(self.job.test, None)
        else:
            accuracy = self._accuracy(self.source, self.parts.test)
        tested = {"test_top1": accuracy.top1_percent, "test_n": accuracy.n}
        if accuracy.top5_percent is not None:
            tested["test_top5"] = accuracy.top5_percent
        weights = dataclasses.replace(best.weights, sha256=None, source=self.job.source.name)
        final = dataclasses.replace(best, measured=best.measured | tested, weights=weights)
        checkpoint.save(path, final)
        return final


def adopt_weights(net: nn.Module, start: Checkpoint) -> None:
    """Loads a checkpoint to go on from; an FC of another class count stays new.

    Raises:
        InputError: The checkpoint is of another architecture.
    """
    state = dict(start.state)
    own = net.state_dict()
    for name in ("fc.weight", "fc.bias"):
        if state[name].shape != own[name].shape:
            state[name] = own[name]
    if any(name not in state or state[name].shape != own[name].shape for name in own):
        raise InputError(
            f"the weights are of {start.model.architecture}",
            fix=f"--model {start.model.architecture}",
        )
    net.load_state_dict(state)
