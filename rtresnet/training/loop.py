"""The training loop: steps, an evaluation an epoch, checkpoints from which a run goes on.

`rtresnet train` reaches it. A run can be killed at any moment: what a step computes follows from
its number (`feed.py`, `recipe.py`), and everything else is in the folder that `keep.py` writes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from rtresnet.core import atomic_io, hardware, metrics
from rtresnet.core.errors import CheckFailedError
from rtresnet.data import loader
from rtresnet.data.sources import Source
from rtresnet.data.validation import Progress as Checked
from rtresnet.models import checkpoint, zoo
from rtresnet.models.checkpoint import Checkpoint
from rtresnet.models.resnet import ResNet
from rtresnet.training import dataset, distributed, qat, train_loader
from rtresnet.training.checkpointing import CheckpointManager, EpochStats, RunState, load_state
from rtresnet.training.config import Listener, Progress, TrainJob, resolve_job
from rtresnet.training.dataset import DataReport, Dataset
from rtresnet.training.distributed import ALONE, World
from rtresnet.training.ema import recompute_statistics
from rtresnet.training.evaluator import Evaluator
from rtresnet.training.qat import FakeQuantized
from rtresnet.training.run_state import adopt_weights, as_kept, as_loaded, check_folder, check_start
from rtresnet.training.signals import Stop, defer_signals
from rtresnet.training.step import Stepper, check_compiler, cudnn_benchmark

READ_STEPS = 20  # how often the losses are read from a GPU, which waits for them


def train(
    job: TrainJob,
    *,
    resume: bool = False,
    world: World = ALONE,
    on_step: Listener = lambda progress: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    on_check: Checked = lambda done, total: None,
    on_data: Callable[[DataReport], None] = lambda report: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """Checks the images, trains, chooses on the held-out split, tests once.

    Args:
        job: What to train on what.
        resume: Go on from `job.out / "last.pt"`.
        world: Which of several processes this is.
        on_step: For a progress line.
        on_epoch: Gets each log record.
        on_check: For a progress line while the images are checked.
        on_data: Gets what the check has found, once, before the first step of a new run.
        warn: Gets a line for each image that could not be read.

    Returns:
        The best epoch's checkpoint, with its test accuracy, as written to best.pt.

    Raises:
        DataError: More images are broken than `job.max_broken` allows; see `dataset.prepare`.
        CheckFailedError: The loss is no longer finite.
        InputError: The folder holds a run already, or a run that differs from this one.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the state is saved.
    """
    check_folder(job.out, resume)
    if not resume:
        check_start(job.recipe, job.start)
    job = resolve_job(job)
    # Rank 0's precision: gradients with and without a scaled loss cannot be averaged.
    job = dataclasses.replace(job, recipe=world.broadcast(job.recipe))
    recipe = job.recipe
    distributed.check_batch(recipe.batch, recipe.accumulate, world)
    check_compiler(recipe, job.device)
    torch.manual_seed(recipe.seed)
    hardware.keep_freed_memory()
    last = load_state(job, world) if resume else None
    report = dataset.saved_report(last) if last else None
    data = dataset.prepare(job, report=report, world=world, progress=on_check, warn=warn)
    if report is None:
        on_data(data.report)
    run = _Run(job, data, world)
    if last is not None:
        run.restore(last)
    del last  # as large as the net and its momentum
    atomic_io.make_folder(job.out)  # that it cannot be written into is better told now
    with cudnn_benchmark(job.device), defer_signals(alone=world.size == 1) as stop:
        run.go(stop, on_step, on_epoch)
        return run.finish()


class _Run:
    def __init__(self, job: TrainJob, data: Dataset, world: World) -> None:
        source, parts, tally = data.source, data.parts, data.tally
        self.job, self.source, self.parts, self.test = job, source, parts, data.test
        self.tally, self.world, self.recipe = tally, world, job.recipe
        net = zoo.build(job.spec, len(source.classes))
        if job.start is not None:
            told = adopt_weights(net, job.start, source)
            if told:
                tally.warn(told)
        net = net.to(job.device)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.feed = train_loader.TrainLoader(
            source, parts.train, job.preprocess, job.recipe,
            world=world, device=job.device, tally=tally,
        )  # fmt: skip
        self.scorer = Evaluator(self.feed, world)
        learner = self._rounding(net) if job.recipe.qat else net
        self.stepper = Stepper(learner, job.recipe, world, job.device)
        self.total, self.steps_an_epoch = self.feed.total, self.feed.steps_an_epoch
        self.keeper = CheckpointManager(
            job, checkpoint.model_of(job.spec, source.classes),
            total=self.total, images=len(parts.train), data=data.report.record(), world=world,
        )  # fmt: skip
        self.at = RunState()
        self.saved_at = self.started_at = time.perf_counter()
        self.first_step = 0

    def _rounding(self, net: ResNet) -> FakeQuantized:
        """The net with fake quantization, its scales those it came with or from some images."""
        fake, start = FakeQuantized(net).to(self.job.device), self.job.start
        if start is not None and start.learned is not None:
            fake.set_scales(start.learned.scales)
        elif start is not None:  # else the run's own are about to be restored
            qat.calibrate(fake, self._some_images(qat.CALIBRATION_IMAGES))
            fake.set_scales(self.world.broadcast(fake.named_scales()))
        return fake

    def _some_images(self, count: int) -> Iterator[torch.Tensor]:
        """Training images at random, as in evaluation, on the device."""
        rng = np.random.default_rng((self.recipe.seed, train_loader.STEP))
        chosen = rng.permutation(self.parts.train)[:count]
        batch = min(self.recipe.batch, 256)
        for images, _ in loader.batches(self.source, self.job.preprocess, batch, indices=chosen):
            yield torch.from_numpy(images).to(self.job.device)

    def go(self, stop: Stop, on_step: Listener, on_epoch: Callable[[dict[str, Any]], None]) -> None:
        """To the end. An epoch is over when it is in the log, not when its last step is done."""
        self.first_step = self.at.step
        while len(self.at.log) * self.steps_an_epoch < self.total:
            end = min((len(self.at.log) + 1) * self.steps_an_epoch, self.total)
            if self.at.step < end:
                self._steps(end, stop, on_step)
            record = self._record()
            self._keep(record)
            on_epoch(record)

    def _steps(self, end: int, stop: Stop, on_step: Listener) -> None:
        recipe, mark = self.recipe, time.perf_counter()
        read = READ_STEPS if self.job.device.startswith("cuda") else 1
        unread: list[tuple[int, float, torch.Tensor, torch.Tensor]] = []
        self.stepper.train()
        for step, micros in self.feed.steps(self.at.step, end):
            lr = recipe.lr_at(step, self.total)
            unread.append((step, lr, *self.stepper.step(micros, lr)))
            self.at.step = step + 1
            if len(unread) < read and self.at.step < end:
                continue
            loss, asked = self._read(unread, stop.asked)
            unread = []
            now = time.perf_counter()
            self.at.sums.seconds += now - mark
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
                raise CheckFailedError(
                    f"the loss is {loss} at step {step}, learning rate {lr:g}",
                    fix=f"start again with --lr {self.recipe.lr / 4:g}, or with --set clip=1",
                )
        self.stepper.loss_scale()  # raises where it has become too small
        self.at.sums.loss += float(losses.sum()) * self.recipe.batch
        self.at.sums.hits += float(hits.sum())
        self.at.sums.seen += len(unread) * self.recipe.batch
        return float(losses.mean()), bool(told[-1])

    def _progress(self, step: int, loss: float, lr: float) -> Progress:
        spent = time.perf_counter() - self.started_at
        done = self.at.step - self.first_step
        return Progress(
            epoch=step // self.steps_an_epoch,
            step=self.at.step,
            total=self.total,
            loss=loss,
            lr=lr,
            images_per_second=self.at.sums.seen / max(self.at.sums.seconds, 1e-9),
            seconds_left=spent / done * (self.total - self.at.step),
        )

    def _record(self) -> dict[str, Any]:
        """Evaluates; the epoch's line in the log."""
        val = None
        if len(self.parts.val):
            val = self._score(self.source, self.parts.val)
        seconds, last = self.at.sums.seconds, self.at.step - 1
        return {
            "epoch": len(self.at.log) + 1,
            "step": self.at.step,
            "loss": self.at.sums.loss / self.at.sums.seen,
            "lr": self.recipe.lr_at(last, self.total),
            "loss_scale": self.stepper.loss_scale(),
            "side": self.feed.side(last),
            "train_top1": 100 * self.at.sums.hits / self.at.sums.seen,
            "val_top1": None if val is None else val.top1_percent,
            "val_n": None if val is None else val.n,
            "images_per_second": self.at.sums.seen / seconds,
            "seconds": seconds,
            "skipped": len(self.tally.skipped),
        }

    def _score(self, source: Source, indices: np.ndarray | None) -> metrics.Accuracy:
        """Of the weights that are kept."""
        return self.scorer.accuracy(self.stepper.kept, source, indices)

    def _keep(self, record: dict[str, Any]) -> None:
        """The end of an epoch: best.pt where it is better, then last.pt, then the log."""
        self.at.log.append(record)
        self.at.sums = EpochStats()
        score = math.inf if record["val_top1"] is None else record["val_top1"]
        if score >= self.at.best:
            self.at.best = score
            self.keeper.save_best(self.at, self.stepper)
        self._save()
        self.keeper.write_log(self.at)

    def _save(self) -> None:
        self.saved_at = time.perf_counter()
        self.keeper.save_last(self.at, self.stepper)

    def restore(self, last: Checkpoint) -> None:
        """Takes up the state of last.pt."""
        self.at = self.keeper.restore(self.stepper, last)

    def finish(self) -> Checkpoint:
        """Batch norm's statistics again where asked for, then the one test."""
        path, net = self.job.out / "best.pt", self.stepper.kept
        self.world.barrier()
        best = checkpoint.load(path)
        if "test_top1" in best.measured:  # finished before
            return best
        net.load_state_dict(as_loaded(net, best))
        measured = dict(best.measured)
        if self.recipe.bn_images:
            measured |= self._recompute(net, best)
        if self.test is not None:
            accuracy = self._score(self.test, None)
        else:
            accuracy = self._score(self.source, self.parts.test)
        measured |= {"test_top1": accuracy.top1_percent, "test_n": accuracy.n}
        if accuracy.top5_percent is not None:
            measured["test_top5"] = accuracy.top5_percent
        weights = dataclasses.replace(best.weights, sha256=None, source=self.job.source.name)
        learned = best.learned
        if learned is not None and isinstance(net, FakeQuantized):
            seen = qat.extents(net.eval(), self._some_images(qat.CALIBRATION_IMAGES))
            learned = dataclasses.replace(learned, branches=seen)
        final = dataclasses.replace(
            best, measured=measured, weights=weights, state=as_kept(net), learned=learned
        )
        if self.world.is_main:
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
