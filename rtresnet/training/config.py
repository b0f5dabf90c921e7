"""What to train on what, and what is told on the way. `loop.py` does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rtresnet.core.preprocess import Preprocess
from rtresnet.data.sources import Source
from rtresnet.models import zoo
from rtresnet.models.checkpoint import Checkpoint
from rtresnet.training.recipe import Recipe
from rtresnet.training.step import settle_precision

SAVE_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What to train on what.

    Attributes:
        spec: The net.
        source: The training images, also those to be held out.
        test: The set's own test split, or None where the data has no splits.
        preprocess: The net's input contract.
        recipe: How.
        out: The run's folder.
        device: "cpu", "cuda" or "cuda:N".
        start: Weights to go on from.
        save_every: Seconds between writes of last.pt within an epoch.
        cached: Whether decoded photographs are kept in memory where they fit.
        max_broken: The share of images that may be broken, in [0, 1]; they are left out.
        decode_all: Whether every image is decoded before the first epoch, also where the decoded
            images do not fit into memory.
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


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Told after every step.

    Attributes:
        epoch: From 0.
        step: Steps done, of `total`.
        seconds_left: An estimate, evaluations included.
    """

    epoch: int
    step: int
    total: int
    loss: float
    lr: float
    images_per_second: float
    seconds_left: float


Listener = Callable[[Progress], None]


def resolve_job(job: TrainJob) -> TrainJob:
    """The job with what "auto" means on its device."""
    precision = settle_precision(job.recipe, job.device)
    return dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, precision=precision))
