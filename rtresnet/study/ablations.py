"""Nets side by side under one recipe and one set of seeds.

The degradation study (section 4.1 and 4.2, figures 1, 4 and 6, table 2): plain nets get worse with
depth, residual ones do not. The study of shortcuts (section 4.1, table 3): options A, B and C.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.sidecar import Measurements
from rtresnet.data.sources import Source
from rtresnet.models import zoo
from rtresnet.models.nets import multiply_adds
from rtresnet.models.zoo import Spec
from rtresnet.study.runs import Outcome, Run
from rtresnet.training import loader, recipes
from rtresnet.training.config import EpochRecord, Recipe, TrainJob

CurveName = Literal["train_top1", "val_top1"]
ERRORS = ("train_error", "val_error", "test_error")


def degradation_nets(depths: Sequence[int]) -> dict[str, Spec]:
    """Return plain and residual nets with equal parameters: option A (section 4.1).

    Raises:
        UnknownNameError: No nets of such a depth.
    """
    plain = [zoo.spec(f"plain{depth}") for depth in depths]
    residual = [zoo.spec(f"resnet{depth}", shortcut="A") for depth in depths]
    return {spec.name: spec for spec in (*plain, *residual)}


def shortcut_nets(model: str) -> dict[str, Spec]:
    """Return a residual net with each option, and its plain counterpart if the zoo has one.

    Raises:
        UnknownNameError: No such net.
        InputError: The net has no shortcuts.
    """
    if zoo.spec(model).shortcut is None:
        residual = model.replace("plain", "resnet")
        raise InputError(f"{model} has no shortcuts", fix=f"use --model {residual}")
    plain = model.replace("resnet", "plain")
    try:
        counterpart = {plain: zoo.spec(plain)}
    except UnknownNameError:  # a net of bottlenecks
        counterpart = {}
    return counterpart | {f"{model}-{option}": zoo.spec(model, shortcut=option) for option in "ABC"}


def block_nets(model: str) -> dict[str, Spec]:
    """Return a net with one-, two- and three-layer blocks, and one with projections everywhere.

    The nets have the same layers and parameters, except for the projections of option C
    (section 3.2: a residual function of one layer had no advantage; section 4.1: option C).

    Raises:
        UnknownNameError: No such net.
        InputError: The net's layers cannot be grouped by three.
    """
    names = [f"{model}-block1", model, f"{model}-block3", f"{model}-C"]
    return {name: zoo.spec(name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Settings that all nets of a study share.

    Attributes:
        source: Training images.
        test: The data set's own test split, if it has one.
        recipe: A recipe's name.
        settings: Recipe fields to override.
        seeds: Number of seeds: 0, 1, 2, ...
        out: Folder of the study.
        device: "cpu" or "cuda".
        size: Side of the input in pixels; None for the net's default.
        max_broken: Allowed share of broken images in [0, 1]; they are ignored.
    """

    source: Source
    test: Source | None
    recipe: str
    settings: Mapping[str, Any]
    seeds: int
    out: Path
    device: str
    size: int | None = None
    max_broken: float = 0.0


def plan(nets: Mapping[str, Spec], terms: Terms) -> list[Run]:
    """Return the runs of every net with the first seed, then with the second, and so on.

    Raises:
        UnknownNameError, InputError: The recipe or a setting.
    """
    fingerprint = terms.source.fingerprint()
    runs = []
    for seed in range(terms.seeds):
        for label, spec in nets.items():
            preprocess = Preprocess.for_size(terms.size or spec.size)
            recipe = loader.resolve_recipe(
                terms.recipe,
                terms.source,
                size=preprocess.size,
                depth=spec.depth,
                settings={**terms.settings, "seed": seed},
            )
            job = TrainJob(
                spec=spec, source=terms.source, test=terms.test, preprocess=preprocess,
                recipe=recipe, out=terms.out / f"{label}-seed{seed}", device=terms.device,
                max_broken=terms.max_broken,
            )  # fmt: skip
            runs.append(Run(label=label, job=job, fingerprint=fingerprint))
    return runs


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and sample standard deviation over seeds (None for a single seed)."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


def spread(values: Sequence[float]) -> Spread:
    """Summarize one or more values."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(mean=float(np.mean(values)), std=std, n=len(values))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """An error in percent against steps, over the seeds that did not diverge.

    Attributes:
        std: None with a single seed.
    """

    steps: list[int]
    mean: list[float]
    std: list[float] | None


@dataclass(frozen=True, kw_only=True)
class Net:
    """A net of the study and all its outcomes."""

    label: str
    spec: Spec
    parameters: int
    multiply_adds: int
    outcomes: tuple[Outcome, ...]

    @property
    def finished(self) -> list[Outcome]:
        """Outcomes of the seeds that did not diverge."""
        return [outcome for outcome in self.outcomes if outcome.diverged is None]

    def error(self, name: str) -> Spread | None:
        """Return one of ERRORS over the seeds; None if no run finished or nothing was held out."""
        values = [getattr(outcome, name) for outcome in self.finished]
        return spread(values) if values and None not in values else None

    def curve(self, name: CurveName) -> Curve | None:
        """Return "train_top1" or "val_top1" as an error curve; None as for `error`."""
        logs = [outcome.log for outcome in self.finished]
        hits = [[record[name] for record in log] for log in logs]
        if not hits or any(None in of_seed for of_seed in hits):
            return None
        errors = 100 - np.array(hits, np.float64)
        return Curve(
            steps=[record["step"] for record in logs[0]],
            mean=errors.mean(axis=0).tolist(),
            std=errors.std(axis=0, ddof=1).tolist() if len(logs) > 1 else None,
        )

    def record(self) -> NetRecord:
        """Return the net without curves, as results show it."""
        return NetRecord(
            net=self.label,
            shortcut=self.spec.shortcut,
            parameters=self.parameters,
            multiply_adds=self.multiply_adds,
            recipe=self.outcomes[0].run.job.recipe,
            train_error=self.error("train_error"),
            val_error=self.error("val_error"),
            test_error=self.error("test_error"),
            diverged=len(self.outcomes) - len(self.finished),
            seeds=tuple(map(SeedRecord.of, self.outcomes)),
        )


@dataclass(frozen=True, kw_only=True)
class SeedRecord:
    """A net's run with one seed; errors in percent, None if it diverged.

    Attributes:
        folder: Folder of the run.
        diverged: Reason why there is no result, or None.
        measured: Metrics of the selected epoch.
        log: A record for each epoch.
    """

    seed: int
    folder: Path
    diverged: str | None
    train_error: float | None = None
    val_error: float | None = None
    test_error: float | None = None
    measured: Measurements | None = None
    log: tuple[EpochRecord, ...] = ()

    @classmethod
    def of(cls, outcome: Outcome) -> SeedRecord:
        """Describe an outcome."""
        about = cls(seed=outcome.run.seed, folder=outcome.run.job.out, diverged=outcome.diverged)
        if outcome.diverged is not None:
            return about
        return dataclasses.replace(
            about, **{name: getattr(outcome, name) for name in ERRORS}, measured=outcome.measured,
            log=tuple(outcome.log),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NetRecord:
    """A net of a study; errors are those of all seeds that did not diverge.

    Attributes:
        net: Its label.
        shortcut: "A", "B" or "C"; None for a plain net.
        multiply_adds: Multiply-adds for one image.
        recipe: Recipe of the first seed.
        diverged: Number of seeds.
    """

    net: str
    shortcut: str | None
    parameters: int
    multiply_adds: int
    recipe: Recipe
    train_error: Spread | None
    val_error: Spread | None
    test_error: Spread | None
    diverged: int
    seeds: tuple[SeedRecord, ...]


def summarize(outcomes: Sequence[Outcome]) -> list[Net]:
    """Return the outcomes by net, in the order of their first appearance."""
    labels = list(dict.fromkeys(outcome.run.label for outcome in outcomes))
    nets = []
    for label in labels:
        own = tuple(outcome for outcome in outcomes if outcome.run.label == label)
        job = own[0].run.job
        net = zoo.build(job.spec, len(job.source.classes), device="meta")
        nets.append(
            Net(
                label=label,
                spec=job.spec,
                parameters=sum(parameter.numel() for parameter in net.parameters()),
                multiply_adds=multiply_adds(net, job.preprocess.size),
                outcomes=own,
            )
        )
    return nets


@dataclass(frozen=True, kw_only=True)
class Length:
    """Length of a run compared with the paper's.

    Attributes:
        images: Number of training images without the held-out ones.
        steps, batch: Length and batch size of this run.
        paper_steps, paper_batch: Length and batch size of the paper's run.
    """

    images: int
    steps: int
    batch: int
    paper_steps: int
    paper_batch: int

    def words(self, data: str) -> str:
        """Return a figure's subtitle: the differences from the paper's setting."""
        of = f"{self.steps:,} of the paper's {self.paper_steps:,} steps"
        if self.steps >= self.paper_steps:
            of = f"{self.steps:,} steps (the paper's: {self.paper_steps:,})"
        if self.batch != self.paper_batch:
            of += f", {self.batch} images each (the paper's: {self.paper_batch})"
        return f"{of}; {self.images:,} training images of {data}"


def length(run: Run) -> Length:
    """Return the length of a run, which may not have started yet."""
    job, recipe = run.job, run.job.recipe
    paper: Recipe = recipes.PAPER_CIFAR if job.spec.family == "cifar" else recipes.PAPER_IMAGENET
    images = len(loader.split(job.source, recipe).train)
    return Length(
        images=images,
        steps=recipe.total(max(1, images // recipe.batch)),
        batch=recipe.batch,
        paper_steps=paper.steps,
        paper_batch=paper.batch,
    )
