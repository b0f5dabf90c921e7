"""What a training run consists of: its options, resolved to net, images and recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtresnet.core import reporter
from rtresnet.core.config import Config, option, options_of, parse_percentage
from rtresnet.core.errors import InputError
from rtresnet.core.precisions import CALIBRATED, PrecisionName
from rtresnet.core.reporter import Reporter
from rtresnet.data import DATA_HELP
from rtresnet.training.config import SAVE_SECONDS, Recipe
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.train_log import Target, parse_targets

if TYPE_CHECKING:
    from rtresnet.data.sources import Source
    from rtresnet.models.checkpoint import Checkpoint
    from rtresnet.training.config import TrainJob

FIXED_DATA = ("digits", "cifar10", "fashion-mnist", "synthetic")  # small images by definition
NOT_MIRRORED = ("digits",)  # a mirrored digit is not the same digit
SMALL_DEFAULT, LARGE_DEFAULT = "resnet20", "resnet18"  # nets for images up to SMALL_IMAGE, above
PROBES = 31  # images whose median size selects the net
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
        default_text="resnet18 for images above 64 pixels, else resnet20; with --weights their "
        "net, or resnet18 for imagenet",
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
        "Batch size, at most the number of training images.",
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
        "Set a field of the recipe; may be repeated.",
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
        default_text="the recipe's; off for digits",
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


def recipe_settings(config: TrainConfig) -> Mapping[str, Any]:
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
    from rtresnet.training import loader, recipes
    from rtresnet.training.config import TrainJob

    settings = recipe_settings(config)
    start = _start(config, reporter)
    spec = zoo.spec(config.model) if config.model else None  # reject a name before reading data
    data = config.data or "digits"
    source, test = _sources(data)
    if start is not None:
        spec = start.spec
    elif spec is None:
        spec = zoo.spec(_default_net(source, stated.size, reporter))
    preprocess = stated.applied_to(start.input if start else Preprocess.for_size(spec.size))
    default = "speed" if preprocess.size <= recipes.SMALL_IMAGE else "modern"
    name = config.recipe or ("qat" if settings.get("qat") else "finetune" if start else default)
    if config.precision in CALIBRATED and not settings.get("qat", recipes.named(name).qat):
        raise InputError(
            f"--precision {config.precision} is for quantization-aware training", fix="add --qat"
        )
    recipe = loader.resolve_recipe(
        name,
        source,
        size=preprocess.size,
        depth=spec.depth,
        settings={**({"flip": "none"} if data in NOT_MIRRORED else {}), **settings},
    )
    return TrainJob(
        spec=spec, source=source, test=test, preprocess=preprocess, recipe=recipe, out=folder,
        start=start, teacher=_teacher(config.teacher, None, reporter),
    )  # fmt: skip


def _default_net(source: Source, size: int | None, reporter: Reporter) -> str:
    """Choose the net from the shorter side of the images, and note the choice.

    Args:
        source: The training images.
        size: Stated side of the net's input, in pixels, which decides if there is one.
        reporter: Receives the note.
    """
    from rtresnet.data.decode import CorruptImage
    from rtresnet.data.loader import sample
    from rtresnet.training.recipes import SMALL_IMAGE

    if source.name in FIXED_DATA or source.name.partition(":")[0] in FIXED_DATA:
        return SMALL_DEFAULT
    sides = [] if size is None else [size]
    for index in sample(source, PROBES).tolist() if size is None else ():
        with contextlib.suppress(CorruptImage):  # reported by the check of all images
            # A large JPEG may be decoded at a reduced size, but not below this one.
            sides.append(min(source.image(index, SMALL_IMAGE + 1).shape[:2]))
    large = bool(sides) and statistics.median(sides) > SMALL_IMAGE
    net = LARGE_DEFAULT if large else SMALL_DEFAULT
    subject = "the shorter side of the images" if size is None else f"--size {size}"
    reason = f"{subject} is {'above' if large else 'at most'} {SMALL_IMAGE} pixels"
    reporter.note(f"net: {net}, because {reason}; choose another with --model")
    return net


def _start(config: TrainConfig, reporter: Reporter) -> Checkpoint | None:
    """Return the weights to start from."""
    from rtresnet.models import checkpoint, download

    if config.weights is None:
        return None
    model = config.model or (LARGE_DEFAULT if config.weights == "imagenet" else None)
    named = download.published(config.weights, model, reporter)
    return named or checkpoint.load(config.weights, model=config.model)


def resumed_job(
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
    options = dataclasses.replace(recipe, **{**name, **recipe_settings(config)})
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
