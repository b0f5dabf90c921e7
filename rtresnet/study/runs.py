"""The runs of a study: ordinary run folders, trained once, resumed after a Ctrl-C.

A finished run of the same net, recipe and images is not repeated. A run of another
net, recipe or images is never overwritten. A diverged run is also a result, stored in
`diverged.json`.
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
    """One net with one seed.

    Attributes:
        label: Label of the net in figures and tables.
        job: Net, data and recipe; the recipe contains the seed.
        fingerprint: Hash of the job's images, which is slow to compute.
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
    """Result of a run.

    Attributes:
        run: The run.
        diverged: Reason why there is no result, or None.
        log: One record per epoch, as in log.jsonl.
        measured: Metrics of the selected epoch.
    """

    run: Run
    diverged: str | None = None
    log: list[EpochRecord] = field(default_factory=list)
    measured: Measurements = field(default_factory=lambda: Measurements())

    @property
    def train_error(self) -> float:
        """Error of the last epoch on the augmented training images, in percent."""
        return 100 - self.log[-1]["train_top1"]

    @property
    def val_error(self) -> float | None:
        """Validation error of the selected epoch in percent; None if nothing was held out."""
        value = self.measured["val_top1"]
        return None if value is None else 100 - value

    @property
    def test_error(self) -> float:
        """Test error of the selected epoch, in percent."""
        return 100 - self.measured["test_top1"]


def finished(run: Run) -> Outcome | None:
    """Return the outcome of an earlier run; None if the run is missing or unfinished.

    Raises:
        InputError: The folder contains a run of another net, recipe or images.
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
    """Train a net, or resume an interrupted run.

    Raises:
        InputError: The folder contains another run.
        KeyboardInterrupt: Ctrl-C; the state is saved.
    """
    before = finished(run)
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
        raise InputError(error.message, fix="choose another --out") from None
    for name, what in (("model", "a different net"), ("fingerprint", "different images")):
        if json.dumps(record[name]) != json.dumps(own[name]):
            raise InputError(
                f"{out}: its run has {what} ({record['model']['architecture']} on "
                f"{record['data']})",
                fix="choose another --out",
            )


def part(source: Source, images: int | None) -> Source:
    """Return a fixed subset of a source, evenly spread over the classes; None for all images."""
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
