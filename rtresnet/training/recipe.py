"""How a net is trained: one frozen record, printed, stored, and compared on resume.

The named recipes are in `recipes.py`. What a step computes follows from the recipe and the step's
number alone: the learning rate and the image size here, the images and their augmentation in
`feed.py` and `rtresnet/data/augment.py`. So a resume has no state of a scheduler to restore.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from rtresnet.core.errors import InputError, UnknownNameError

CHOICES = {
    "schedule": ("steps", "cosine", "linear"),
    "warmup_shape": ("linear", "constant"),
    "padding_mode": ("zeros", "reflect"),
    "crop": ("scale", "area"),
    "flip": ("none", "random", "alternate"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes, but for the data and the net.

    Attributes:
        name: Of the named recipe it began as.
        epochs: Passes over the training images, where `steps` is 0.
        steps: Length of the run in steps; 0 leaves it to `epochs`.
        batch: Images a step, over all processes.
        accumulate: Parts a batch is computed in, one after another, each normalized by itself.
        holdout: Share of the training images held out to choose the epoch; 0 keeps the last one.
        seed: Of initialization, order and augmentation.

        lr: Learning rate at the end of the warm-up.
        schedule: After the warm-up: "steps" divides by 10 at each milestone, "cosine" and
            "linear" fall to `final_lr` times `lr`.
        milestones: Fractions of the run, for "steps".
        warmup: Fraction of the run.
        warmup_from: The rate at step 0 as a fraction of `lr`.
        warmup_shape: "linear" rises, "constant" stays there and then jumps.
        final_lr: See `schedule`.
        momentum, nesterov, weight_decay: Of SGD.
        decay_norms: Whether weight decay takes batch norms and biases too (the paper's does).
        clip: Largest norm of the gradient; 0 is off.

        label_smoothing: Share of the target given to all classes alike.
        mixup, cutmix: The alpha of their beta distribution; 0 is off. With both, a fair coin.
        padding: Pixels around a small image before the random crop; 0 is off.
        padding_mode: What is in them.
        crop: Of a photograph: "scale" is the paper's (section 3.4), "area" Szegedy et al. (2015).
        area: Smallest and largest share of the photograph, for "area".
        flip: Mirroring: never, at random, or in every other epoch. Digits and letters: never.
        colour: Standard deviation of AlexNet's shift along the principal colours; 0 is off.
        trivial_augment: One random operation of random strength (Mueller and Hutter, 2021).
        erasing: Share of images that lose a random rectangle (Zhong et al., 2017).
        train_scale: Side of a training image as a share of the evaluation's.
        progressive: Pairs (from this fraction of the run on, this share of the training side).

        ema: Decay of the running average of the weights that is evaluated and kept; 0 is off.
        bn_images: Training images over which batch norm's statistics are computed again after
            training; 0 keeps the running ones.
        freeze: How many leading parts stay as they are: 1 the stem, 2 the first stage too, ...
        precision: Of the forward and backward pass; "auto" is bf16 where the GPU or the processor
            computes in it, else fp16 on a GPU with tensor cores, else fp32.
        compile: Whether torch.compile is used.
        qat: Whether the net learns with the rounding of its INT8 file (`qat.py`).
    """

    name: str = "custom"
    epochs: int
    steps: int = 0
    batch: int = 128
    accumulate: int = 1
    holdout: float = 0.1
    seed: int = 0

    lr: float = 0.1
    schedule: str = "steps"
    milestones: tuple[float, ...] = (0.5, 0.75)
    warmup: float = 0.0
    warmup_from: float = 0.1
    warmup_shape: str = "linear"
    final_lr: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norms: bool = True
    clip: float = 0.0

    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    padding: int = 4
    padding_mode: str = "zeros"
    crop: str = "scale"
    area: tuple[float, ...] = (0.08, 1.0)
    flip: str = "random"
    colour: float = 0.0
    trivial_augment: bool = False
    erasing: float = 0.0
    train_scale: float = 1.0
    progressive: tuple[tuple[float, float], ...] = ()

    ema: float = 0.0
    bn_images: int = 0
    freeze: int = 0
    precision: str = "auto"
    compile: bool = False
    qat: bool = False

    def __post_init__(self) -> None:
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise UnknownNameError(field, str(getattr(self, field)), choices)
        for field, low, high in BOUNDS:
            value = getattr(self, field)
            if not low <= value <= high:
                raise InputError(f"{field}={value}: must be from {low:g} to {high:g}")
        if not 0 < self.lr < 100:
            raise InputError(f"learning rate {self.lr} must be above 0", fix="the paper's is 0.1")
        if self.batch % self.accumulate:
            raise InputError(f"a batch of {self.batch} has no {self.accumulate} equal parts")
        if list(self.milestones) != sorted(self.milestones):
            raise InputError(f"milestones={self.milestones}: must rise")
        if len(self.area) != 2 or not 0 < self.area[0] <= self.area[1] <= 1:
            raise InputError(f"area={self.area}: needs two shares, the smaller first")
        if any(len(pair) != 2 or not 0 < pair[1] <= 1 for pair in self.progressive):
            raise InputError(f"progressive={self.progressive}: needs pairs of (from, share)")
        if self.qat and self.precision in ("bf16", "fp16"):
            raise InputError(
                f"precision={self.precision}: INT8 is rounded from float32 in training",
                fix="--set precision=fp32",
            )
        if self.qat and self.bn_images:
            raise InputError(
                f"bn_images={self.bn_images}: fine-tuning for INT8 folds batch norm, and its "
                "statistics stay",
                fix="--set bn_images=0",
            )

    def total(self, steps_an_epoch: int) -> int:
        """Steps in the whole run."""
        return self.steps or self.epochs * steps_an_epoch

    def lr_at(self, step: int, total: int) -> float:
        """The learning rate of a step, a pure function: nothing to restore on resume.

        Args:
            step: From 0.
            total: Steps in the whole run.
        """
        ramp = self.warmup * total
        if step < ramp:
            risen = step / ramp if self.warmup_shape == "linear" else 0.0
            return self.lr * (self.warmup_from + (1 - self.warmup_from) * risen)
        if self.schedule == "steps":
            return float(self.lr * 0.1 ** sum(step / total >= mark for mark in self.milestones))
        done = (step - ramp) / max(total - ramp, 1)
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.lr * (self.final_lr + (1 - self.final_lr) * left)

    def side_at(self, step: int, total: int, size: int) -> int:
        """Side of the training images at a step, in pixels: a multiple of 4 below `size`."""
        share = self.train_scale
        for start, smaller in self.progressive:
            if step >= start * total:
                share = self.train_scale * smaller
        return size if share == 1 else min(size, max(4, 4 * round(size * share / 4)))


BOUNDS = (
    ("epochs", 1, 1e6),
    ("steps", 0, 1e9),
    ("batch", 1, 1e6),
    ("accumulate", 1, 1e4),
    ("holdout", 0, 0.5),
    ("seed", 0, 2**31),
    ("warmup", 0, 1),
    ("warmup_from", 0, 1),
    ("final_lr", 0, 1),
    ("momentum", 0, 0.9999),
    ("weight_decay", 0, 1),
    ("clip", 0, 1e9),
    ("label_smoothing", 0, 0.9),
    ("mixup", 0, 10),
    ("cutmix", 0, 10),
    ("padding", 0, 32),
    ("colour", 0, 1),
    ("erasing", 0, 1),
    ("train_scale", 0.1, 1),
    ("ema", 0, 0.999999),
    ("bn_images", 0, 1e7),
    ("freeze", 0, 5),
)


def differences(old: dict[str, Any], new: Recipe) -> list[str]:
    """Fields in which a stored recipe differs from one asked for, as `field old -> new`.

    A field that was not yet known when the recipe was stored had its default's effect.
    """
    known = dataclasses.asdict(Recipe(epochs=1)) | {"epochs": None} | old
    return [
        f"{name} {known[name]} -> {value}"
        for name, value in dataclasses.asdict(new).items()
        if _plain(value) != _plain(known[name])
    ]


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value
