"""`rtresnet train`: images to a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common

if TYPE_CHECKING:
    from rtresnet.data.sources import Source
    from rtresnet.train.distributed import World
    from rtresnet.train.loop import Job, Progress

NOT_MIRRORED = ("digits",)  # a mirrored digit is another digit, or none
LINE_SECONDS = 60  # where there is no terminal, a line this often within an epoch


@click.command("train")
@click.option("--model", help="See `rtresnet models` [resnet20, or the weights'].")
@click.option("--data", help=f"{common.DATA_HELP} [digits]")
@click.option(
    "--recipe", help="paper-cifar, paper-imagenet, modern, finetune, speed [see the README]."
)
@click.option("--epochs", type=click.IntRange(min=1), help="Length of the run [the recipe's].")
@click.option(
    "--batch", type=click.IntRange(min=2), help="Images a step [the recipe's; fewer on small sets]."
)
@click.option("--lr", type=float, help="Learning rate [the recipe's, in proportion to the batch].")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any recipe field.")
@click.option("--weights", metavar="FILE", help="Go on from a checkpoint, ours or a foreign one.")
@click.option("--flip/--no-flip", default=None, help="Mirror images [the recipe's; not digits].")
@click.option("--seed", type=click.IntRange(min=0), help="Of everything random [0].")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run [runs/MODEL-DATA].")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, or the latest.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto")
@click.option("--compile", "compiled", is_flag=True, help="Use torch.compile: slow to start.")
@click.option("--cache/--no-cache", default=True, help="Keep decoded photographs where they fit.")
@click.option(
    "--save-every", type=click.FloatRange(min=0), metavar="SECONDS",
    help="Save the state this often within an epoch [300].",
)  # fmt: skip
@click.option("--tensorboard", is_flag=True, help="Write event files too.")
@common.input_options
@common.json_option
def command(json_file: str | None, **options: Any) -> None:
    """Train a net; the test split is touched once, at the end.

    Writes best.pt, last.pt, log.jsonl, curves.png and index.html into the run's folder. Several
    GPUs: torchrun --nproc-per-node N -m rtresnet train ...
    """
    result = run(**options)
    common.write_json(json_file if result.pop("first") else None, "train", result)


def run(
    *,
    model: str | None = None,
    data: str | None = None,
    recipe: str | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    settings: tuple[str, ...] = (),
    weights: str | None = None,
    flip: bool | None = None,
    seed: int | None = None,
    out: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    compiled: bool = False,
    cache: bool = True,
    save_every: float | None = None,
    tensorboard: bool = False,
    size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes."""
    common.require_torch("training")
    from rtresnet.train import distributed, loop, recipes, state

    given = recipes.parse(settings)
    for name, value in (("epochs", epochs), ("batch", batch), ("lr", lr), ("seed", seed)):
        if value is not None:
            given[name] = value
    if flip is not None:
        given["flip"] = "random" if flip else "none"
    if compiled:
        given["compile"] = True
    write_events = _event_writer() if tensorboard else None
    with distributed.world(common.torch_device(device)) as (world, place):
        folder = world.share(out or default_folder(model, data, resume))
        resume = resume or (world.restarts > 0 and (folder / "last.pt").exists())
        state.check_folder(folder, resume)
        prepare = _resumed if resume else _fresh
        job = prepare(folder, model, data, recipe, given, weights, (size, mean, std))
        job = loop.settled(dataclasses.replace(job, device=place, cached=cache))
        if save_every is not None:
            job = dataclasses.replace(job, save_every=save_every)
        say = common.note if world.first else (lambda line: None)
        _announce(job, world, say)
        with _listeners(job, say, write_events if world.first else None) as (on_step, on_epoch):
            try:
                best = loop.train(
                    job, resume=resume, world=world, on_step=on_step, on_epoch=on_epoch, warn=say
                )
            except KeyboardInterrupt:
                if (folder / "last.pt").exists():
                    say(f"saved; go on with: rtresnet train --out {folder} --resume")
                raise
    if world.first:
        _report(folder, job, best.measured)
    return {
        "first": world.first,
        "checkpoint": str(folder / "best.pt"),
        "recipe": best.training["recipe"],
        "measured": best.measured,
        "log": str(folder / "log.jsonl"),
    }


InputOptions = tuple["int | None", "str | None", "str | None"]


def _fresh(
    folder: Path,
    model: str | None,
    data: str | None,
    recipe: str | None,
    given: dict[str, Any],
    weights: str | None,
    contract: InputOptions,
) -> Job:
    from rtresnet.models import checkpoint, zoo
    from rtresnet.preprocess import Preprocess
    from rtresnet.train import recipes
    from rtresnet.train.loop import Job

    start = checkpoint.load(weights, model=model) if weights else None
    spec = start.spec if start else zoo.spec(model or "resnet20")
    data = data or "digits"
    source, test = _sources(data)
    base = start.input if start else Preprocess.for_size(spec.size)
    preprocess = common.preprocess_from(base, *contract)
    if data in NOT_MIRRORED:
        given = {"flip": "none"} | given
    default = "speed" if preprocess.size <= recipes.SMALL else "modern"
    settings = recipes.resolve(
        recipe or ("finetune" if start else default),
        images=len(source) * 9 // 10,
        size=preprocess.size,
        depth=spec.depth,
        settings=given,
    )
    return Job(
        spec=spec, source=source, test=test, preprocess=preprocess, recipe=settings, out=folder,
        start=start,
    )  # fmt: skip


def _resumed(
    folder: Path,
    model: str | None,
    data: str | None,
    recipe: str | None,
    given: dict[str, Any],
    weights: str | None,
    contract: InputOptions,
) -> Job:
    """The run's own net, data and recipe; what is given besides must agree with them."""
    from rtresnet.errors import InputError
    from rtresnet.models import zoo
    from rtresnet.train import recipes
    from rtresnet.train.loop import Job
    from rtresnet.train.recipe import Recipe
    from rtresnet.train.state import check_same, saved_run

    saved = saved_run(folder)
    if recipe:
        given = {"name": recipes.named(recipe).name} | given
    own = Recipe(**saved.training["recipe"])
    check_same(folder, saved.training, dataclasses.replace(own, **given))
    spec = zoo.spec(model) if model else saved.spec
    preprocess = common.preprocess_from(saved.input, *contract)
    if spec.name != saved.spec.name or preprocess != saved.input:
        raise InputError(
            f"{folder}: its run is {saved.spec.name} at {saved.input.size} pixels",
            fix="leave these options out, or train into another --out",
        )
    source, test = _sources(data or saved.training["data"])
    return Job(
        spec=saved.spec, source=source, test=test, preprocess=preprocess, recipe=own, out=folder
    )


def _sources(data: str) -> tuple[Source, Source | None]:
    from rtresnet.data.sources import open_source

    source = open_source(data, "train")
    return source, open_source(data, "test") if source.splits else None


def _announce(job: Job, world: World, say: Callable[[str], None]) -> None:
    from rtresnet.train.recipes import describe

    together = f", {world.size} processes" if world.size > 1 else ""
    say(
        f"{job.spec.name} on {job.source.name}: {len(job.source)} images, "
        f"{len(job.source.classes)} classes, {job.preprocess.size} px, {job.device}{together}"
    )
    for line in describe(job.recipe):
        say(line)


@contextlib.contextmanager
def _listeners(job: Job, say: Callable[[str], None], events: Any) -> Any:
    """What shows the progress: a bar on a terminal, lines elsewhere, event files if asked."""
    writer = events(str(job.out / "tensorboard")) if events else None
    told = time.monotonic()
    with common.progress("training", total=1.0) as update:

        def on_step(p: Progress) -> None:
            nonlocal told
            text = (
                f"epoch {p.epoch + 1}  loss {p.loss:.3f}  lr {p.lr:.2g}  "
                f"{p.images_per_second:,.0f} img/s  {_clock(p.seconds_left)} left"
            )
            update(completed=p.step / p.total, description=text)
            if not common.on_terminal() and time.monotonic() - told > LINE_SECONDS:
                told = time.monotonic()
                say(f"step {p.step}/{p.total}  {text}")
            if writer:
                writer.add_scalar("loss", p.loss, p.step)
                writer.add_scalar("lr", p.lr, p.step)

        def on_epoch(record: dict[str, Any]) -> None:
            nonlocal told
            told = time.monotonic()
            val = "" if record["val_top1"] is None else f"val {record['val_top1']:6.2f} %  "
            say(
                f"epoch {record['epoch']:3d}  step {record['step']:,}  "
                f"loss {record['loss']:.4f}  train {record['train_top1']:6.2f} %  {val}"
                f"{record['images_per_second']:,.0f} img/s"
            )
            if writer:
                for name in ("train_top1", "val_top1"):
                    if record[name] is not None:
                        writer.add_scalar(name, record[name], record["step"])

        yield on_step, on_epoch
    if writer:
        writer.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _event_writer() -> Any:
    from rtresnet.errors import missing_package

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise missing_package("tensorboard", "--tensorboard") from None
    return SummaryWriter


def _report(folder: Path, job: Job, measured: dict[str, Any]) -> None:
    from rtresnet import machine

    chosen = (
        ""
        if measured["val_top1"] is None
        else f", val {measured['val_top1']:.2f} % of {measured['val_n']}"
    )
    common.out_console().print(
        f"{folder / 'best.pt'}: test top-1 {measured['test_top1']:.2f} % of {measured['test_n']} "
        f"images (epoch {measured['epoch']}{chosen})",
        soft_wrap=True,
    )
    if not machine.installed("matplotlib"):
        common.note("no curves: pip install matplotlib")
        return
    from rtresnet.report import run_page
    from rtresnet.train.recipes import describe

    run_page.write(
        folder,
        title=f"{job.spec.name} on {job.source.name}",
        recipe="\n".join(describe(job.recipe)),
        measured=measured,
    )


def default_folder(model: str | None, data: str | None, resume: bool) -> Path:
    """runs/MODEL-DATA, numbered from the second run on; with `resume` the latest there is."""
    if resume and model is None and data is None:
        states = sorted(Path("runs").glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
        if states:
            return states[-1].parent
    model, data = model or "resnet20", data or "digits"
    name = f"{model}-{re.sub(r'[^A-Za-z0-9]+', '-', data).strip('-')[-40:]}"
    taken, number = Path("runs") / name, 2
    while taken.exists():
        following = Path("runs") / f"{name}-{number}"
        if resume and not following.exists():
            return taken
        taken, number = following, number + 1
    return taken
