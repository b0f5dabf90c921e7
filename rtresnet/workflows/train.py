"""Train a net on images; start, resume and restart a run in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from rtresnet.core import reporter
from rtresnet.core.config import Config, option
from rtresnet.core.errors import InputError, missing_package
from rtresnet.core.reporter import Reporter, Update, escape_cell
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import require_torch, torch_device

if TYPE_CHECKING:
    from rtresnet.data.sources import Source
    from rtresnet.models.checkpoint import Checkpoint
    from rtresnet.training.config import Progress, TrainJob
    from rtresnet.training.dataset import DataReport
    from rtresnet.training.distributed import World

T = TypeVar("T")

NOT_MIRRORED = ("digits",)  # a mirrored digit is another digit, or none
CLASSES = 20  # up to so many are listed one by one
CHECKS = {
    "arrays": "the images come as arrays, which cannot be broken",
    "decoded": "every image was decoded",
    "files": "the beginning and the end of every file was read; --decode-all decodes every image",
}
DATA_HELP = (
    "digits, fashion-mnist:DIR, cifar10:DIR, folder:DIR (or DIR), shards:DIR, npz:FILE, "
    "synthetic:N. Transparent images are composited on white."
)


def parse_percentage(text: str) -> float:
    """Reads "2", "2%" or "0.5 %" as a share in [0, 1].

    Raises:
        InputError: Not a percentage.
    """
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InputError("not a percentage from 0 to 100", fix="as in 1%")
    return share


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """What to train, on what and how. None takes the default in the help text.

    Attributes:
        settings: Fields of the recipe, each "FIELD=VALUE".
        max_broken: Share of broken images, in [0, 1], up to which training goes on without them.
        save_every: Seconds between saves of the state within an epoch.
    """

    model: str | None = option(
        None,
        "Architecture, one of those that `rtresnet models` lists.",
        default_text="resnet20, or the weights'",
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
        "Images in a step.",
        minimum=2,
        default_text="the recipe's; fewer on small sets",
    )
    lr: float | None = option(
        None, "Learning rate.", default_text="the recipe's, in proportion to the batch"
    )
    settings: tuple[str, ...] = option(
        (),
        "Set a field of the recipe; repeat it for more.",
        names=("--set",),
        metavar="FIELD=VALUE",
    )
    weights: str | None = option(
        None, "Start from a checkpoint, from rtresnet or another tool.", metavar="FILE"
    )
    qat: bool = option(False, "Quantization-aware fine-tuning of --weights for INT8.")
    flip: bool | None = option(
        None,
        "Mirror images at random.",
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
        True, "Keep decoded photographs in memory where they fit.", names=("--cache/--no-cache",)
    )
    save_every: float | None = option(
        None,
        "Seconds between saves of the state within an epoch.",
        metavar="SECONDS",
        minimum=0,
        default_text="300",
    )
    max_broken: float | None = option(
        None,
        "Share of broken images up to which training goes on without them.",
        metavar="N%",
        parse=parse_percentage,
        default_text="0%",
    )
    decode_all: bool = option(
        False,
        "Decode every image before the first epoch, also images that do not fit into memory.",
    )
    tensorboard: bool = option(False, "Write TensorBoard event files too.")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run.

    Attributes:
        checkpoint: The weights of the best epoch.
        recipe: As it was used.
        images: Counts of images per class and split; None where they come from an older version.
        measured: Epoch, top-1 on held-out and test images in %, and their numbers.
        log: A JSON object for each epoch.
        page: The run's page, where one was written.
        is_main: False in all but one of several processes; only that one has something to show.
        title: Net and data, for the page.
        details: Recipe, and counts of images, as text for the page.
    """

    checkpoint: Path
    recipe: dict[str, Any]
    images: dict[str, Any] | None
    measured: dict[str, Any]
    log: Path
    page: Path | None = None
    is_main: bool = dataclasses.field(default=True, metadata={"hidden": True})
    title: str = dataclasses.field(default="", metadata={"hidden": True})
    details: tuple[str, str | None] = dataclasses.field(
        default=("", None), metadata={"hidden": True}
    )


def train(
    config: TrainConfig | None = None,
    *,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> TrainResult:
    """Trains a net; the test split is used once, at the end.

    Writes best.pt, last.pt and log.jsonl into the run's folder. Under torchrun, every process calls
    it with the same arguments.

    Args:
        config: What to train, on what and how.
        stated: Input of the net, in place of the usual one.
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
    require_torch("training")
    from rtresnet.training import distributed, loop, run_state
    from rtresnet.training.config import resolve_job

    writer = _event_writer() if config.tensorboard else None
    request = _Request(config=config, fields=_recipe_fields(config), stated=stated)
    device = torch_device(config.device)
    with contextlib.ExitStack() as locks, distributed.world(device) as (world, place):
        folder, resume = _agree(
            world, lambda: locks.enter_context(_folder(config, world, reporter))
        )
        run_state.check_folder(folder, resume)
        job = _resumed(folder, request) if resume else _fresh(folder, request)
        job = resolve_job(dataclasses.replace(job, device=place, cached=config.cache))
        changes = {"save_every": config.save_every, "max_broken": config.max_broken}
        given = {name: value for name, value in changes.items() if value is not None}
        job = dataclasses.replace(job, decode_all=config.decode_all, **given)  # type: ignore[arg-type]
        own = reporter if world.is_main else _SILENT
        _announce(job, world, own)
        events = writer(str(folder / "tensorboard")) if writer and world.is_main else None
        with _Progress(own, events) as shown:
            try:
                best = loop.train(
                    job, resume=resume, world=world, warn=own.note, on_step=shown.step,
                    on_epoch=shown.epoch, on_check=shown.check, on_data=shown.data,
                )  # fmt: skip
            except KeyboardInterrupt:
                if (folder / "last.pt").exists():
                    own.note(f"saved; go on with: rtresnet train --out {folder} --resume")
                raise
    return _result(folder, job, best, is_main=world.is_main)


def _result(folder: Path, job: TrainJob, best: Checkpoint, *, is_main: bool) -> TrainResult:
    from rtresnet.training.dataset import saved_report
    from rtresnet.training.recipes import describe

    images = saved_report(best)
    return TrainResult(
        checkpoint=folder / "best.pt",
        recipe=best.training["recipe"],
        images=best.training.get("images"),
        measured=best.measured,
        log=folder / "log.jsonl",
        is_main=is_main,
        title=f"{job.spec.name} on {job.source.name}",
        details=(
            "\n".join(describe(job.recipe)),
            None if images is None else "\n".join(data_lines(images)),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What is asked for, with the fields of the recipe that the config sets."""

    config: TrainConfig
    fields: dict[str, Any]
    stated: InputConfig


def _recipe_fields(config: TrainConfig) -> dict[str, Any]:
    from rtresnet.training import recipes

    fields = recipes.parse(config.settings)
    for name in ("epochs", "batch", "lr", "seed"):
        if (value := getattr(config, name)) is not None:
            fields[name] = value
    if config.flip is not None:
        fields["flip"] = "random" if config.flip else "none"
    return fields | {name: True for name in ("compile", "qat") if getattr(config, name)}


@contextlib.contextmanager
def _folder(config: TrainConfig, world: World, reporter: Reporter) -> Iterator[tuple[Path, bool]]:
    """Locks the run's folder; yields it, and whether to resume the run in it.

    Restarted by torchrun, a run is resumed without --resume, but only what its own launch saved.
    """
    from rtresnet.core import locks
    from rtresnet.training import run_folder
    from rtresnet.training.run_state import launch_of

    out, resume = config.out, config.resume
    if world.restarts and not resume:
        last = out or run_folder.latest(config.model, config.data)
        if launch_of(last) == world.launch:
            out, resume = last, True
    if out is None and resume:
        out = run_folder.latest(config.model, config.data)
    if out is None:
        with run_folder.new(config.model, config.data, warn=reporter.note) as folder:
            yield folder, False
    else:
        with locks.hold_folder(out, warn=reporter.note):
            yield out, resume


def _agree(world: World, decide: Callable[[], T]) -> T:
    """What rank 0 decides, in every process; also where that is an error.

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


def _fresh(folder: Path, request: _Request) -> TrainJob:
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.models import checkpoint, zoo
    from rtresnet.training import recipes, run_state
    from rtresnet.training.config import TrainJob

    config = request.config
    start = checkpoint.load(config.weights, model=config.model) if config.weights else None
    spec = start.spec if start else zoo.spec(config.model or "resnet20")
    data = config.data or "digits"
    source, test = _sources(data)
    preprocess = request.stated.applied_to(start.input if start else Preprocess.for_size(spec.size))
    default = "speed" if preprocess.size <= recipes.SMALL else "modern"
    default = "qat" if request.fields.get("qat") else "finetune" if start else default
    recipe = recipes.resolve(
        config.recipe or default,
        images=len(source) * 9 // 10,
        size=preprocess.size,
        depth=spec.depth,
        settings=({"flip": "none"} if data in NOT_MIRRORED else {}) | request.fields,
    )
    run_state.check_start(recipe, start)
    return TrainJob(
        spec=spec, source=source, test=test, preprocess=preprocess, recipe=recipe, out=folder,
        start=start,
    )  # fmt: skip


def _resumed(folder: Path, request: _Request) -> TrainJob:
    """The run's own net, data and recipe; the options must agree with them."""
    from rtresnet.data.loader import TOLERATED
    from rtresnet.models import zoo
    from rtresnet.training import recipes
    from rtresnet.training.config import TrainJob
    from rtresnet.training.recipe import Recipe
    from rtresnet.training.run_state import check_same, saved_run

    config = request.config
    saved = saved_run(folder)
    name = {"name": recipes.named(config.recipe).name} if config.recipe else {}
    recipe = Recipe(**saved.training["recipe"])
    check_same(folder, saved.training, dataclasses.replace(recipe, **(name | request.fields)))
    spec = zoo.spec(config.model) if config.model else saved.spec
    if spec.name != saved.spec.name or request.stated.applied_to(saved.input) != saved.input:
        raise InputError(
            f"{folder}: its run is {saved.spec.name} at {saved.input.size} pixels",
            fix="leave these options out, or train into another --out",
        )
    source, test = _sources(config.data or saved.training["data"])
    # Versions before the check of images tolerated a hundredth.
    max_broken = saved.training.get("images", {"max_broken": TOLERATED})["max_broken"]
    return TrainJob(
        spec=saved.spec, source=source, test=test, preprocess=saved.input, recipe=recipe,
        out=folder, max_broken=max_broken,
    )  # fmt: skip


def _sources(data: str) -> tuple[Source, Source | None]:
    from rtresnet.data.sources import open_source

    source = open_source(data, "train")
    return source, open_source(data, "test") if source.splits else None


def _announce(job: TrainJob, world: World, reporter: Reporter) -> None:
    """Notes the net, the data and the recipe as it is used."""
    from rtresnet.training.recipes import describe

    together = f", {world.size} processes" if world.size > 1 else ""
    reporter.note(
        f"{job.spec.name} on {job.source.name}: {len(job.source)} images, "
        f"{len(job.source.classes)} classes, {job.preprocess.size} px, {job.device}{together}"
    )
    for line in job.start.assumed if job.start else ():
        reporter.note(f"Assumed of the weights: {line}.")
    for line in describe(job.recipe):
        reporter.note(line)


def data_lines(report: DataReport) -> list[str]:
    """Images per class and split, how they were checked, and warnings about them."""
    splits, lines = ("train", "val", "test"), []
    if len(report.classes) <= CLASSES:
        rows: list[tuple[str, Sequence[str]]] = [("images", splits)]
        for label, name in enumerate(report.classes):
            rows.append(
                (escape_cell(name), [f"{report.counts[split][label]:,}" for split in splits])
            )
        rows.append(("all", [f"{sum(report.counts[split]):,}" for split in splits]))
        width = max(len(name) for name, _ in rows)
        lines += [f"{name:{width}}" + "".join(f"  {c:>9}" for c in cells) for name, cells in rows]
    else:
        for split in splits:
            ordered = sorted(report.counts[split])
            lines.append(
                f"{split}: {sum(ordered):,} images, {ordered[0]:,} to {ordered[-1]:,} a class, "
                f"median {ordered[len(ordered) // 2]:,}"
            )
    lines.append(f"checked: {CHECKS[report.check]}")
    if any(report.broken.values()):
        counts = " and ".join(f"{len(e)} of {name}" for name, e in report.broken.items() if e)
        lines.append(f"left out, because they cannot be decoded: {counts}")
    if report.transparent:
        lines.append(f"composited on white: {report.transparent:,} images with transparency")
    return lines + [f"warning: {escape_cell(line)}" for line in report.warnings()]


class _Progress:
    """Shows a run through the reporter, and writes event files.

    Args:
        reporter: Receives a bar for each stage, and a line for each epoch.
        events: TensorBoard's writer, or None.
    """

    def __init__(self, reporter: Reporter, events: Any) -> None:
        self._reporter, self._events = reporter, events
        self._stage, self._bar = "", contextlib.ExitStack()
        self._update: Update | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._events:
            self._events.close()

    def _show(self, stage: str, done: float, text: str | None = None) -> None:
        """Moves the stage's bar, which replaces the bar of the stage before."""
        if stage != self._stage or self._update is None:
            self._bar.close()
            self._stage = stage
            self._update = self._bar.enter_context(self._reporter.progress(stage, total=1.0))
        self._update(completed=done, description=text)

    def check(self, done: int, total: int) -> None:
        """Called while the images are checked."""
        self._show(f"checking {total:,} images", done / total)

    def data(self, report: DataReport) -> None:
        """Called once the images are checked."""
        for line in data_lines(report):
            self._reporter.note(line)

    def step(self, progress: Progress) -> None:
        """Called after every step."""
        text = (
            f"epoch {progress.epoch + 1}  loss {progress.loss:.3f}  lr {progress.lr:.2g}  "
            f"{progress.images_per_second:,.0f} img/s"
        )
        self._show("training", progress.step / progress.total, text)
        if self._events:
            self._events.add_scalar("loss", progress.loss, progress.step)
            self._events.add_scalar("lr", progress.lr, progress.step)

    def epoch(self, record: dict[str, Any]) -> None:
        """Called after every epoch."""
        val = "" if record["val_top1"] is None else f"val {record['val_top1']:6.2f} %  "
        self._reporter.note(
            f"epoch {record['epoch']:3d}  step {record['step']:,}  "
            f"loss {record['loss']:.4f}  train {record['train_top1']:6.2f} %  {val}"
            f"{record['images_per_second']:,.0f} img/s"
        )
        for name in ("train_top1", "val_top1"):
            if self._events and record[name] is not None:
                self._events.add_scalar(name, record[name], record["step"])


def _event_writer() -> Any:
    """TensorBoard's writer, or UnavailableError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise missing_package("tensorboard", "--tensorboard") from None
    return SummaryWriter


class _Silent:
    """The reporter of all processes but the first: says nothing."""

    @contextlib.contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator[Update]:
        """Ignores progress."""

        def ignore(
            completed: float | None = None,
            description: str | None = None,
            total: float | None = None,
        ) -> None:
            pass

        yield ignore

    def note(self, line: str) -> None:
        """Ignores a line."""

    def warning(self, title: str, body: str) -> None:
        """Ignores a warning."""


_SILENT: Reporter = _Silent()
