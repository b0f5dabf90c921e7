"""`rtresnet train`: images to a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from rtresnet.cli import common, train_show

if TYPE_CHECKING:
    from rtresnet.data.sources import Source
    from rtresnet.training.config import Job
    from rtresnet.training.distributed import World

T = TypeVar("T")

NOT_MIRRORED = ("digits",)  # a mirrored digit is another digit, or none


@click.command("train")
@click.option("--model", help="See `rtresnet models` [resnet20, or the weights'].")
@click.option("--data", help=f"{common.DATA_HELP} [digits]")
@click.option(
    "--recipe", help="paper-cifar, paper-imagenet, modern, finetune, qat, speed [see the README]."
)
@click.option("--epochs", type=click.IntRange(min=1), help="Length of the run [the recipe's].")
@click.option(
    "--batch", type=click.IntRange(min=2), help="Images a step [the recipe's; fewer on small sets]."
)
@click.option("--lr", type=float, help="Learning rate [the recipe's, in proportion to the batch].")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any recipe field.")
@click.option("--weights", metavar="FILE", help="Go on from a checkpoint, ours or a foreign one.")
@click.option(
    "--qat", is_flag=True, help="Fine-tune --weights for INT8: its rounding is trained with."
)
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
@common.max_broken_option
@click.option(
    "--decode-all", is_flag=True,
    help="Decode every image before the first epoch. By default, images that do not fit into "
    "memory are only checked at the beginning and end of their files.",
)  # fmt: skip
@click.option("--tensorboard", is_flag=True, help="Write event files too.")
@common.input_options
@common.json_option
def command(json_file: str | None, **options: Any) -> None:
    """Train a net; the test split is touched once, at the end.

    Before the first epoch the images are checked: counts per class, broken files, identical images
    in two splits. All broken files are listed, in broken.txt in the run's folder too.

    Writes best.pt, last.pt, log.jsonl, curves.png and index.html into the run's folder. Several
    GPUs: torchrun --nproc-per-node N -m rtresnet train ...
    """
    result = run(**options)
    if result["first"]:
        train_show.next_steps(result)
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
    qat: bool = False,
    flip: bool | None = None,
    seed: int | None = None,
    out: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    compiled: bool = False,
    cache: bool = True,
    save_every: float | None = None,
    max_broken: float | None = None,
    decode_all: bool = False,
    tensorboard: bool = False,
    size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes."""
    common.require_torch("training")
    from rtresnet.training import distributed, loop, recipes, run_state
    from rtresnet.training.config import settled

    given = recipes.parse(settings)
    for name, value in (("epochs", epochs), ("batch", batch), ("lr", lr), ("seed", seed)):
        if value is not None:
            given[name] = value
    if flip is not None:
        given["flip"] = "random" if flip else "none"
    if compiled:
        given["compile"] = True
    if qat:
        given["qat"] = True
    write_events = train_show.event_writer() if tensorboard else None
    asked = _Asked(
        model=model, data=data, recipe=recipe, fields=given, weights=weights,
        contract=(size, mean, std),
    )  # fmt: skip
    with contextlib.ExitStack() as held, distributed.world(common.torch_device(device)) as joined:
        world, place = joined
        folder, resume = _agree(
            world, lambda: held.enter_context(_folder(out, asked, resume, world))
        )
        run_state.check_folder(folder, resume)
        job = _resumed(folder, asked) if resume else _fresh(folder, asked)
        job = settled(dataclasses.replace(job, device=place, cached=cache))
        job = dataclasses.replace(job, decode_all=decode_all)
        if save_every is not None:
            job = dataclasses.replace(job, save_every=save_every)
        if max_broken is not None:
            job = dataclasses.replace(job, max_broken=max_broken)
        say = common.note if world.first else (lambda line: None)
        train_show.announce(job, world, say)
        silent = contextlib.nullcontext(train_show.Listeners())
        shown = train_show.listeners(job, say, write_events) if world.first else silent
        with shown as on:
            try:
                best = loop.train(
                    job, resume=resume, world=world, warn=say,
                    on_step=on.step, on_epoch=on.epoch, on_check=on.check, on_data=on.data,
                )  # fmt: skip
            except KeyboardInterrupt:
                if (folder / "last.pt").exists():
                    say(f"saved; go on with: rtresnet train --out {folder} --resume")
                raise
        page = train_show.report(folder, job, best) if world.first else None
    return {
        "first": world.first,
        "checkpoint": str(folder / "best.pt"),
        "recipe": best.training["recipe"],
        "images": best.training.get("images"),
        "measured": best.measured,
        "log": str(folder / "log.jsonl"),
        "page": str(page) if page else None,
    }


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What the options say; None where they say nothing.

    Attributes:
        fields: Of the recipe.
        contract: Size, mean and std of the input.
    """

    model: str | None
    data: str | None
    recipe: str | None
    fields: dict[str, Any]
    weights: str | None
    contract: tuple[int | None, str | None, str | None]


@contextlib.contextmanager
def _folder(
    out: Path | None, asked: _Asked, resume: bool, world: World
) -> Iterator[tuple[Path, bool]]:
    """Locks the run's folder; yields it, and whether to resume the run in it.

    Restarted by torchrun, a run is resumed without --resume, but only what its own launch saved.
    """
    from rtresnet.core import locks
    from rtresnet.training import run_folder
    from rtresnet.training.run_state import launch_of

    if world.restarts and not resume:
        last = out or run_folder.latest(asked.model, asked.data)
        if launch_of(last) == world.launch:
            out, resume = last, True
    if out is None and resume:
        out = run_folder.latest(asked.model, asked.data)
    if out is None:
        with run_folder.new(asked.model, asked.data, warn=common.note) as folder:
            yield folder, False
    else:
        with locks.hold_folder(out, warn=common.note):
            yield out, resume


def _agree(world: World, decide: Callable[[], T]) -> T:
    """What rank 0 decides, in every process; also where that is an error.

    Raises:
        InputError: `decide` raised one.
    """
    from rtresnet.core.errors import InputError

    value: T | None = None
    error: InputError | None = None
    if world.first:
        try:
            value = decide()
        except InputError as raised:
            error = raised
    message, value = world.share(((error.message, error.fix) if error else None, value))
    if message is not None:
        raise error or InputError(message[0], fix=message[1])
    return cast(T, value)


def _fresh(folder: Path, asked: _Asked) -> Job:
    from rtresnet.core.preprocess import Preprocess
    from rtresnet.models import checkpoint, zoo
    from rtresnet.training import recipes, run_state
    from rtresnet.training.config import Job

    start = checkpoint.load(asked.weights, model=asked.model) if asked.weights else None
    spec = start.spec if start else zoo.spec(asked.model or "resnet20")
    data = asked.data or "digits"
    source, test = _sources(data)
    base = start.input if start else Preprocess.for_size(spec.size)
    preprocess = common.preprocess_from(base, *asked.contract)
    fixed = {"flip": "none"} if data in NOT_MIRRORED else {}
    default = "speed" if preprocess.size <= recipes.SMALL else "modern"
    settings = recipes.resolve(
        asked.recipe or ("qat" if asked.fields.get("qat") else "finetune" if start else default),
        images=len(source) * 9 // 10,
        size=preprocess.size,
        depth=spec.depth,
        settings=fixed | asked.fields,
    )
    run_state.check_start(settings, start)
    return Job(
        spec=spec, source=source, test=test, preprocess=preprocess, recipe=settings, out=folder,
        start=start,
    )  # fmt: skip


def _resumed(folder: Path, asked: _Asked) -> Job:
    """The run's own net, data and recipe; what is asked for besides must agree with them."""
    from rtresnet.core.errors import InputError
    from rtresnet.data.loader import TOLERATED
    from rtresnet.models import zoo
    from rtresnet.training import recipes
    from rtresnet.training.config import Job
    from rtresnet.training.recipe import Recipe
    from rtresnet.training.run_state import check_same, saved_run

    saved = saved_run(folder)
    name = {"name": recipes.named(asked.recipe).name} if asked.recipe else {}
    own = Recipe(**saved.training["recipe"])
    check_same(folder, saved.training, dataclasses.replace(own, **(name | asked.fields)))
    spec = zoo.spec(asked.model) if asked.model else saved.spec
    preprocess = common.preprocess_from(saved.input, *asked.contract)
    if spec.name != saved.spec.name or preprocess != saved.input:
        raise InputError(
            f"{folder}: its run is {saved.spec.name} at {saved.input.size} pixels",
            fix="leave these options out, or train into another --out",
        )
    source, test = _sources(asked.data or saved.training["data"])
    # Versions before the check of images tolerated a hundredth.
    max_broken = saved.training.get("images", {"max_broken": TOLERATED})["max_broken"]
    return Job(
        spec=saved.spec, source=source, test=test, preprocess=preprocess, recipe=own, out=folder,
        max_broken=max_broken,
    )  # fmt: skip


def _sources(data: str) -> tuple[Source, Source | None]:
    from rtresnet.data.sources import open_source

    source = open_source(data, "train")
    return source, open_source(data, "test") if source.splits else None
