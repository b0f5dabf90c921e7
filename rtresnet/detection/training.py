"""Train a detector: proposals and head jointly, batch norm fixed, resumable after any kill.

The number of a step determines its images and their mirroring, the sampled anchors and regions,
and the learning rate. last.pt has everything else, and best.pt is the trained net.

    best.pt     the net at the end of the latest epoch, with its test accuracy after the last one
    last.pt     the latest state, with all that --resume needs
    log.jsonl   a line for each epoch
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rtresnet.core import atomic_io, detector_preprocess, hardware
from rtresnet.core.detector_preprocess import STRIDE
from rtresnet.core.errors import CheckFailedError, DataError, InputError
from rtresnet.core.interrupts import Stop, defer_signals
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Detection, Measurements, Weights
from rtresnet.data.loader import prefetch_map
from rtresnet.detection import boxes, checkpoint, evaluate, losses, net
from rtresnet.detection.average_precision import DetectionAccuracy
from rtresnet.detection.data import DetectionSource
from rtresnet.detection.losses import Truth
from rtresnet.detection.recipe import DetectionRecipe
from rtresnet.models import checkpoint as files
from rtresnet.models import zoo
from rtresnet.models.checkpoint import Checkpoint
from rtresnet.training.checkpointing import check_folder, drop_stale_sidecar, state_of
from rtresnet.training.config import SAVE_SECONDS
from rtresnet.training.loop import Progress

ORDER, MIRROR, SAMPLE = range(3)  # purposes of random generators: no two share a stream
LOSSES = ("rpn_class", "rpn_box", "head_class", "head_box")
Listener = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class DetectionJob:
    """Net, data and recipe of a run.

    Attributes:
        spec: The backbone.
        detection: Sizes and numbers of boxes.
        source: Training images.
        test: Images that the trained net is tested on once; None: it is not tested.
        preprocess: Mean and std.
        recipe: How it is trained.
        out: The run's folder.
        device: "cpu", "cuda" or "cuda:N".
        start: Pre-trained weights.
        save_every: Seconds between writes of last.pt within an epoch.
    """

    spec: zoo.Spec
    detection: Detection
    source: DetectionSource
    test: DetectionSource | None
    preprocess: Preprocess
    recipe: DetectionRecipe
    out: Path
    device: str = "cpu"
    start: Checkpoint | None = None
    save_every: float = SAVE_SECONDS


def saved_run(out: Path) -> Checkpoint:
    """Return the state of a run, from its last.pt.

    Raises:
        InputError: There is none.
    """
    check_folder(out, resume=True)
    for name in ("best.pt", "last.pt"):
        drop_stale_sidecar(out / name)
    last = checkpoint.load(out / "last.pt")
    if not {"recipe", "step", "optimizer"} <= last.training.keys():
        raise InputError(
            f"{out / 'last.pt'}: contains no training state", fix="train into another --out"
        )
    return last


def train(
    job: DetectionJob,
    *,
    resume: bool = False,
    on_step: Listener = lambda progress: None,
    on_epoch: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> Checkpoint:
    """Train a detector, and test it once on its test images, if it has any.

    Args:
        job: The run.
        resume: Continue from `job.out / "last.pt"`.
        on_step: Receives the progress after each step.
        on_epoch: Receives each log record.

    Returns:
        The trained net with its test accuracy, as written to best.pt.

    Raises:
        DataError: No image has an object, or an image cannot be decoded.
        CheckFailedError: The loss is no longer finite.
        InputError: The folder has a run already, or a different one; or batch norm would be fixed
            at its untrained statistics.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the state is saved.
    """
    check_folder(job.out, resume)
    if not resume and job.start is None and job.recipe.norm_fraction == 0 and _has_norms(job):
        raise InputError(
            f"recipe {job.recipe.name} fixes batch norm and so needs pre-trained weights",
            fix="add --weights imagenet, --weights FILE, or --recipe scratch-detection",
        )
    last = saved_run(job.out) if resume else None
    hardware.keep_freed_memory()
    run = _Run(job)
    if last is not None:
        run.restore(last)
    atomic_io.make_folder(job.out)
    with defer_signals(alone=True) as stop:
        run.go(stop, on_step, on_epoch)
        return run.finish()


def _has_norms(job: DetectionJob) -> bool:
    probe = net.build(job.spec, job.detection, 1, device="meta")
    return any(isinstance(module, nn.BatchNorm2d) for module in probe.modules())


class _Run:
    def __init__(self, job: DetectionJob) -> None:
        self.job, self.recipe = job, job.recipe
        self.images = np.array(
            [i for i, t in enumerate(job.source.targets) if (~t.ignored).any()], np.int64
        )
        if not len(self.images):
            raise DataError(f"{job.source.name}: no image has an object to train on")
        self.total = self.recipe.total(len(self.images))
        self.steps_an_epoch = self.recipe.steps_an_epoch(len(self.images))
        torch.manual_seed(self.recipe.seed)
        self.net = net.build(job.spec, job.detection, len(job.source.classes))
        if job.start is not None:
            checkpoint.start_from(self.net, job.start)
        self.net = self.net.to(job.device)
        for part in self.net.leading_parts()[: self.recipe.freeze]:
            for module in part:
                module.requires_grad_(False)
        self.proposals = net.Proposals(
            dataclasses.replace(
                job.detection, candidates=self.recipe.candidates, regions=self.recipe.regions
            )
        )
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in self.net.parameters() if parameter.requires_grad],
            lr=self.recipe.lr, momentum=self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
        )  # fmt: skip
        self.order = (-1, self.images)
        self.step, self.log = 0, list[dict[str, Any]]()
        self.sums, self.seconds, self.counted = np.zeros(len(LOSSES)), 0.0, 0
        self.first_step, self.started_at = 0, time.perf_counter()
        self.saved_at = self.started_at

    def go(
        self,
        stop: Stop,
        on_step: Listener,
        on_epoch: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.first_step = self.step
        while len(self.log) * self.steps_an_epoch < self.total:
            end = min((len(self.log) + 1) * self.steps_an_epoch, self.total)
            self._steps(end, stop, on_step)
            record = self._record()
            self.log.append(record)
            self.sums, self.seconds, self.counted = np.zeros(len(LOSSES)), 0.0, 0
            files.save(self.job.out / "best.pt", self._checkpoint(self._about()))
            self._save()
            lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
            atomic_io.write_text(self.job.out / "log.jsonl", lines)
            on_epoch(record)

    def _steps(self, end: int, stop: Stop, on_step: Listener) -> None:
        mark = time.perf_counter()
        for step, examples in prefetch_map(self._examples, iter(range(self.step, end)), threads=1):
            lr = self.recipe.lr_at(step, self.total)
            parts = self._update(step, examples, lr)
            self.step = step + 1
            now = time.perf_counter()
            self.sums += parts
            self.counted += 1
            self.seconds, mark = self.seconds + now - mark, now
            done = self.step - self.first_step
            on_step(
                Progress(
                    epoch=step // self.steps_an_epoch, step=self.step, total=self.total,
                    loss=float(parts.sum()), lr=lr,
                    images_per_second=self.counted * self.recipe.batch / max(self.seconds, 1e-9),
                    seconds_left=(now - self.started_at) / done * (self.total - self.step),
                )
            )  # fmt: skip
            if stop.requested:
                self._save()
                raise KeyboardInterrupt
            if now - self.saved_at >= self.job.save_every:
                self._save()

    def _examples(self, step: int) -> list[tuple[np.ndarray, np.ndarray, int, bool]]:
        """Return the step's images on their canvases, their extents, indices and mirroring."""
        examples = []
        first = step * self.recipe.batch
        for position in range(first, first + self.recipe.batch):
            epoch, offset = divmod(position, len(self.images))
            flip = self.recipe.flip and np.random.default_rng(
                (self.recipe.seed, MIRROR, position)
            ).integers(2)
            index = int(self._order(epoch)[offset])
            image = self.job.source.read(index)
            batch, extent = detector_preprocess.to_canvas(
                image, self.job.detection, self.job.preprocess, flipped=bool(flip)
            )
            scale = detector_preprocess.box_scale(image.shape[0], image.shape[1], extent)
            examples.append((batch, np.concatenate([extent[0], scale]), index, bool(flip)))
        return examples

    def _order(self, epoch: int) -> np.ndarray:
        """Return the images in the order of an epoch."""
        if self.order[0] != epoch:
            rng = np.random.default_rng((self.recipe.seed, ORDER, epoch))
            self.order = (epoch, rng.permutation(self.images))
        return self.order[1]

    def _truth(self, extent: np.ndarray, index: int, flip: bool) -> Truth:
        targets = self.job.source.targets[index]
        rows = torch.from_numpy(targets.boxes * extent[2:])
        if flip:
            rows = torch.stack(
                [extent[1] - rows[:, 2], rows[:, 1], extent[1] - rows[:, 0], rows[:, 3]], 1
            )
        ignored = torch.from_numpy(targets.ignored)
        return Truth(
            boxes=rows[~ignored].to(self.job.device),
            labels=torch.from_numpy(targets.labels)[~ignored].to(self.job.device),
            ignored=rows[ignored].to(self.job.device),
            extent=torch.from_numpy(extent[:2].copy()).to(self.job.device),
        )

    def _update(self, step: int, examples: list[Any], lr: float) -> np.ndarray:
        """Take one step and return the four losses."""
        self._set_modes(step)
        height, width = (max(e[0].shape[axis] for e in examples) for axis in (2, 3))
        images = torch.zeros(len(examples), 3, height, width)
        for row, (batch, *_) in enumerate(examples):
            images[row, :, : batch.shape[2], : batch.shape[3]] = torch.from_numpy(batch[0])
        truths = [self._truth(extent, index, flip) for _, extent, index, flip in examples]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        parts = self._losses(images.to(self.job.device), truths, step)
        loss = parts.sum()
        values: np.ndarray = parts.detach().double().cpu().numpy()
        if not math.isfinite(values.sum()):
            raise CheckFailedError(
                f"the loss is {values.sum()} at step {step}, learning rate {lr:g}",
                fix=f"start again with --lr {self.recipe.lr / 4:g}",
            )
        loss.backward()  # type: ignore[no-untyped-call]
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
        self.optimizer.step()
        return values

    def _set_modes(self, step: int) -> None:
        """Train batch norm in the run's first part only, and never in frozen layers."""
        self.net.train()
        learns = step < self.recipe.norm_fraction * self.total
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d) and not (learns and module.weight.requires_grad):
                module.eval()
                module.requires_grad_(False)

    def _losses(self, images: Tensor, truths: list[Truth], step: int) -> Tensor:
        """Return the losses [4] of a batch, means over its images."""
        device_type = "cuda" if self.job.device.startswith("cuda") else "cpu"
        cast = self.recipe.precision == "bf16"
        with torch.autocast(device_type, torch.bfloat16, enabled=cast):
            features = self.net.shared(images)
            scores, offsets = self.net.rpn(features)
        features, scores, offsets = features.float(), scores.float(), offsets.float()
        base = boxes.anchors(
            scores.shape[2],
            scores.shape[3],
            STRIDE,
            self.job.detection.anchors,
            self.job.detection.anchor_offset,
        ).to(scores)
        rpn_total = scores.new_zeros(2)
        crops, classes, targets, positives, first = [], [], [], [], 0
        for row, truth in enumerate(truths):
            generator = torch.Generator()
            position = step * self.recipe.batch + row
            seed = np.random.SeedSequence((self.recipe.seed, SAMPLE, position))
            generator.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
            one, steps = scores[row : row + 1], offsets[row : row + 1]
            flat, flat_steps = net.flattened(one, steps)
            chosen, others, goals = losses.sample_anchors(base, truth, self.recipe, generator)
            rpn = losses.rpn_losses(flat, flat_steps, chosen, others, goals)
            rpn_total = rpn_total + torch.stack(rpn)
            with torch.no_grad():
                regions, _ = self.proposals(one, steps, truth.extent[None])
            sampled, own, offset_targets = losses.sample_regions(
                regions, truth, self.recipe, generator
            )
            crops.append(self.net.align(features[row : row + 1], sampled))
            classes.append(own)
            targets.append(offset_targets)
            positives.append(first + torch.arange(len(offset_targets), device=own.device))
            first += len(sampled)
        with torch.autocast(device_type, torch.bfloat16, enabled=cast):
            logits, head_offsets = self.net.head(torch.cat(crops))
        head = losses.head_losses(
            logits.float(), head_offsets.float(), torch.cat(classes), torch.cat(targets),
            torch.cat(positives),
        )  # fmt: skip
        return torch.cat([rpn_total / len(truths), torch.stack(head)])

    def _record(self) -> dict[str, Any]:
        means = self.sums / max(self.counted, 1)
        return {
            "epoch": len(self.log) + 1,
            "step": self.step,
            "loss": float(means.sum()),
            **{name: float(value) for name, value in zip(LOSSES, means, strict=True)},
            "lr": self.recipe.lr_at(self.step - 1, self.total),
            "images_per_second": self.counted * self.recipe.batch / max(self.seconds, 1e-9),
            "seconds": self.seconds,
        }

    def _about(self) -> dict[str, Any]:
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "data": self.job.source.name,
            "fingerprint": self.job.source.fingerprint(),
            "total": self.total,
        }

    def _checkpoint(self, training: dict[str, Any]) -> Checkpoint:
        job = self.job
        return Checkpoint(
            model=files.model_of(job.spec, job.source.classes),
            input=job.preprocess,
            weights=Weights(origin="trained", source=job.source.name),
            state=state_of(self.net),
            training=training,
            detection=job.detection,
        )

    def _save(self) -> None:
        self.saved_at = time.perf_counter()
        state = self._about() | {
            "step": self.step,
            "log": self.log,
            "sums": [float(value) for value in self.sums],
            "counted": self.counted,
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
        }
        files.save(self.job.out / "last.pt", self._checkpoint(state))

    def restore(self, last: Checkpoint) -> None:
        """Restore the state of last.pt.

        Raises:
            InputError: It is of another run.
        """
        saved, mine = last.training, self._about()
        differences = [
            name for name in ("fingerprint", "recipe") if not _same(saved[name], mine[name])
        ]
        if last.detection != self.job.detection or last.model != files.model_of(
            self.job.spec, self.job.source.classes
        ):
            differences.append("net")
        if differences:
            raise InputError(
                f"{self.job.out}: its run has a different {' and '.join(differences)}",
                fix="resume with the same options, or train into another --out",
            )
        self.net.load_state_dict(last.state)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.log = saved["step"], saved["log"]
        self.sums = np.array(saved["sums"])
        self.counted, self.seconds = saved["counted"], saved["seconds"]

    def finish(self) -> Checkpoint:
        """Test the trained net once and store the result in best.pt."""
        path = self.job.out / "best.pt"
        best = checkpoint.load(path)
        if best.measured or self.job.test is None:
            return best
        trained = checkpoint.build(best).to(self.job.device)
        result = evaluate.accuracy(
            evaluate.torch_run(trained), self.job.test, self.job.detection, self.job.preprocess
        )
        test = self.job.test
        measured: Measurements = {
            "epoch": len(self.log),
            "average_precision": result.record(test.name, "test", test.fingerprint()),
        }
        weights = dataclasses.replace(best.weights, sha256=None, source=self.job.source.name)
        final = dataclasses.replace(best, weights=weights, measured=measured)
        files.save(path, final)
        return final


def accuracy_of(best: Checkpoint) -> DetectionAccuracy | None:
    """Return the test accuracy in the checkpoint of a finished run; None if it was not tested."""
    record = best.measured.get("average_precision")
    return None if record is None else DetectionAccuracy.of(record)


def _same(saved: Any, own: Any) -> bool:
    """Return whether two values are equal after lists have become tuples."""
    return json.dumps(saved) == json.dumps(own)
