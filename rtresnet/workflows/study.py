"""The paper's analyses: nets side by side, and how strongly layers respond."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtresnet.core import hardware, locks, provenance, reporter
from rtresnet.core.config import Config, option, parse_percentage
from rtresnet.core.errors import InputError
from rtresnet.core.reporter import Reporter
from rtresnet.core.serialization import json_name
from rtresnet.data import DATA_HELP
from rtresnet.workflows.loading import require_torch, torch_device
from rtresnet.workflows.train_job import NOT_MIRRORED
from rtresnet.workflows.train_text import recipe_lines

if TYPE_CHECKING:
    from rtresnet.models.zoo import Spec
    from rtresnet.study.ablations import Length, Net, NetRecord, Terms
    from rtresnet.study.runs import Outcome, Run
    from rtresnet.training.loop import Progress


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Config):
    """Options of a study: how its nets are trained.

    Attributes:
        settings: Fields of the recipe, each "FIELD=VALUE".
        max_broken: As in `TrainConfig`.
    """

    images: int | None = option(
        None,
        "Number of training images, spread evenly over the classes.",
        minimum=20,
        default_text="all",
    )
    seeds: int = option(3, "Number of runs of each net, with seeds from 0.", minimum=1)
    recipe: str = option("paper-cifar", "Recipe, as in train.")
    epochs: int | None = option(
        None, "Length of each run in epochs.", minimum=1, default_text="the recipe's"
    )
    steps: int | None = option(
        None, "Length of each run in steps.", minimum=1, default_text="the recipe's"
    )
    settings: tuple[str, ...] = option(
        (), "Set a field of the recipe; may be repeated.", names=("--set",),
        metavar="FIELD=VALUE",
    )  # fmt: skip
    size: int | None = option(
        None, "Side of the input, in pixels.", minimum=8, default_text="the nets'"
    )
    max_broken: float | None = option(
        None,
        "Allowed share of broken images, which are ignored; with more, training fails.",
        metavar="N%",
        parse=parse_percentage,
        default_text="0%",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Device to train on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs and self.steps:
            raise InputError("--epochs and --steps cannot be combined", fix="use one of them")


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A finished study.

    Attributes:
        study: "degradation", "shortcuts" or "blocks".
        length: Length of each run compared with the paper's.
        note: Length, data and seeds in words.
        records: A summary of each net, with every seed.
        nets: The same with curves, for figures.
        recipe: Recipe of the first net and seed, as text.
        diverged: A line for each run whose loss was not finite.
        out: The study's folder.
    """

    study: str
    data: str
    length: Length
    note: str
    records: tuple[NetRecord, ...] = json_name("nets")
    nets: tuple[Net, ...] = dataclasses.field(default=(), metadata={"hidden": True})
    title: str = dataclasses.field(default="", metadata={"hidden": True})
    recipe: str = dataclasses.field(default="", metadata={"hidden": True})
    diverged: tuple[str, ...] = dataclasses.field(default=(), metadata={"hidden": True})
    out: Path = dataclasses.field(default=Path(), metadata={"hidden": True})


def study_degradation(
    data: str,
    depths: Sequence[int] = (20, 32, 44, 56),
    config: StudyConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> StudyResult:
    """Train plain and residual nets of growing depth (figures 1, 4 and 6, table 2).

    Every run is a folder in `out`; finished runs are not repeated.

    Args:
        data: As for `train`.
        depths: 6n+2 each.
        config: Recipe, length and seeds.
        out: Folder; runs/study-degradation by default.
        reporter: Receives progress and a line for each run.

    Returns:
        Errors and curves of each net, over all seeds.

    Raises:
        InputError: Unknown names, or a folder of a different study.
        LockedError: Another process runs a study in the folder.
    """
    hardware.wait_passively()
    require_torch("a study")
    from rtresnet.study import ablations

    title = "Degradation: plain and residual nets of growing depth"
    nets = ablations.degradation_nets(list(depths))
    return _study("degradation", title, nets, data, config or StudyConfig(), out, reporter)


def study_shortcuts(
    data: str,
    model: str = "resnet20",
    config: StudyConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> StudyResult:
    """Train a net with shortcut options A, B and C, and the plain net (section 4.1, table 3).

    Args:
        data: As for `train`.
        model: A residual net.
        config: Recipe, length and seeds.
        out: Folder; runs/study-shortcuts by default.
        reporter: Receives progress and a line for each run.

    Returns:
        Errors and curves of each net, over all seeds.

    Raises:
        InputError: As `study_degradation`.
    """
    hardware.wait_passively()
    require_torch("a study")
    from rtresnet.study import ablations

    nets = ablations.shortcut_nets(model)
    title = f"Shortcut options of {model}"
    return _study("shortcuts", title, nets, data, config or StudyConfig(), out, reporter)


def study_blocks(
    data: str,
    model: str = "resnet20",
    config: StudyConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> StudyResult:
    """Train a net with residual functions of one, two and three layers (section 3.2).

    All have the same layers. A fourth net has projections everywhere (option C).

    Args:
        data: As for `train`.
        model: A residual net of 18n+2 layers.
        config: Recipe, length and seeds.
        out: Folder; runs/study-blocks by default.
        reporter: Receives progress and a line for each run.

    Returns:
        Errors and curves of each net, over all seeds.

    Raises:
        InputError: As `study_degradation`.
    """
    hardware.wait_passively()
    require_torch("a study")
    from rtresnet.study import ablations

    title = f"Residual functions of one, two and three layers in {model}"
    nets = ablations.block_nets(model)
    return _study("blocks", title, nets, data, config or StudyConfig(), out, reporter)


def _study(
    name: str,
    title: str,
    nets: Mapping[str, Spec],
    data: str,
    config: StudyConfig,
    out: str | os.PathLike[str] | None,
    reporter: Reporter,
) -> StudyResult:
    from rtresnet.study import ablations, runs

    terms = _terms(data, config, Path(out or f"runs/study-{name}"))
    with locks.hold_folder(terms.out, warn=reporter.note):
        planned = ablations.plan(nets, terms)
        for run in planned:
            runs.finished(run)  # reject runs of other studies before training
        outcomes = _run_all(planned, reporter)
    summary = ablations.summarize(outcomes)
    length = ablations.length(planned[0])
    seeds = "1 seed" if config.seeds == 1 else f"mean ± std of {config.seeds} seeds"
    return StudyResult(
        study=name,
        data=data,
        length=length,
        note=f"{length.words(short_name(data))}; {seeds}",
        records=tuple(net.record() for net in summary),
        nets=tuple(summary),
        title=title,
        recipe="\n".join(recipe_lines(planned[0].job.recipe)),
        diverged=tuple(
            f"{outcome.run.label}, seed {outcome.run.seed}: {outcome.diverged}"
            for net in summary
            for outcome in net.outcomes
            if outcome.diverged
        ),
        out=terms.out,
    )


def _terms(data: str, config: StudyConfig, out: Path) -> Terms:
    from rtresnet.data.sources import open_source
    from rtresnet.study import runs
    from rtresnet.study.ablations import Terms
    from rtresnet.training import recipes

    fields = recipes.parse(config.settings)
    if "seed" in fields:
        raise InputError(
            "--set seed: a study uses several seeds",
            fix="choose their number with --seeds N, for seeds 0 to N - 1",
        )
    if data in NOT_MIRRORED:
        fields = {"flip": "none"} | fields
    lengths = (("epochs", config.epochs), ("steps", config.steps))
    source = open_source(data, "train")
    return Terms(
        source=runs.part(source, config.images),
        test=open_source(data, "test") if source.splits else None,
        recipe=config.recipe,
        settings=fields | {name: value for name, value in lengths if value},
        seeds=config.seeds,
        out=out,
        device=torch_device(config.device),
        size=config.size,
        max_broken=config.max_broken or 0.0,
    )


def _run_all(planned: Sequence[Run], reporter: Reporter) -> list[Outcome]:
    from rtresnet.study import runs

    outcomes = []
    try:
        for number, run in enumerate(planned):
            where = f"{run.label}, seed {run.seed} ({number + 1} of {len(planned)})"
            before = runs.finished(run)
            if before is not None:
                reporter.note(f"{where}: {_in_words(before)} (from an earlier run)")
                outcomes.append(before)
                continue
            started = time.monotonic()
            with reporter.progress(where, total=1.0) as update:

                def on_step(p: Progress, update: Any = update, where: str = where) -> None:
                    update(p.step / p.total, f"{where}  loss {p.loss:.3f}")

                outcomes.append(runs.make(run, on_step=on_step, warn=reporter.note))
            spent = time.monotonic() - started
            reporter.note(f"{where}: {_in_words(outcomes[-1])} ({spent:,.0f} s)")
    except KeyboardInterrupt:
        command = provenance.command_line()
        reporter.note(f"saved; resume with the same command: {command}")
        raise
    return outcomes


def _in_words(outcome: Outcome) -> str:
    """Return a run's result in a line."""
    if outcome.diverged:
        return f"diverged, {outcome.diverged}"
    val = "" if outcome.val_error is None else f"validation {outcome.val_error:.2f} %, "
    return f"error: training {outcome.train_error:.2f} %, {val}test {outcome.test_error:.2f} %"


def short_name(data: str) -> str:
    """Return a data set's name for a figure: cifar10 for cifar10:DIR, or the file's name."""
    form, _, argument = data.partition(":")
    named = form if form in ("cifar10", "fashion-mnist", "synthetic", "digits") else ""
    return named or Path(argument or form).stem


@dataclass(frozen=True, kw_only=True)
class LayerResponses:
    """Result of `study responses`: standard deviations of a checkpoint's layer outputs.

    Attributes:
        n: Number of images.
        responses: Standard deviation of each 3x3 layer's output after batch norm, before ReLU and
            addition, in the order of the layers.
    """

    checkpoint: str
    model: str
    n: int
    assumed: tuple[str, ...]
    responses: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ResponsesResult:
    """The responses of several checkpoints."""

    results: tuple[LayerResponses, ...]


def study_responses(
    checkpoints: Sequence[str | os.PathLike[str]],
    data: str,
    images: int = 256,
    *,
    reporter: Reporter = reporter.DEFAULT,
) -> ResponsesResult:
    """Measure the standard deviation of each 3x3 layer's response (figure 7).

    Args:
        checkpoints: Checkpoints of residual or plain nets.
        data: As for `train`; the test split is used.
        images: Number of images.
        reporter: Receives progress.

    Returns:
        Standard deviations for each checkpoint.

    Raises:
        InputError: A file that is not a checkpoint, or data that cannot be read.
    """
    require_torch("the analysis of responses")
    from rtresnet.data import loader
    from rtresnet.data.sources import open_source
    from rtresnet.models import checkpoint
    from rtresnet.study.analyses import layer_responses

    source = open_source(data, "test")
    chosen = loader.sample(source, images)
    results = []
    for path in checkpoints:
        loaded = checkpoint.load(path)
        size = loader.batch_size(loaded.input)
        batches = loader.batches(source, loaded.input, size, indices=chosen)
        with reporter.progress(f"responses of {path}"):
            deviations = layer_responses(loaded.net(), (pixels for pixels, _ in batches))
        results.append(
            LayerResponses(
                checkpoint=str(path),
                model=loaded.model.architecture,
                n=len(chosen),
                assumed=tuple(loaded.assumed),
                responses=deviations,
            )
        )
    return ResponsesResult(results=tuple(results))


DATA_OPTION = f"Images: {DATA_HELP}"
