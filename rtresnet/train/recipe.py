"""How a net is trained: one frozen record, printed, stored, and compared on resume.

The paper's CIFAR recipe (section 4.2): SGD with momentum 0.9, weight decay 1e-4, batch 128,
learning rate 0.1 divided by 10 at 32k and 48k of 64k steps, that is at 1/2 and 3/4 of the run.
Scaled to fewer epochs the fractions stay; on a small set the batch shrinks, so that a run has
steps enough, and the rate with it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rtresnet.errors import InputError

PAPER_BATCH = 128
SMALLEST_BATCH = 32
STEPS_AN_EPOCH = 40  # below this a batch of 128 leaves too few updates to learn from


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes, but for the data and the net.

    Attributes:
        epochs: Passes over the training images.
        batch: Images a step.
        lr: Learning rate before the first drop.
        milestones: Fractions of the run at which the rate is divided by 10.
        warmup: Fraction of the run over which the rate rises from lr / 10.
        padding: Pixels of padding before the random crop; 0 turns it off.
        flip: Whether images may be mirrored. Digits and letters may not.
        seed: Of initialization, order and augmentation.
    """

    epochs: int
    batch: int = PAPER_BATCH
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[float, ...] = (0.5, 0.75)
    warmup: float = 0.02
    padding: int = 4
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise InputError(f"{self.epochs} epochs of batch {self.batch}: both must be at least 1")
        if not 0 < self.lr < 100:
            raise InputError(f"learning rate {self.lr} must be above 0", fix="the paper's is 0.1")

    def lr_at(self, step: int, total: int) -> float:
        """The learning rate of a step, a pure function: nothing to restore on resume.

        Args:
            step: From 0.
            total: Steps in the whole run.
        """
        progress = step / total
        if progress < self.warmup:
            return self.lr * (0.1 + 0.9 * progress / self.warmup)
        return float(self.lr * 0.1 ** sum(progress >= mark for mark in self.milestones))


def scaled(images: int, *, epochs: int, lr: float | None = None, **fields: Any) -> Recipe:
    """The paper's recipe for a training set of `images` images.

    The rate follows the batch linearly; `lr` overrides it.
    """
    batch = fields.pop("batch", None)
    if batch is None:
        batch = PAPER_BATCH
        while batch > SMALLEST_BATCH and images // batch < STEPS_AN_EPOCH:
            batch //= 2
    return Recipe(
        epochs=epochs, batch=batch, lr=0.1 * batch / PAPER_BATCH if lr is None else lr, **fields
    )


def differences(old: dict[str, Any], new: Recipe) -> list[str]:
    """Fields in which a stored recipe differs from one asked for, as `field old -> new`."""
    current = dataclasses.asdict(new)
    return [
        f"{name} {old.get(name)} -> {value}"
        for name, value in current.items()
        if (list(value) if isinstance(value, tuple) else value)
        != (list(old[name]) if isinstance(old.get(name), tuple) else old.get(name))
    ]
