"""The runs of a study: each an ordinary run folder, made once, gone on with after a Ctrl-C.

A run that finished under the same net, recipe and images is not made again; one made under
others is never written over. A run that diverged is a result too, and leaves `diverged.json`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rtresnet.core import atomic_io
from rtresnet.core.errors import CheckFailedError, InputError
from rtresnet.core.sidecar import Measurements
from rtresnet.data import loader
from rtresnet.data.sources import Arrays, Source, Subset
from rtresnet.models import checkpoint
from rtresnet.training import checkpointing, loop
from rtresnet.training.config import EpochRecord, TrainJob
from rtresnet.training.loop import StepListener, resolve_job

DIVERGED = "diverged.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One net under one seed.

    Attributes:
        label: Of the net in figures and tables.
        job: What to train on what; its recipe has the seed.
        fingerprint: Of the job's images, which takes a while to compute.
    """

    label: str
    job: TrainJob
    fingerprint: str

    @property
    def seed(self) -> int:
        """Random seed."""
        return self.job.recipe.seed


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a run.

    Attributes:
        run: Which.
        diverged: Why there is no result, or None.
        log: A record an epoch, as in log.jsonl.
        measured: Of the epoch that was kept.
    """

    run: Run
    diverged: str | None = None
    log: list[EpochRecord] = field(default_factory=list)
    measured: Measurements = field(default_factory=lambda: Measurements())

    @property
    def train_error(self) -> float:
        """Of the last epoch, on the augmented images as they were trained on, in percent."""
        return 100 - self.log[-1]["train_top1"]

    @property
    def val_error(self) -> float | None:
        """Of the kept epoch, in percent; None where nothing was held out."""
        value = self.measured["val_top1"]
        return None if value is None else 100 - value

    @property
    def test_error(self) -> float:
        """Of the kept epoch, in percent."""
        return 100 - self.measured["test_top1"]


def found(run: Run) -> Outcome | None:
    """Return the outcome of an earlier run; None if the run is missing or unfinished.

    Raises:
        InputError: The folder holds a run of another net, recipe or images.
    """
    out = run.job.out
    if (out / DIVERGED).exists():
        record = json.loads((out / DIVERGED).read_text(encoding="utf-8"))
        _require_same(run, record)
        return Outcome(run=run, diverged=record["message"])
    if not (out / "last.pt").exists():
        return None
    last = checkpointing.saved_run(out)
    _require_same(run, {**last.training, "model": dataclasses.asdict(last.model)})
    best = checkpoint.load(out / "best.pt") if (out / "best.pt").exists() else last
    return _finished(run, best.measured) if "test_top1" in best.measured else None


def make(
    run: Run,
    *,
    on_step: StepListener = lambda progress: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Train, or goes on where a run was interrupted.

    Raises:
        InputError: The folder holds another run.
        KeyboardInterrupt: Ctrl-C; the state is saved.
    """
    before = found(run)
    if before is not None:
        return before
    resume = (run.job.out / "last.pt").exists()
    try:
        best = loop.train(run.job, resume=resume, on_step=on_step, warn=warn)
    except CheckFailedError as error:
        record = _identity(run) | {"message": error.message}
        atomic_io.make_folder(run.job.out)
        atomic_io.write_text(run.job.out / DIVERGED, json.dumps(record, indent=1) + "\n")
        return Outcome(run=run, diverged=error.message)
    return _finished(run, best.measured)


def _finished(run: Run, measured: Measurements) -> Outcome:
    lines = (run.job.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return Outcome(run=run, log=[json.loads(line) for line in lines], measured=measured)


def _identity(run: Run) -> dict[str, Any]:
    """Return the settings that, with the seed, identify a run."""
    job = resolve_job(run.job)
    return {
        "recipe": dataclasses.asdict(job.recipe),
        "fingerprint": run.fingerprint,
        "data": job.source.name,
        "model": dataclasses.asdict(checkpoint.model_of(job.spec, job.source.classes)),
    }


def _require_same(run: Run, record: dict[str, Any]) -> None:
    out, own = run.job.out, _identity(run)
    try:
        checkpointing.check_same_recipe(out, record["recipe"], resolve_job(run.job).recipe)
    except InputError as error:
        raise InputError(error.message, fix="give the study another --out") from None
    for name, what in (("model", "another net"), ("fingerprint", "other images")):
        if json.dumps(record[name]) != json.dumps(own[name]):
            raise InputError(
                f"{out}: its run has {what} ({record['model']['architecture']} on "
                f"{record['data']})",
                fix="give the study another --out",
            )


def part(source: Source, images: int | None) -> Source:
    """`images` of a source, spread evenly over the classes, always the same; None is all."""
    if images is None or images >= len(source):
        return source
    chosen = loader.sample(source, images)
    some = Subset(source, chosen, f"{source.name} ({len(chosen)} images)")
    if isinstance(source, Arrays):
        pixels = source.images[chosen]
        return Arrays(
            some.name, pixels, some.labels, source.classes, splits=source.splits, named=source.named
        )
    return some
