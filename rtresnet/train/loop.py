"""The training loop: steps, an evaluation an epoch, checkpoints from which a run goes on.

`rtresnet train` reaches it. It writes into one folder:

    best.pt     the epoch with the highest accuracy on the held-out images, the last of equals
    last.pt     the latest state, with all that --resume needs
    log.jsonl   a line an epoch

A run can be killed at any moment. Files are replaced whole, best.pt before last.pt; what a step
computes follows from its number (`feed.py`, `recipe.py`); and last.pt holds everything else:
weights, momentum, averages, the step, the epoch's sums so far, the log.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rtresnet import machine, metrics, storage
from rtresnet.artifacts import Weights
from rtresnet.data import cache, loader
from rtresnet.data.sources import Source
from rtresnet.errors import GateMissed, InputError
from rtresnet.learned import Learned
from rtresnet.models import checkpoint, zoo
from rtresnet.models.checkpoint import Checkpoint
from rtresnet.models.resnet import ResNet
from rtresnet.train import distributed, feed, qat
from rtresnet.train.average import recompute_statistics
from rtresnet.train.distributed import ALONE, World
from rtresnet.train.job import Job, Listener, Progress, settled
from rtresnet.train.qat import FakeQuantized
from rtresnet.train.recipes import SMALL
from rtresnet.train.score import Scorer
from rtresnet.train.state import (
    adopt_weights,
    as_kept,
    as_loaded,
    check_folder,
    check_same,
    check_start,
    on_cpu,
    saved_run,
)
from rtresnet.train.step import Stepper, check_compiler
from rtresnet.train.stop import Stop, held_back

READ_STEPS = 20  # how often the losses are read from a GPU, which waits for them


def train(
    job: Job,
    *,
    resume: bool = False,
    world: World = ALONE,
    on_step: Listener = lambda progress: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """Trains, chooses on the held-out split, tests once.

    Args:
        job: What to train on what.
        resume: Go on from `job.out / "last.pt"`.
        world: Which of several processes this is.
        on_step: For a progress line.
        on_epoch: Gets each log record.
        warn: Gets a line for each image that could not be read.

    Returns:
        The best epoch's checkpoint, with its test accuracy, as written to best.pt.

    Raises:
        GateMissed: The loss is no longer finite.
        InputError: The folder holds a run already, or a run that differs from this one.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the state is saved.
    """
    check_folder(job.out, resume)
    if not resume:
        check_start(job.recipe, job.start)
    job = settled(job)
    recipe = job.recipe
    distributed.check_batch(recipe.batch, recipe.accumulate, world)
    check_compiler(recipe, job.device)
    torch.manual_seed(recipe.seed)
    machine.keep_freed_memory()
    tally = loader.Tally(len(job.source), warn)
    source: Source = job.source
    if job.preprocess.size <= SMALL:
        source = loader.materialize(source, job.preprocess, tally)
    elif job.cached:
        # Processes of one machine share its memory; each keeps what it comes across.
        budget = cache.default_budget() // world.size
        source = cache.cached_or_same(source, feed.at_least(job.preprocess.size), budget)
    parts = feed.split(source, recipe.seed, recipe.holdout)
    run = _Run(job, source, parts, tally, world)
    if resume:
        run.restore()
    storage.make_folder(job.out)  # that it cannot be written into is better told now
    with held_back(alone=world.size == 1) as stop:
        run.go(stop, on_step, on_epoch)
        return run.finish()


@dataclass(kw_only=True)
class _Sums:
    """What an epoch's record is made of, so far. Counts are of all processes' images."""

    loss: float = 0.0
    hits: float = 0.0
    seen: int = 0
    seconds: float = 0.0


class _Run:
    def __init__(
        self, job: Job, source: Source, parts: feed.Split, tally: loader.Tally, world: World
    ) -> None:
        self.job, self.source, self.parts = job, source, parts
        self.tally, self.world, self.recipe = tally, world, job.recipe
        self.fingerprint = job.source.fingerprint()
        self.model = checkpoint.model_of(job.spec, source.classes)
        net = zoo.build(job.spec, len(source.classes))
        if job.start is not None:
            adopt_weights(net, job.start)
        net = net.to(job.device)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.feed = feed.Feed(
            source, parts.train, job.preprocess, job.recipe,
            world=world, device=job.device, tally=tally,
        )  # fmt: skip
        self.scorer = Scorer(self.feed, world, tally.warn)
        learner = self._rounding(net) if job.recipe.qat else net
        self.stepper = Stepper(learner, job.recipe, world, job.device)
        self.total, self.steps_an_epoch = self.feed.total, self.feed.steps_an_epoch
        self.step, self.best = 0, -1.0
        self.sums, self.log = _Sums(), list[dict[str, Any]]()
        self.saved_at = self.started_at = time.perf_counter()
        self.first_step = 0

    def _rounding(self, net: ResNet) -> FakeQuantized:
        """The net with fake quantization, its scales those it came with or from some images."""
        fake, start = FakeQuantized(net).to(self.job.device), self.job.start
        if start is not None and start.learned is not None:
            fake.set_scales(start.learned.scales)
        elif start is not None:  # else the run's own are about to be restored
            qat.calibrate(fake, self._some_images(qat.CALIBRATION_IMAGES))
            fake.set_scales(self.world.share(fake.named_scales()))
        return fake

    def _some_images(self, count: int) -> Iterator[torch.Tensor]:
        """Training images at random, as in evaluation, on the device."""
        rng = np.random.default_rng((self.recipe.seed, feed.STEP))
        chosen = rng.permutation(self.parts.train)[:count]
        batch = min(self.recipe.batch, 256)
        for images, _ in loader.batches(self.source, self.job.preprocess, batch, indices=chosen):
            yield torch.from_numpy(images).to(self.job.device)

    def go(self, stop: Stop, on_step: Listener, on_epoch: Callable[[dict[str, Any]], None]) -> None:
        """To the end. An epoch is over when it is in the log, not when its last step is done."""
        self.first_step = self.step
        while len(self.log) * self.steps_an_epoch < self.total:
            end = min((len(self.log) + 1) * self.steps_an_epoch, self.total)
            if self.step < end:
                self._steps(end, stop, on_step)
            record = self._record()
            self._keep(record)
            on_epoch(record)

    def _steps(self, end: int, stop: Stop, on_step: Listener) -> None:
        recipe, mark = self.recipe, time.perf_counter()
        read = READ_STEPS if self.job.device.startswith("cuda") else 1
        unread: list[tuple[int, float, torch.Tensor, torch.Tensor]] = []
        self.stepper.train()
        for step, micros in self.feed.steps(self.step, end):
            lr = recipe.lr_at(step, self.total)
            unread.append((step, lr, *self.stepper.step(micros, lr)))
            self.step = step + 1
            if len(unread) < read and self.step < end:
                continue
            loss, asked = self._read(unread, stop.asked)
            unread = []
            now = time.perf_counter()
            self.sums.seconds += now - mark
            mark = now
            on_step(self._progress(step, loss, lr))
            if asked:
                self._save()
                raise KeyboardInterrupt
            if now - self.saved_at >= self.job.save_every:
                self._save()
                mark = time.perf_counter()

    def _read(
        self, unread: list[tuple[int, float, torch.Tensor, torch.Tensor]], asked: bool
    ) -> tuple[float, bool]:
        """Takes losses and hits into the sums.

        Returns:
            The mean loss, and whether any process was asked to stop: all of them hear of it here,
            and so stop at one step.
        """
        values = torch.stack([torch.stack([loss, hits]) for *_, loss, hits in unread]).double()
        told = self.world.sums(np.append(values.cpu().numpy(), float(asked)), self.job.device)
        losses, hits = told[:-1:2] / self.world.size, told[1:-1:2]
        for (step, lr, *_), loss in zip(unread, losses, strict=True):
            if not math.isfinite(loss):
                raise GateMissed(
                    f"the loss is {loss} at step {step}, learning rate {lr:g}",
                    fix=f"start again with --lr {self.recipe.lr / 4:g}, or with --set clip=1",
                )
        self.sums.loss += float(losses.sum()) * self.recipe.batch
        self.sums.hits += float(hits.sum())
        self.sums.seen += len(unread) * self.recipe.batch
        return float(losses.mean()), bool(told[-1])

    def _progress(self, step: int, loss: float, lr: float) -> Progress:
        spent = time.perf_counter() - self.started_at
        done = self.step - self.first_step
        return Progress(
            epoch=step // self.steps_an_epoch,
            step=self.step,
            total=self.total,
            loss=loss,
            lr=lr,
            images_per_second=self.sums.seen / max(self.sums.seconds, 1e-9),
            seconds_left=spent / done * (self.total - self.step),
        )

    def _record(self) -> dict[str, Any]:
        """Evaluates; the epoch's line in the log."""
        val = None
        if len(self.parts.val):
            val = self._score(self.source, self.parts.val)
        seconds, last = self.sums.seconds, self.step - 1
        return {
            "epoch": len(self.log) + 1,
            "step": self.step,
            "loss": self.sums.loss / self.sums.seen,
            "lr": self.recipe.lr_at(last, self.total),
            "side": self.feed.side(last),
            "train_top1": 100 * self.sums.hits / self.sums.seen,
            "val_top1": None if val is None else val.top1_percent,
            "val_n": None if val is None else val.n,
            "images_per_second": self.sums.seen / seconds,
            "seconds": seconds,
            "skipped": len(self.tally.skipped),
        }

    def _score(self, source: Source, indices: np.ndarray | None) -> metrics.Accuracy:
        """Of the weights that are kept."""
        return self.scorer.accuracy(self.stepper.kept, source, indices)

    def _about(self) -> dict[str, Any]:
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "data": self.job.source.name,
            "fingerprint": self.fingerprint,
            "total": self.total,
        }

    def _checkpoint(self, training: dict[str, Any], measured: dict[str, Any]) -> Checkpoint:
        return Checkpoint(
            model=self.model,
            input=self.job.preprocess,
            weights=Weights(origin="trained", source=self.job.source.name),
            state=as_kept(self.stepper.kept),
            learned=self._learned(),
            training=training,
            measured=measured,
        )

    def _learned(self) -> Learned | None:
        kept = self.stepper.kept
        if not isinstance(kept, FakeQuantized):
            return None
        return Learned(
            scales=kept.named_scales(),
            images=self.job.source.name,
            images_sha256=self.fingerprint,
            n=len(self.parts.train),
        )

    def _keep(self, record: dict[str, Any]) -> None:
        """The end of an epoch: best.pt where it is better, then last.pt, then the log."""
        self.log.append(record)
        self.sums = _Sums()
        score = math.inf if record["val_top1"] is None else record["val_top1"]
        if score >= self.best:
            self.best = score
            if self.world.first:
                checkpoint.save(
                    self.job.out / "best.pt", self._checkpoint(self._about(), self._measured())
                )
        self._save()
        if self.world.first:
            lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
            storage.write_text(self.job.out / "log.jsonl", lines)

    def _measured(self) -> dict[str, Any]:
        if not self.log:
            return {}
        record = self.log[-1]
        return {name: record[name] for name in ("val_top1", "val_n", "epoch")}

    def _save(self) -> None:
        self.saved_at = time.perf_counter()
        if not self.world.first:
            return
        stepper = self.stepper
        state = self._about() | {
            "step": self.step,
            "best": self.best,
            "log": self.log,
            "sums": dataclasses.asdict(self.sums),
            "launch": self.world.launch,
            "optimizer": stepper.optimizer.state_dict(),
            "scaler": stepper.scaler.state_dict(),
            # Nothing draws from it in training; kept so that nothing can come to depend on it.
            "random": torch.get_rng_state(),
        }
        if stepper.average:
            state |= {"weights": on_cpu(stepper.net), "updates": stepper.average.updates}
        checkpoint.save(self.job.out / "last.pt", self._checkpoint(state, self._measured()))

    def restore(self) -> None:
        """Takes up the state of last.pt."""
        out = self.job.out
        if self.world.first:
            saved_run(out)
        self.world.wait()
        last = saved_run(out)
        saved = last.training
        check_same(out, saved, self.recipe)
        if last.model != self.model or saved["fingerprint"] != self.fingerprint:
            raise InputError(
                f"{out}: its run is {last.model.architecture} on {saved['data']}, or "
                "those images have changed since",
                fix="train into another --out",
            )
        stepper = self.stepper
        if stepper.average:
            stepper.average.restore(as_loaded(stepper.average.net, last), saved["updates"])
        stepper.net.load_state_dict(
            saved["weights"] if stepper.average else as_loaded(stepper.net, last)
        )
        stepper.optimizer.load_state_dict(saved["optimizer"])
        stepper.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["random"])
        self.step, self.best, self.log = saved["step"], saved["best"], saved["log"]
        self.sums = _Sums(**saved["sums"])

    def finish(self) -> Checkpoint:
        """Batch norm's statistics anew where asked for, then the one test."""
        path, net = self.job.out / "best.pt", self.stepper.kept
        self.world.wait()
        best = checkpoint.load(path)
        if "test_top1" in best.measured:  # finished before
            return best
        net.load_state_dict(as_loaded(net, best))
        measured = dict(best.measured)
        if self.recipe.bn_images:
            measured |= self._recompute(net, best)
        if self.job.test is not None:
            accuracy = self._score(self.job.test, None)
        else:
            accuracy = self._score(self.source, self.parts.test)
        measured |= {"test_top1": accuracy.top1_percent, "test_n": accuracy.n}
        if accuracy.top5_percent is not None:
            measured["test_top5"] = accuracy.top5_percent
        weights = dataclasses.replace(best.weights, sha256=None, source=self.job.source.name)
        final = dataclasses.replace(best, measured=measured, weights=weights, state=as_kept(net))
        if self.world.first:
            checkpoint.save(path, final)
        return final

    def _recompute(self, net: torch.nn.Module, best: Checkpoint) -> dict[str, Any]:
        """New statistics, unless the held-out images are recognized less well with them."""
        used = recompute_statistics(net, self._some_images(self.recipe.bn_images))
        if not len(self.parts.val):
            return {"bn_images": used}
        val = self._score(self.source, self.parts.val)
        if val.top1_percent < best.measured["val_top1"]:
            net.load_state_dict(best.state)
            return {"bn_images": 0}
        return {"bn_images": used, "val_top1": val.top1_percent}
