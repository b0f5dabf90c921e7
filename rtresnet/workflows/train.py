"""Train a net on images; start, resume and restart a run in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rtresnet.core import hardware, reporter
from rtresnet.core.errors import InputError, RtresnetError
from rtresnet.core.reporter import LogReporter, Reporter
from rtresnet.training.config import Recipe
from rtresnet.training.data_report import DataReport
from rtresnet.workflows import run_folders
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import require_torch, torch_device
from rtresnet.workflows.train_job import TrainConfig, new_job, recipe_settings, resumed_job
from rtresnet.workflows.train_log import Target, TrainProgress, open_loggers, require
from rtresnet.workflows.train_text import recipe_lines

if TYPE_CHECKING:
    from rtresnet.models.checkpoint import Checkpoint
    from rtresnet.training.config import TrainJob
    from rtresnet.training.distributed import World

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunAccuracy:
    """Accuracies of the best epoch.

    Attributes:
        epoch: From 1.
        val_top1: On the held-out images, in %; None if nothing was held out.
        val_n: Their number.
        test_top1: On the test images, in %.
        test_n: Their number.
        test_top5: In %; None with five classes or fewer.
        bn_images: Images that batch norm's statistics were recomputed from; 0 if the running ones
            were better, None if the recipe does not recompute them.
    """

    epoch: int
    val_top1: float | None
    val_n: int | None
    test_top1: float
    test_n: int
    test_top5: float | None = None
    bn_images: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run.

    Attributes:
        checkpoint: The weights of the best epoch.
        recipe: The resolved recipe.
        images: Report on the images; None for a run of an older version.
        measured: Accuracies.
        log: A JSON object for each epoch.
        page: The run's page, if one was written.
        is_main: False in all but one of several processes; only that one shows results.
        title: Net and data, for the page.
    """

    checkpoint: Path
    recipe: Recipe
    images: DataReport | None
    measured: RunAccuracy
    log: Path
    page: Path | None = None
    is_main: bool = dataclasses.field(default=True, metadata={"hidden": True})
    title: str = dataclasses.field(default="", metadata={"hidden": True})


class _Silent(LogReporter):
    """Reports nothing: for all processes but the main one."""

    def note(self, line: str) -> None:
        """Ignore a line."""

    def warning(self, title: str, body: str) -> None:
        """Ignore a warning."""


def train(
    config: TrainConfig | None = None,
    *,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> TrainResult:
    """Train a net. The test split is used once, at the end.

    Writes best.pt, last.pt and log.jsonl into the run's folder. Under torchrun, every process calls
    it with the same arguments.

    Args:
        config: What to train, on what and how.
        stated: Input of the net that replaces the default.
        reporter: Receives progress, a line for each epoch, and warnings.

    Returns:
        The checkpoint of the best epoch, its accuracy and the recipe.

    Raises:
        InputError: Unknown names, a recipe or a run that contradicts the options.
        DataError: Broken images or labels, all in one list.
        UnavailableError: torch, a device or a package is missing.
        CheckFailedError: The loss is not finite.
        LockedError: Another process trains in the folder.
    """
    config, stated = config or TrainConfig(), stated or InputConfig()
    hardware.wait_passively()
    require_torch("training")
    from rtresnet.training import distributed, loop
    from rtresnet.workflows import config_file

    extra: tuple[Target, ...] = ("tensorboard",) if config.tensorboard else ()
    targets = tuple(dict.fromkeys((*config.log, *extra)))
    require(targets)
    recipe_settings(config)  # reject invalid settings before creating a folder
    device = torch_device(config.device)
    with contextlib.ExitStack() as stack, distributed.world(device) as (world, place):
        own = reporter if world.is_main else _Silent()
        job, resume = _open_job(config, stated, world, stack, own)
        job = loop.resolve_job(dataclasses.replace(job, device=place))
        folder = job.out
        _announce(job, world, own)
        if config.threads is None and place == "cpu" and world.size == 1:
            _advise_on_threads(own)
        stack.enter_context(_threads(config.threads))
        loggers = []
        if world.is_main:
            about = {"model": job.spec.name, "data": job.source.name}
            loggers = open_loggers(targets, folder, about | dataclasses.asdict(job.recipe))
        with TrainProgress(own, loggers) as progress:

            def begin(report: DataReport) -> None:
                """Create the folder of a new run after all checks have passed."""
                if world.is_main:
                    config_file.write_config(folder / config_file.CONFIG_FILE, config, job)
                progress.data(report)

            try:
                best = loop.train(
                    job, resume=resume, world=world, warn=own.note, on_step=progress.step,
                    on_epoch=progress.epoch, on_check=progress.check, on_data=begin,
                )  # fmt: skip
            except KeyboardInterrupt:
                if (folder / "last.pt").exists():
                    own.note(f"saved; resume with: rtresnet train --out {folder} --resume")
                raise
    return _result(job, best, world)


def _open_job(
    config: TrainConfig,
    stated: InputConfig,
    world: World,
    stack: contextlib.ExitStack,
    reporter: Reporter,
) -> tuple[TrainJob, bool]:
    """Resolve the job of a new or a resumed run, and lock its folder until the stack is closed.

    Returns:
        The job, and whether its run is resumed.
    """
    from rtresnet.training import checkpointing

    new: TrainJob | None = None

    def enter() -> tuple[Path, bool]:
        """Refuse unusable options before there is a folder, which is named after the net."""
        nonlocal new
        new = None if config.resume else new_job(Path(), config, stated, reporter)
        net = new.spec.name if new else config.model
        return stack.enter_context(_folder(config, net, world, reporter))

    # The main process is the first to open the data and the weights, which it may download.
    folder, resume = _agree(world, enter)
    checkpointing.check_folder(folder, resume)
    if resume:
        job = resumed_job(folder, config, stated, reporter)
    else:
        job = new or new_job(folder, config, stated, reporter)
    changes: dict[str, Any] = {} if config.max_broken is None else {"max_broken": config.max_broken}
    job = dataclasses.replace(
        job, out=folder, cached=config.cache, decode_all=config.decode_all,
        save_every=config.save_every, workers=config.workers, **changes,
    )  # fmt: skip
    return job, resume


def _result(job: TrainJob, best: Checkpoint, world: World) -> TrainResult:
    from rtresnet.training import dataset

    names = {field.name for field in dataclasses.fields(RunAccuracy)}
    return TrainResult(
        checkpoint=job.out / "best.pt",
        recipe=Recipe(**best.training["recipe"]),
        images=dataset.saved_report(best),
        measured=RunAccuracy(**{k: v for k, v in best.measured.items() if k in names}),  # type: ignore[arg-type]
        log=job.out / "log.jsonl",
        is_main=world.is_main,
        title=f"{job.spec.name} on {job.source.name}",
    )


def _advise_on_threads(reporter: Reporter) -> None:
    """Note that other processes use cores, and a number of threads to try.

    The default does not depend on them, so that a resumed run has the same threads and bits.
    """
    cores, used = hardware.cores(), round(hardware.cores_in_use())
    if used and cores > 1:
        reporter.note(
            f"other processes use {used} of {cores} cores: while they run, "
            f"--threads {max(1, cores - used)} may train faster"
        )


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute in `count` threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _folder(
    config: TrainConfig, net: str | None, world: World, reporter: Reporter
) -> Iterator[tuple[Path, bool]]:
    """Lock the run's folder; yields it, and whether to resume the run in it.

    A restart by torchrun resumes without --resume, but only what its own launch saved.
    """
    from rtresnet.core import locks
    from rtresnet.training import checkpointing

    out, resume = config.out, config.resume
    if world.restarts and not resume:
        last = out or run_folders.latest_folder(net, config.data)
        with contextlib.suppress(InputError):  # it has no state
            if checkpointing.saved_run(last).training.get("launch") == world.launch:
                out, resume = last, True
    if out is None and resume:
        out = run_folders.latest_folder(net, config.data)
    if out is None:
        with run_folders.new_folder(net, config.data, warn=reporter.note) as folder:
            yield folder, False
    else:
        with locks.hold_folder(out, warn=reporter.note):
            yield out, resume


def _agree(world: World, decide: Callable[[], T]) -> T:
    """Return the main process's result in every process, or raise its error in every process.

    Raises:
        RtresnetError: `decide` raised one; InputError with its message in the other processes.
    """
    value: T | None = None
    error: RtresnetError | None = None
    if world.is_main:
        try:
            value = decide()
        except RtresnetError as raised:
            error = raised
    message, value = world.broadcast(((error.message, error.fix) if error else None, value))
    if message is not None:
        raise error or InputError(message[0], fix=message[1])
    return cast(T, value)


def _announce(job: TrainJob, world: World, reporter: Reporter) -> None:
    """Note the net, the data and the resolved recipe."""
    from rtresnet.core.reporter import plural
    from rtresnet.data.sources import ignored_files
    from rtresnet.training import recipes
    from rtresnet.training.loader import training_images

    processes = f", {world.size} processes" if world.size > 1 else ""
    reporter.note(
        f"{job.spec.name} on {job.source.name}: {plural(len(job.source), 'image')}, "
        f"{plural(len(job.source.classes), 'class')}, {job.preprocess.size} px, "
        f"{job.device}{processes}"
    )
    for source in (job.source, job.test):
        for line in ignored_files(source) if source else ():
            reporter.note(f"warning: {line}")
    for line in job.start.assumed if job.start else ():
        reporter.note(f"Assumed about the weights: {line}.")
    for line in recipe_lines(job.recipe):
        reporter.note(line)
    for line in recipes.advice(job.recipe, training_images(job.source, job.recipe)):
        reporter.note(f"warning: {line}")
    if job.teacher is not None:
        reporter.note(f"teacher: {job.teacher.model.architecture}")
