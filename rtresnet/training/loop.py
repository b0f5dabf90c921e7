"""The training loop: steps, an evaluation per epoch, checkpoints from which a run is resumed.

A run can be killed at any moment: what a step computes follows from its number (`loader.py`,
`config.py`), and everything else is in the folder that `checkpointing.py` writes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from rtresnet.core import atomic_io, hardware, metrics
from rtresnet.core.errors import CheckFailedError, InputError
from rtresnet.core.interrupts import Stop, defer_signals
from rtresnet.core.sidecar import Measurements
from rtresnet.data import augment
from rtresnet.data.loader import DecodeErrors, batches
from rtresnet.data.sources import Source
from rtresnet.data.validation import Progress as CheckProgress
from rtresnet.models import checkpoint, zoo
from rtresnet.models.checkpoint import Checkpoint
from rtresnet.models.nets import Net, TorchBackend
from rtresnet.models.resnet import ResNet
from rtresnet.training import checkpointing, dataset, distributed, qat
from rtresnet.training.checkpointing import CheckpointManager, EpochStats, RunState
from rtresnet.training.config import EpochRecord, TrainJob
from rtresnet.training.data_report import DataReport
from rtresnet.training.dataset import Dataset
from rtresnet.training.distributed import ALONE, World
from rtresnet.training.ema import recompute_statistics
from rtresnet.training.evaluate import evaluate
from rtresnet.training.loader import STEP, TrainLoader
from rtresnet.training.qat import FakeQuantized
from rtresnet.training.step import Stepper, check_compiler, cudnn_benchmark, resolve_precision
from rtresnet.training.teacher import Teacher

T = TypeVar("T")
READ_STEPS = 20  # steps between reading the losses from a GPU, which waits for it
WARMUP_STEPS = 25  # steps over which the training error is measured that ends a warm-up
EVALUATION_BATCH = 512  # for small images on the device


@dataclass(frozen=True, kw_only=True)
class Progress:
    """State of the run after a step.

    Attributes:
        epoch: From 0.
        step: Steps done, of `total`.
        seconds_left: An estimate, including evaluations.
    """

    epoch: int
    step: int
    total: int
    loss: float
    lr: float
    images_per_second: float
    seconds_left: float


StepListener = Callable[[Progress], None]
EpochListener = Callable[[EpochRecord], None]


def resolve_job(job: TrainJob) -> TrainJob:
    """Replace "auto" in the recipe with the value for the job's device."""
    precision = resolve_precision(job.recipe, job.device)
    return dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, precision=precision))


def train(
    job: TrainJob,
    *,
    resume: bool = False,
    world: World = ALONE,
    on_step: StepListener = lambda progress: None,
    on_epoch: EpochListener = lambda record: None,
    on_check: CheckProgress = lambda done, total: None,
    on_data: Callable[[DataReport], None] = lambda report: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """Check the images, train, select the best epoch on the held-out split, test once.

    Args:
        job: Net, images and recipe.
        resume: Resume the run in `job.out`.
        world: This process among several.
        on_step: Called after every step.
        on_epoch: Called after every epoch.
        on_check: Called while the images are checked.
        on_data: Called with the report on the images, before the first step of a new run.
        warn: Called with a line for each image that cannot be read.

    Returns:
        The best epoch's checkpoint with its test accuracy, as written to best.pt.

    Raises:
        DataError: More images are broken than `job.max_broken` allows; see `dataset.prepare`.
        CheckFailedError: The loss is not finite.
        InputError: The folder already holds a run, or a run that differs from this one.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the state is saved.
    """
    checkpointing.check_folder(job.out, resume)
    if job.recipe.distill and job.teacher is None:
        raise InputError("distill needs a teacher", fix="name it with --teacher CHECKPOINT")
    if job.recipe.qat and job.start is None and not resume:
        raise InputError("--qat fine-tunes a trained net", fix="name it with --weights FILE")
    job = resolve_job(job)
    # The main process's precision: gradients with and without loss scaling cannot be averaged.
    job = dataclasses.replace(job, recipe=world.broadcast(job.recipe))
    distributed.check_batch(job.recipe.batch, job.recipe.accumulate, world)
    check_compiler(job.recipe, job.device)
    torch.manual_seed(job.recipe.seed)
    hardware.keep_freed_memory()
    last = None
    if resume:
        if world.is_main:  # which drops a stale sidecar before the others read it
            checkpointing.saved_run(job.out)
        world.barrier()
        last = checkpointing.saved_run(job.out)
        checkpointing.check_same_recipe(job.out, last.training["recipe"], job.recipe)
    report = dataset.saved_report(last) if last else None
    data = dataset.prepare(job, report=report, world=world, progress=on_check, warn=warn)
    run = _Run(job, data, world, last)
    if last is not None:
        run.state = run.manager.restore(run.stepper, last)
    if report is None:
        on_data(data.report)
    del last  # as large as the net and its momentum
    atomic_io.make_folder(job.out)  # fails now, not after the first epoch, if it is not writable
    run.manager.write_split(data)
    with cudnn_benchmark(job.device), defer_signals(alone=world.size == 1) as stop:
        run.train(stop, on_step, on_epoch)
        return run.finish()


class _Run:
    def __init__(self, job: TrainJob, data: Dataset, world: World, last: Checkpoint | None) -> None:
        self.job, self.recipe, self.world = job, job.recipe, world
        self.source, self.test = data.source, data.test
        self.parts, self.tally = data.parts, data.tally
        side = mean_image_side(job, last)
        job.spec.require_size(job.preprocess.size)
        net = zoo.build(job.spec, len(self.source.classes), mean_image=side)
        if self.recipe.fc_init == "he" and isinstance(net, ResNet):
            torch.nn.init.kaiming_normal_(net.fc.weight, nonlinearity="relu")
        if job.start is not None:
            note = checkpointing.load_start(net, job.start, self.source)
            if note:
                self.tally.warn(note)
        if side and last is None and (job.start is None or job.start.mean_image is None):
            assert isinstance(net, ResNet) and net.mean_image is not None
            net.mean_image.image.copy_(self._mean_image())
        net = net.to(job.device)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loader = TrainLoader(
            self.source, self.parts.train, job.preprocess, job.recipe,
            world=world, device=job.device, tally=self.tally, workers=job.workers,
            min_side=job.spec.min_size,
        )  # fmt: skip
        self.total, self.steps_per_epoch = self.loader.total, self.loader.steps_per_epoch
        learner = self._fake_quantized(net) if job.recipe.qat else net
        weights, teacher = None, None
        if job.recipe.balance == "loss":
            weights = torch.from_numpy(self.loader.class_weights()).to(job.device)
        if job.teacher is not None:
            classes, named = self.source.classes, self.source.named
            teacher = Teacher(job.teacher, classes, job.preprocess, named=named).to(job.device)
        self.stepper = Stepper(
            learner, job.recipe, world, job.device, class_weights=weights, teacher=teacher
        )
        self.manager = CheckpointManager(
            job, checkpoint.model_of(job.spec, self.source.classes), total=self.total,
            report=data.report, world=world,
        )  # fmt: skip
        self.state = RunState()
        self.saved_at = self.started_at = time.perf_counter()
        self.first_step = 0

    def _fake_quantized(self, net: Net) -> FakeQuantized:
        """Return the net with fake quantization; scales are from its checkpoint or some images."""
        kind, start = self.recipe.qat_format, self.job.start
        fake = FakeQuantized(net, kind).to(self.job.device)
        if start is not None and start.learned and start.learned.format == kind:
            fake.set_scales(start.learned.scales)
        elif start is not None:  # else the scales of the resumed run are about to be restored
            qat.calibrate(fake, self._some_images(qat.CALIBRATION_IMAGES))
            fake.set_scales(self.world.broadcast(fake.named_scales()))
        return fake

    def _some_images(self, count: int) -> Iterator[torch.Tensor]:
        """Return random training images, preprocessed as in evaluation, on the device."""
        rng = np.random.default_rng((self.recipe.seed, STEP))
        chosen = rng.permutation(self.parts.train)[:count]
        batch = min(self.recipe.batch, 256)
        for images, _ in batches(self.source, self.job.preprocess, batch, indices=chosen):
            yield torch.from_numpy(images).to(self.job.device)

    def _mean_image(self) -> torch.Tensor:
        """Return the mean of the training images, preprocessed as in evaluation."""
        total, count = torch.zeros(()).double(), 0
        for images, _ in batches(self.source, self.job.preprocess, 256, indices=self.parts.train):
            total = total + torch.from_numpy(images).double().sum(0)
            count += len(images)
        return total / count

    def _lr(self, step: int) -> float:
        scores = [
            record["train_top1"] if record["val_top1"] is None else record["val_top1"]
            for record in self.state.log
        ]
        return self.recipe.lr_at(
            step, self.total, warmed=self.state.warmed,
            divisions=self.recipe.plateau_divisions(scores),
        )  # fmt: skip

    def train(self, stop: Stop, on_step: StepListener, on_epoch: EpochListener) -> None:
        """Run all epochs. An epoch is complete once it is in the log."""
        self.first_step = self.state.step
        while len(self.state.log) * self.steps_per_epoch < self.total:
            if stalled(self.state.log, self.recipe.patience):
                self.tally.warn(
                    f"stopped early: no better validation accuracy in {self.recipe.patience} epochs"
                )
                break
            end = min((len(self.state.log) + 1) * self.steps_per_epoch, self.total)
            if self.state.step < end:
                self._steps(end, stop, on_step)
            record = self._evaluate_epoch()
            self._complete_epoch(record)
            on_epoch(record)

    def _steps(self, end: int, stop: Stop, on_step: StepListener) -> None:
        mark = time.perf_counter()
        read = READ_STEPS if self.job.device.startswith("cuda") else 1
        unread: list[tuple[int, float, torch.Tensor, torch.Tensor]] = []
        self.stepper.train()
        for step, micros in self._timed(self.loader.steps(self.state.step, end)):
            lr = self._lr(step)
            unread.append((step, lr, *self.stepper.step(micros, lr, step)))
            self.state.step = step + 1
            if len(unread) < read and self.state.step < end:
                continue
            loss, stopped = self._read_losses(unread, stop.requested)
            unread = []
            now = time.perf_counter()
            self.state.sums.seconds += now - mark
            mark = now
            on_step(self._progress(step, loss, lr))
            if stopped:
                self._save()
                raise KeyboardInterrupt
            if now - self.saved_at >= self.job.save_every:
                self._save()
                mark = time.perf_counter()

    def _timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Add the time in which the loop waits for its next batch to the sums."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.state.sums.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _read_losses(
        self, unread: list[tuple[int, float, torch.Tensor, torch.Tensor]], stop: bool
    ) -> tuple[float, bool]:
        """Add losses and hits to the sums.

        Returns:
            The mean loss, and whether any process was asked to stop, so that all of them stop at
            the same step.
        """
        values = torch.stack([torch.stack([loss, hits]) for *_, loss, hits in unread]).double()
        sums = self.world.sums(np.append(values.cpu().numpy(), float(stop)), self.job.device)
        losses, hits = sums[:-1:2] / self.world.size, sums[1:-1:2]
        for (step, lr, *_), loss in zip(unread, losses, strict=True):
            if not math.isfinite(loss):
                raise CheckFailedError(
                    f"the loss is {loss} at step {step}, learning rate {lr:g}",
                    fix=f"start again with --lr {self.recipe.lr / 4:g}, or with --set clip=1",
                )
        self.stepper.loss_scale()  # raises if it is too small
        self.state.sums.loss += float(losses.sum()) * self.recipe.batch
        self.state.sums.hits += float(hits.sum())
        self.state.sums.seen += len(unread) * self.recipe.batch
        self.state.note_error(
            float(hits.sum()), len(unread) * self.recipe.batch,
            least=WARMUP_STEPS * self.recipe.batch, until=self.recipe.warmup_until,
        )  # fmt: skip
        return float(losses.mean()), bool(sums[-1])

    def _progress(self, step: int, loss: float, lr: float) -> Progress:
        elapsed = time.perf_counter() - self.started_at
        done = self.state.step - self.first_step
        return Progress(
            epoch=step // self.steps_per_epoch,
            step=self.state.step,
            total=self.total,
            loss=loss,
            lr=lr,
            images_per_second=self.state.sums.seen / max(self.state.sums.seconds, 1e-9),
            seconds_left=elapsed / done * (self.total - self.state.step),
        )

    def _evaluate_epoch(self) -> EpochRecord:
        val = None
        self.tally.merge(self.world.gather(self.tally.skipped))
        if len(self.parts.val):
            val = self._accuracy(self.source, self.parts.val)
        sums, last = self.state.sums, self.state.step - 1
        return EpochRecord(
            epoch=len(self.state.log) + 1,
            step=self.state.step,
            loss=sums.loss / sums.seen,
            lr=self._lr(last),
            loss_scale=self.stepper.loss_scale(),
            side=self.loader.side(last),
            train_top1=100 * sums.hits / sums.seen,
            val_top1=None if val is None else val.top1_percent,
            val_n=None if val is None else val.n,
            images_per_second=sums.seen / sums.seconds,
            seconds=sums.seconds,
            skipped=len(self.tally.skipped),
            waiting=min(1.0, sums.waited / sums.seconds),
            decoded_per_core=self.loader.decode_rate(),
        )

    def _complete_epoch(self, record: EpochRecord) -> None:
        """Write best.pt if the epoch is the best, then last.pt, then the log."""
        self.state.log.append(record)
        self.state.sums = EpochStats()
        score = math.inf if record["val_top1"] is None else record["val_top1"]
        if score >= self.state.best:
            self.state.best = score
            self.manager.save_best(self.state, self.stepper)
        self._save()
        self.manager.write_log(self.state)

    def _save(self) -> None:
        self.saved_at = time.perf_counter()
        self.manager.save_last(self.state, self.stepper)

    def _accuracy(self, source: Source, indices: np.ndarray | None) -> metrics.Accuracy:
        return accuracy(self.stepper.kept, source, indices, loader=self.loader, world=self.world)

    def finish(self) -> Checkpoint:
        """Recompute batch norm's statistics if the recipe requires it, test once, write best.pt."""
        path, net = self.job.out / "best.pt", self.stepper.kept
        self.world.barrier()
        best = checkpoint.load(path)
        if "test_top1" in best.measured:  # a finished run was resumed
            return best
        net.load_state_dict(checkpointing.state_from(best, net))
        measured = best.measured.copy()
        if self.recipe.bn_images:
            measured |= self._recompute_statistics(net, best)
        if self.test is not None:
            result = self._accuracy(self.test, None)
        else:
            result = self._accuracy(self.source, self.parts.test)
        measured |= {"test_top1": result.top1_percent, "test_n": result.n}
        if result.top5_percent is not None:
            measured["test_top5"] = result.top5_percent
        weights = dataclasses.replace(best.weights, sha256=None, source=self.job.source.name)
        learned = best.learned
        if learned is not None and isinstance(net, FakeQuantized):
            ranges = qat.branch_ranges(net.eval(), self._some_images(qat.CALIBRATION_IMAGES))
            learned = dataclasses.replace(learned, branches=ranges)
        final = dataclasses.replace(
            best, measured=measured, weights=weights, state=checkpointing.state_of(net),
            learned=learned,
        )  # fmt: skip
        if self.world.is_main:
            checkpoint.save(path, final)
        return final

    def _recompute_statistics(self, net: torch.nn.Module, best: Checkpoint) -> Measurements:
        """Recompute the statistics; keep them unless the validation accuracy falls."""
        used = recompute_statistics(net, self._some_images(self.recipe.bn_images))
        if not len(self.parts.val):
            return {"bn_images": used}
        val = self._accuracy(self.source, self.parts.val)
        if val.top1_percent < (best.measured["val_top1"] or 0):
            net.load_state_dict(best.state)
            return {"bn_images": 0}
        return {"bn_images": used, "val_top1": val.top1_percent}


def mean_image_side(job: TrainJob, last: Checkpoint | None) -> int | None:
    """Return the side of the mean image that the net of a job subtracts, None without one.

    Args:
        job: The job; the mean image of its start weights is reused.
        last: The state of the resumed run.

    Raises:
        InputError: The size of the images differs from the mean image's.
    """
    size, before = job.preprocess.size, last or job.start
    side = None if before is None else before.mean_image
    if side is None:
        return size if job.recipe.mean_image else None
    if side != size or job.recipe.train_scale != 1 or job.recipe.progressive:
        raise InputError(
            f"the weights subtract a mean image of {side} x {side} pixels, but the training images "
            "have different sizes",
            fix=f"use --size {side} --set train_scale=1 --set progressive=",
        )
    return side


def stalled(log: Sequence[EpochRecord], patience: int) -> bool:
    """Return whether the last `patience` epochs of a log brought no better accuracy."""
    scores = [score for record in log if (score := record["val_top1"]) is not None]
    if not patience or not scores:
        return False
    return len(scores) - 1 - scores.index(max(scores)) >= patience


def accuracy(
    net: torch.nn.Module,
    source: Source,
    indices: np.ndarray | None = None,
    *,
    loader: TrainLoader,
    world: World = ALONE,
) -> metrics.Accuracy:
    """Measure single-crop accuracy over all processes, each image counted once.

    Args:
        net: The net; left in evaluation mode.
        source: The images.
        indices: Indices of the images; all by default.
        loader: Loader of the run, whose images on the device are reused.
        world: Processes that share the images.
    """
    world.align_buffers(net)
    own = world.shard(np.arange(len(source)) if indices is None else indices)
    counts = np.zeros(3)
    if len(own) and loader.pixels is not None and source is loader.source:
        net.eval()
        for chosen in np.array_split(own, math.ceil(len(own) / EVALUATION_BATCH)):
            with torch.inference_mode():
                index = augment.to_device(chosen, loader.device)
                images = loader.pixels[index].permute(0, 3, 1, 2)
                logits = net(augment.normalize(images, loader.preprocess)).cpu().numpy()
            result = metrics.accuracy(logits, source.labels[chosen])
            counts += (result.n, result.top1, result.top5 or 0)
    elif len(own):
        outer = loader.tally
        tally = DecodeErrors(len(source), outer.warn, tolerated=outer.tolerated, fix=outer.fix)
        result = evaluate(TorchBackend(net), source, loader.preprocess, indices=own, tally=tally)
        counts += (result.n, result.top1, result.top5 or 0)
    n, top1, top5 = (int(value) for value in world.sums(counts, loader.device))
    return metrics.Accuracy(n=n, top1=top1, top5=top5 if len(source.classes) > 5 else None)
