"""Train a net on images; start, resume and restart a run in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from rtresnet.core import hardware, reporter
from rtresnet.core.config import Config, option, options_of, parse_percentage
from rtresnet.core.errors import InputError
from rtresnet.core.precisions import CALIBRATED, PrecisionName
from rtresnet.core.reporter import LogReporter, Reporter
from rtresnet.data import DATA_HELP
from rtresnet.training.config import SAVE_SECONDS, Recipe
from rtresnet.training.data_report import DataReport
from rtresnet.workflows import run_folders
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import require_torch, torch_device
from rtresnet.workflows.train_log import (
    Target,
    TrainProgress,
    open_loggers,
    parse_targets,
    require,
)
from rtresnet.workflows.train_text import recipe_lines

if TYPE_CHECKING:
    from rtresnet.data.sources import Source
    from rtresnet.models.checkpoint import Checkpoint
    from rtresnet.training.config import TrainJob
    from rtresnet.training.distributed import World

T = TypeVar("T")

NOT_MIRRORED = ("digits",)  # a mirrored digit is not the same digit
IMAGENET_DEFAULT = "resnet18"  # the net of --weights imagenet
DISTILL = 0.5  # share of the teacher in the loss
# Fields of the recipe that have their own options.
RECIPE_FIELDS = ("epochs", "batch", "lr", "seed", "patience", "balance", "layer_decay", "freeze")


def recipe_option(name: str) -> Any:
    """Return an option for a field of the recipe; None keeps the recipe's value."""
    about = {field.name: about for field, _, about in options_of(Recipe)}[name]
    return option(
        None, about.help, minimum=about.minimum, maximum=about.maximum,
        default_text="the recipe's",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Options of `train`. None uses the default in the help text.

    Attributes:
        settings: Fields of the recipe, each "FIELD=VALUE".
        max_broken: Share of broken images, in [0, 1], up to which training continues without them.
        save_every: Seconds between saves of the state within an epoch.
    """

    model: str | None = option(
        None,
        "Architecture, one of those that `rtresnet models` lists.",
        default_text="resnet20; with --weights their net, or resnet18 for imagenet",
    )
    data: str | None = option(None, f"Images: {DATA_HELP}", default_text="digits")
    recipe: str | None = option(
        None,
        "Recipe: paper-cifar, paper-imagenet, modern, finetune, qat or speed.",
        default_text="speed up to 64 pixels, else modern; finetune with --weights",
    )
    epochs: int | None = option(
        None, "Length of the run in epochs.", minimum=1, default_text="the recipe's"
    )
    batch: int | None = option(
        None,
        "Images in a step, at most the number of training images.",
        minimum=2,
        default_text="the recipe's; fewer on small sets",
    )
    lr: float | None = option(
        None,
        "Learning rate, at most 100.",
        minimum=1e-12,
        maximum=100,
        default_text="the recipe's, in proportion to the batch up to 3.2",
    )
    settings: tuple[str, ...] = option(
        (),
        "Set a field of the recipe; repeat it for more.",
        names=("--set",),
        metavar="FIELD=VALUE",
    )
    weights: str | None = option(
        None,
        "Start from a checkpoint of rtresnet or another tool, from torchvision's ImageNet weights, "
        "or from a Hugging Face repository.",
        metavar="FILE|imagenet|hf:OWNER/NAME",
    )
    qat: bool = option(False, "Quantization-aware fine-tuning of --weights for INT8 or FP8.")
    precision: Literal["auto", PrecisionName] | None = option(
        None,
        "Precision of forward and backward pass; int8 or fp8 with --qat: the number format to "
        "train for.",
        default_text="the recipe's, with --qat int8",
    )
    flip: bool | None = option(
        None,
        "Flip images horizontally at random.",
        names=("--flip/--no-flip",),
        default_text="the recipe's; never digits",
    )
    seed: int | None = option(None, "Random seed.", minimum=0, default_text="0")
    out: Path | None = option(
        None, "Folder of the run.", default_text="a new folder runs/MODEL-DATA"
    )
    resume: bool = option(False, "Resume the run in --out, or the latest one.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Device to train on.")
    compile: bool = option(False, "Compile the net with torch.compile, which is slow to start.")
    cache: bool = option(
        True, "Keep decoded photographs in memory if they fit.", names=("--cache/--no-cache",)
    )
    save_every: float = option(
        SAVE_SECONDS,
        "Seconds between saves of the state within an epoch.",
        metavar="SECONDS",
        minimum=0,
    )
    max_broken: float | None = option(
        None,
        "Allowed share of broken images, which are ignored; with more, training fails.",
        metavar="N%",
        parse=parse_percentage,
        default_text="0%",
    )
    decode_all: bool = option(
        False,
        "Decode every image before the first epoch, also images that do not fit into memory.",
    )
    patience: int | None = recipe_option("patience")
    balance: Literal["none", "loss", "sampling"] | None = recipe_option("balance")
    layer_decay: float | None = recipe_option("layer_decay")
    freeze: int | None = recipe_option("freeze")
    teacher: str | None = option(
        None,
        "Distill from a trained net with the same classes; half of the loss uses its outputs "
        "(--set distill, temperature).",
        metavar="FILE|hf:OWNER/NAME",
    )
    threads: int | None = option(
        None, "Number of compute threads.", minimum=1, maximum=1024, default_text="one per core"
    )
    workers: int | None = option(
        None,
        "Number of decoding threads.",
        minimum=1,
        maximum=1024,
        default_text="one per core",
    )
    log: tuple[Target, ...] = option(
        (),
        "Log to tensorboard, mlflow or wandb, separated by commas, through their packages.",
        metavar="NAME,...",
        parse=parse_targets,
        default_text="none",
    )
    tensorboard: bool = option(False, "Same as --log tensorboard.")


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
    from rtresnet.training import checkpointing, dataset, distributed, loop
    from rtresnet.workflows import config_file

    extra: tuple[Target, ...] = ("tensorboard",) if config.tensorboard else ()
    targets = tuple(dict.fromkeys((*config.log, *extra)))
    require(targets)
    _recipe_settings(config)  # reject invalid settings before creating a folder
    device = torch_device(config.device)
    with contextlib.ExitStack() as stack, distributed.world(device) as (world, place):

        def enter() -> tuple[Path, bool]:
            """Refuses unusable weights before there is a folder, which is named after their net."""
            start = None if config.resume else _start(config, reporter)
            net = start.spec.name if start else config.model
            return stack.enter_context(_folder(config, net, world, reporter))

        folder, resume = _agree(world, enter)
        checkpointing.check_folder(folder, resume)
        own = reporter if world.is_main else _Silent()
        job = (
            _resumed(folder, config, stated, own)
            if resume
            else new_job(folder, config, stated, own)
        )
        changes: dict[str, Any] = {} if config.max_broken is None else {
            "max_broken": config.max_broken
        }  # fmt: skip
        job = loop.resolve_job(
            dataclasses.replace(
                job, device=place, cached=config.cache, decode_all=config.decode_all,
                save_every=config.save_every, workers=config.workers, **changes,
            )
        )  # fmt: skip
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
    names = {field.name for field in dataclasses.fields(RunAccuracy)}
    return TrainResult(
        checkpoint=folder / "best.pt",
        recipe=Recipe(**best.training["recipe"]),
        images=dataset.saved_report(best),
        measured=RunAccuracy(**{k: v for k, v in best.measured.items() if k in names}),  # type: ignore[arg-type]
        log=folder / "log.jsonl",
        is_main=world.is_main,
        title=f"{job.spec.name} on {job.source.name}",
    )


def _recipe_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the fields of the recipe that the options set."""
    from rtresnet.training import recipes

    fields = recipes.parse(config.settings)
    fields |= {n: value for n in RECIPE_FIELDS if (value := getattr(config, n)) is not None}
    fields |= {name: True for name in ("compile", "qat") if getattr(config, name)}
    if config.precision in CALIBRATED:
        fields["qat_format"] = config.precision
    elif config.precision is not None:
        fields["precision"] = config.precision
    if config.teacher is not None:
        fields.setdefault("distill", DISTILL)
    if config.flip is not None:
        fields["flip"] = "random" if config.flip else "none"
    return fields


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
        InputError: `decide` raised one.
    """
    value: T | None = None
    error: InputError | None = None
    if world.is_main:
        try:
            value = decide()
        except InputError as raised:
            error = raised
    message, value = world.broadcast(((error.message, error.fix) if error else None, value))
    if message is not None:
        raise error or InputError(message[0], fix=message[1])
    return cast(T, value)


def new_job(
    folder: Path,
    config: TrainConfig,
    stated: InputConfig,
    reporter: Reporter = reporter.DEFAULT,
) -> TrainJob:
    """Resolve a config to a new run's net, data and recipe.

    Args:
        folder: Folder of the run.
        config: What to train.
        stated: Input of the net that replaces the default.
        reporter: Receives the progress of downloads.
    """
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.models import zoo
    from rtresnet.training import recipes
    from rtresnet.training.config import TrainJob

    settings = _recipe_settings(config)
    start = _start(config, reporter)
    spec = start.spec if start else zoo.spec(config.model or "resnet20")
    data = config.data or "digits"
    source, test = _sources(data)
    preprocess = stated.applied_to(start.input if start else Preprocess.for_size(spec.size))
    default = "speed" if preprocess.size <= recipes.SMALL_IMAGE else "modern"
    name = config.recipe or ("qat" if settings.get("qat") else "finetune" if start else default)
    if config.precision in CALIBRATED and not settings.get("qat", recipes.named(name).qat):
        raise InputError(
            f"--precision {config.precision} is for quantization-aware training", fix="add --qat"
        )
    images = len(source) * 9 // 10
    if settings.get("batch", 0) > images:
        raise InputError(
            f"a batch of {settings['batch']} images: {data} has about {images} training images",
            fix=f"--batch {min(images, 64)}",
        )
    recipe = recipes.resolve(
        name,
        images=images,
        size=preprocess.size,
        depth=spec.depth,
        settings=({"flip": "none"} if data in NOT_MIRRORED else {}) | settings,
    )
    return TrainJob(
        spec=spec, source=source, test=test, preprocess=preprocess, recipe=recipe, out=folder,
        start=start, teacher=_teacher(config.teacher, None, reporter),
    )  # fmt: skip


def _start(config: TrainConfig, reporter: Reporter) -> Checkpoint | None:
    """Return the weights to start from."""
    from rtresnet.models import checkpoint, download

    if config.weights is None:
        return None
    model = config.model or (IMAGENET_DEFAULT if config.weights == "imagenet" else None)
    named = download.published(config.weights, model, reporter)
    return named or checkpoint.load(config.weights, model=config.model)


def _resumed(
    folder: Path, config: TrainConfig, stated: InputConfig, reporter: Reporter
) -> TrainJob:
    """Return the run's own net, data and recipe; the options must agree with them."""
    from rtresnet.data.loader import TOLERATED
    from rtresnet.models import zoo
    from rtresnet.training import checkpointing, recipes
    from rtresnet.training.config import TrainJob

    saved = checkpointing.saved_run(folder)
    name = {"name": recipes.named(config.recipe).name} if config.recipe else {}
    recipe = Recipe(**saved.training["recipe"])
    options = dataclasses.replace(recipe, **(name | _recipe_settings(config)))
    checkpointing.check_same_recipe(folder, saved.training["recipe"], options)
    spec = zoo.spec(config.model) if config.model else saved.spec
    if spec.name != saved.spec.name or stated.applied_to(saved.input) != saved.input:
        raise InputError(
            f"{folder}: its run is {saved.spec.name} at {saved.input.size} pixels",
            fix="leave these options out, or train into another --out",
        )
    source, test = _sources(config.data or saved.training["data"])
    # Versions without a report on the images allowed 1 %.
    max_broken = saved.training.get("images", {"max_broken": TOLERATED})["max_broken"]
    return TrainJob(
        spec=saved.spec, source=source, test=test, preprocess=saved.input, recipe=recipe,
        out=folder, max_broken=max_broken,
        teacher=_teacher(config.teacher, saved.training.get("teacher"), reporter),
    )  # fmt: skip


def _teacher(
    name: str | None, recorded: dict[str, Any] | None, reporter: Reporter
) -> Checkpoint | None:
    """Return the teacher of a run, by name or as its state records it."""
    from rtresnet.models import checkpoint, download

    if name is None and recorded is None:
        return None
    if name is None:
        assert recorded is not None
        hub = download.HUB if recorded["origin"] == "huggingface" else ""
        name = f"{hub}{recorded['source']}"
    teacher = download.published(name, None, reporter) or checkpoint.load(name)
    if recorded is not None and teacher.weights.sha256 != recorded["sha256"]:
        raise InputError(f"{name}: differs from the teacher that the run started with")
    return teacher


def _sources(data: str) -> tuple[Source, Source | None]:
    from rtresnet.data.sources import open_source

    source = open_source(data, "train")
    return source, open_source(data, "test") if source.splits else None


def _announce(job: TrainJob, world: World, reporter: Reporter) -> None:
    """Note the net, the data and the resolved recipe."""
    from rtresnet.core.reporter import plural
    from rtresnet.data.sources import ignored_files
    from rtresnet.training import recipes

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
    for line in recipes.advice(job.recipe, len(job.source) * 9 // 10):
        reporter.note(f"warning: {line}")
    if job.teacher is not None:
        reporter.note(f"teacher: {job.teacher.model.architecture}")
