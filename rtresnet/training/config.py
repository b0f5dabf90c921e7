"""The recipe of a run, and the job: which net is trained on which images.

What a step computes follows from the recipe and the step's number alone: learning rate and image
size here, images and augmentation in `loader.py`. Resuming needs no scheduler state. The named
recipes are in `recipes.py`. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import NotRequired, TypedDict  # NotRequired is in typing from Python 3.11

from rtresnet.core.config import Config, option
from rtresnet.core.errors import InputError
from rtresnet.core.precisions import CalibratedName
from rtresnet.core.preprocess import Preprocess

if TYPE_CHECKING:
    from rtresnet.data.sources import Source
    from rtresnet.models import zoo
    from rtresnet.models.checkpoint import Checkpoint

Precision = Literal["auto", "fp32", "bf16", "fp16"]
SAVE_SECONDS = 300.0


class EpochRecord(TypedDict):
    """An epoch's line in log.jsonl.

    Attributes:
        epoch: From 1.
        step: Steps done.
        loss: Mean training loss.
        lr: Learning rate of the last step.
        loss_scale: In fp16, else None.
        side: Side of the training images, in pixels.
        train_top1: On the augmented training images, in %.
        val_top1: On the held-out images, in %; None if nothing is held out.
        val_n: Number of held-out images.
        images_per_second: Training throughput.
        seconds: Training time, without evaluation.
        skipped: Images ignored because they cannot be decoded.
        waiting: Share of `seconds` in which the net waited for data, in [0, 1].
        decoded_per_core: Photographs that one core decoded and cropped per second in this epoch;
            None for arrays, and if all photographs were cached.
    """

    epoch: int
    step: int
    loss: float
    lr: float
    loss_scale: float | None
    side: int
    train_top1: float
    val_top1: float | None
    val_n: int | None
    images_per_second: float
    seconds: float
    skipped: int
    waiting: NotRequired[float]
    decoded_per_core: NotRequired[float | None]


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """Everything that determines a run, except data and net.

    Each field is described in `dataclasses.fields(Recipe)[i].metadata["option"].help`.

    Raises:
        InputError: A value is out of bounds or contradicts another one.
        UnknownNameError: A value is not one of the choices.
    """

    name: str = option("custom", "Named recipe that this one was derived from.")
    epochs: int = option(
        dataclasses.MISSING, "Passes over the training images, if steps is 0.",
        minimum=1, maximum=1e6,
    )  # fmt: skip
    steps: int = option(0, "Length of the run in steps; 0 uses epochs.", minimum=0, maximum=1e9)
    batch: int = option(128, "Images per step, over all processes.", minimum=1, maximum=1e6)
    accumulate: int = option(
        1, "Equal parts that a batch is computed in, to save memory.", minimum=1, maximum=1e4
    )
    holdout: float = option(
        0.1, "Share of training images held out to select the epoch; 0 keeps the last epoch.",
        minimum=0, maximum=0.5,
    )  # fmt: skip
    split: Literal["random", "class"] = option(
        "random", "Draw held-out images from all images, or the same share from each class."
    )
    patience: int = option(
        0, "Stop after this many epochs without a better validation accuracy; 0 is off.",
        minimum=0, maximum=1e6,
    )  # fmt: skip
    seed: int = option(
        0, "Random seed of initialization, order and augmentation.", minimum=0, maximum=2**31
    )

    lr: float = option(0.1, "Learning rate at the end of the warm-up.", minimum=1e-12, maximum=100)
    schedule: Literal["steps", "plateau", "cosine", "linear"] = option(
        "steps",
        "Rate after the warm-up: divided by 10 at each milestone or when the error stops falling, "
        "or falling to final_lr times lr.",
    )
    milestones: tuple[float, ...] = option(
        (0.5, 0.75), "Fractions of the run, for the schedule steps."
    )
    plateau_epochs: int = option(
        5, "Epochs without a lower validation error (training error if nothing is held out) after "
        "which the schedule plateau divides the rate.",
        minimum=1, maximum=1e6,
    )  # fmt: skip
    warmup: float = option(0.0, "Length of the warm-up, as a fraction of the run.",
                           minimum=0, maximum=1)  # fmt: skip
    warmup_from: float = option(0.1, "Rate at step 0 as a fraction of lr.", minimum=0, maximum=1)
    warmup_shape: Literal["linear", "constant"] = option(
        "linear", "Warm-up that rises linearly, or stays constant and then jumps to lr."
    )
    warmup_until: float = option(
        0.0, "Stay at warmup_from until the training error is below this many %; 0 is off.",
        minimum=0, maximum=100,
    )  # fmt: skip
    final_lr: float = option(0.0, "Last rate as a fraction of lr.", minimum=0, maximum=1)
    momentum: float = option(0.9, "Momentum of SGD.", minimum=0, maximum=0.9999)
    nesterov: bool = option(False, "Use Nesterov momentum.")
    weight_decay: float = option(1e-4, "Weight decay of SGD.", minimum=0, maximum=1)
    decay_norms: bool = option(
        True, "Also apply weight decay to batch norms and biases, as in the paper."
    )
    layer_decay: float = option(
        1.0, "Factor on the learning rate for each part of the net (stem, stages) from the last "
        "layer down; below 1, early layers learn more slowly.",
        minimum=0.01, maximum=1,
    )  # fmt: skip
    clip: float = option(0.0, "Largest norm of the gradient; 0 is off.", minimum=0, maximum=1e9)

    balance: Literal["none", "loss", "sampling"] = option(
        "none",
        "For skewed data: weight the loss by the inverse frequency of the image's class, or draw "
        "images of each class equally often.",
    )
    distill: float = option(
        0.0, "Share of the teacher's outputs in the loss; needs a teacher.", minimum=0, maximum=1
    )
    temperature: float = option(
        4.0, "Temperature that softens the teacher's and the student's outputs.",
        minimum=0.1, maximum=100,
    )  # fmt: skip
    label_smoothing: float = option(
        0.0, "Share of the target that is spread over all classes (label smoothing).",
        minimum=0, maximum=0.9,
    )  # fmt: skip
    mixup: float = option(
        0.0, "Alpha of mixup's beta distribution; 0 is off. With cutmix, each batch takes one of "
        "the two at random.",
        minimum=0, maximum=10,
    )  # fmt: skip
    cutmix: float = option(0.0, "Alpha of cutmix's beta distribution; 0 is off.",
                           minimum=0, maximum=10)  # fmt: skip
    padding: int = option(
        4, "Pixels around a small image before the random crop; 0 is off.", minimum=0, maximum=32
    )
    padding_mode: Literal["zeros", "reflect"] = option("zeros", "Content of the padding.")
    crop: Literal["scale", "area"] = option(
        "scale", "Crop of a photograph: the paper's (section 3.4), or Szegedy et al.'s (2015)."
    )
    area: tuple[float, ...] = option(
        (0.08, 1.0), "Smallest and largest share of the photograph, for the crop area."
    )
    flip: Literal["none", "random", "alternate"] = option(
        "random", "Mirror images: never, at random, or in every other epoch."
    )
    colour: float = option(
        0.0, "Standard deviation of AlexNet's shift along the principal colours; 0 is off.",
        minimum=0, maximum=1,
    )  # fmt: skip
    trivial_augment: bool = option(
        False, "Apply one random operation of random strength (Mueller and Hutter, 2021)."
    )
    erasing: float = option(
        0.0, "Share of images with a random rectangle erased (Zhong et al., 2017).",
        minimum=0, maximum=1,
    )  # fmt: skip
    train_scale: float = option(
        1.0, "Side of a training image relative to evaluation.", minimum=0.1, maximum=1
    )
    progressive: tuple[tuple[float, float], ...] = option(
        (), "Pairs START:SCALE: from this fraction of the run, this share of the training side."
    )

    ema: float = option(
        0.0, "Decay of the moving average of the weights that is evaluated and kept; 0 is off.",
        minimum=0, maximum=0.999999,
    )  # fmt: skip
    bn_images: int = option(
        0, "Training images to recompute batch norm's statistics from after training; 0 is off.",
        minimum=0, maximum=1e7,
    )  # fmt: skip
    fc_init: Literal["uniform", "he"] = option(
        "uniform", "Initialization of the FC layer: torch's, or He's as of the convolutions."
    )
    mean_image: bool = option(
        False, "Subtract the mean of the training images, pixel by pixel, inside the net."
    )
    stochastic_depth: float = option(
        0.0, "Probability of leaving out the last residual function in a step; it falls linearly "
        "to 0 at the first (Huang et al., 2016).",
        minimum=0, maximum=0.9,
    )  # fmt: skip
    freeze: int = option(
        0, "Leading parts of the net that are not trained: 1 the stem, 2 also stage 1, ...",
        minimum=0, maximum=5,
    )  # fmt: skip
    precision: Precision = option(
        "auto", "Precision of forward and backward pass; auto is bf16 where the device computes in "
        "it, else fp16 on a GPU with tensor cores, else fp32.",
    )  # fmt: skip
    compile: bool = option(False, "Compile the net with torch.compile.")
    qat: bool = option(
        False, "Train with the rounding of the INT8 or FP8 file (quantization-aware)."
    )
    qat_format: CalibratedName = option("int8", "Number format of qat.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % self.accumulate:
            raise InputError(
                f"a batch of {self.batch} cannot be divided into {self.accumulate} equal parts"
            )
        if self.patience and not self.holdout:
            raise InputError(
                f"patience={self.patience}: nothing is held out to measure the accuracy on",
                fix="add --set holdout=0.1",
            )
        if list(self.milestones) != sorted(self.milestones):
            raise InputError(f"milestones={self.milestones}: must increase")
        if len(self.area) != 2 or not 0 < self.area[0] <= self.area[1] <= 1:
            raise InputError(f"area={self.area}: must be two shares, the smaller one first")
        if any(not 0 < share <= 1 for _, share in self.progressive):
            raise InputError(
                f"progressive={self.progressive}: shares must be above 0 and at most 1"
            )
        if self.warmup and self.warmup_until:
            raise InputError(
                f"warmup={self.warmup:g} and warmup_until={self.warmup_until:g} exclude each other",
                fix="add --set warmup=0 or --set warmup_until=0",
            )
        if self.mean_image and (self.train_scale != 1 or self.progressive):
            raise InputError(
                "mean_image: needs training images of one size, but they have several",
                fix="add --set mean_image=false",
            )
        if self.stochastic_depth and (self.qat or self.compile):
            other = "qat" if self.qat else "compile"
            raise InputError(
                f"stochastic_depth={self.stochastic_depth:g}: cannot be combined with {other}, "
                "which fixes the order of operations",
                fix="add --set stochastic_depth=0",
            )
        if self.qat and self.precision in ("bf16", "fp16"):
            raise InputError(
                f"precision={self.precision}: quantization-aware training computes in float32",
                fix="add --set precision=fp32",
            )
        if self.qat_format != "int8" and not self.qat:
            raise InputError(
                f"qat_format={self.qat_format}: applies only to quantization-aware training",
                fix="use --qat with --weights FILE",
            )
        if self.qat and self.bn_images:
            raise InputError(
                f"bn_images={self.bn_images}: quantization-aware training folds batch norm and "
                "keeps its statistics",
                fix="add --set bn_images=0",
            )

    def total(self, steps_per_epoch: int) -> int:
        """Return the number of steps of the run."""
        return self.steps or self.epochs * steps_per_epoch

    def lr_at(
        self, step: int, total: int, *, warmed: int | None = None, divisions: int = 0
    ) -> float:
        """Return the learning rate of a step.

        Args:
            step: From 0.
            total: Steps of the run.
            warmed: First step after a warm-up with `warmup_until`; None if it has not ended.
            divisions: Number of divisions by 10 so far, for the schedule plateau; see
                `plateau_divisions`.
        """
        ramp = self.warmup * total
        if self.warmup_until:
            if warmed is None or step < warmed:
                return self.lr * self.warmup_from
            ramp = warmed
        elif step < ramp:
            risen = step / ramp if self.warmup_shape == "linear" else 0.0
            return self.lr * (self.warmup_from + (1 - self.warmup_from) * risen)
        if self.schedule == "plateau":
            return float(self.lr * 0.1**divisions)
        if self.schedule == "steps":
            return float(self.lr * 0.1 ** sum(step / total >= mark for mark in self.milestones))
        done = (step - ramp) / max(total - ramp, 1)
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.lr * (self.final_lr + (1 - self.final_lr) * left)

    def plateau_divisions(self, scores: Sequence[float]) -> int:
        """Count how often the schedule plateau has divided the rate.

        Args:
            scores: Accuracy of each epoch so far.
        """
        best, waited, divisions = -math.inf, 0, 0
        for score in scores if self.schedule == "plateau" else ():
            waited = 0 if score > best else waited + 1
            best = max(best, score)
            if waited == self.plateau_epochs:
                waited, divisions = 0, divisions + 1
        return divisions

    def side_at(self, step: int, total: int, size: int, least: int = 4) -> int:
        """Return the side of the training images at a step: `size`, or a multiple of 4 below.

        It is not below `least`, the smallest that the net takes.
        """
        share = self.train_scale
        for start, smaller in self.progressive:
            if step >= start * total:
                share = self.train_scale * smaller
        return size if share == 1 else min(size, max(least, 4 * round(size * share / 4)))

    def changes_from(self, stored: Mapping[str, Any]) -> list[str]:
        """Compare with a recipe that a checkpoint stores; return `field old -> new` entries.

        A field that an older version did not store had its default's effect.
        """
        old, new = (dataclasses.asdict(r) for r in (Recipe(**stored), self))
        return [f"{name} {old[name]} -> {new[name]}" for name in new if new[name] != old[name]]


def text(value: Any) -> str:
    """Format a recipe's value."""
    if isinstance(value, tuple | list):
        return "(" + ",".join(text(entry) for entry in value) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Net, images, recipe and folder of a run.

    Attributes:
        spec: The net.
        source: The training images, including those to hold out.
        test: The data set's own test split, or None if it has no splits.
        preprocess: The net's input contract.
        recipe: How it is trained.
        out: The run's folder.
        device: "cpu", "cuda" or "cuda:N".
        start: Weights to start from.
        save_every: Seconds between writes of last.pt within an epoch.
        cached: Whether to keep decoded photographs in memory if they fit.
        max_broken: Allowed share of broken images in [0, 1]; they are ignored.
        decode_all: Whether every image is decoded before the first epoch even if the decoded
            images do not fit into memory.
        teacher: Net to distill from.
        workers: Threads that decode training images; None uses one per core.
    """

    spec: zoo.Spec
    source: Source
    test: Source | None
    preprocess: Preprocess
    recipe: Recipe
    out: Path
    device: str = "cpu"
    start: Checkpoint | None = None
    save_every: float = SAVE_SECONDS
    cached: bool = True
    max_broken: float = 0.0
    decode_all: bool = False
    teacher: Checkpoint | None = None
    workers: int | None = None
