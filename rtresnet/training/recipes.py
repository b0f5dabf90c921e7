"""The named recipes, and what becomes of one on a given data set and command line.

paper-cifar     section 4.2, as published
paper-imagenet  section 3.4, as published
modern          what has been learnt since, for long runs on many images
finetune        from weights to other images
qat             from weights to the same net in INT8, with the rounding in training
speed           good accuracy in as few passes as possible, on small images
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.training.recipe import Recipe

# 64,000 steps of 128 images of 45,000; divided by 10 at 32,000 and 48,000. Epochs count only
# where --epochs asks for a shorter run. One thing is not the paper's: it subtracts a mean image,
# and here as in every public net a mean colour is subtracted, which the engine can be told.
PAPER_CIFAR = Recipe(
    name="paper-cifar", epochs=182, steps=64_000, batch=128, lr=0.1, milestones=(0.5, 0.75),
    precision="fp32",
)  # fmt: skip

# "We use 0.01 to warm up until the training error is below 80 % (about 400 iterations)". A rate
# that depends on the error would not be a function of the step, so it is the 400 iterations.
DEEP, DEEP_WARMUP = 110, 400 / 64_000

# The paper divides "when the error plateaus"; its figure 4 does so at 150,000 and 300,000 steps.
PAPER_IMAGENET = Recipe(
    name="paper-imagenet", epochs=120, steps=600_000, batch=256, lr=0.1,
    milestones=(0.25, 0.5, 0.75), holdout=0.0, crop="scale", colour=0.1, bn_images=50_000,
    precision="fp32",
)  # fmt: skip

# torchvision's second recipe for ResNet-50 (80.86 %), step by step, for a shorter run and a batch
# of 256: rate and averaging follow from that.
MODERN = Recipe(
    name="modern", epochs=100, batch=256, lr=0.125, schedule="cosine", warmup=0.05,
    warmup_from=0.01, weight_decay=2e-5, decay_norms=False, label_smoothing=0.1, mixup=0.2,
    cutmix=1.0, trivial_augment=True, erasing=0.1, crop="area", padding_mode="reflect",
    train_scale=176 / 224, ema=0.9998,
)  # fmt: skip

FINETUNE = Recipe(
    name="finetune", epochs=10, batch=64, lr=0.01, schedule="cosine", warmup=0.1,
    warmup_from=0.01, nesterov=True, decay_norms=False, label_smoothing=0.1, crop="area",
    area=(0.35, 1.0), padding_mode="reflect", ema=0.99,
)  # fmt: skip

# Fine-tuning with rounding: few passes at a tenth of the rate, and the images as they are met
# later, because the ranges of activations are learned along with the weights.
QAT = dataclasses.replace(
    FINETUNE, name="qat", epochs=3, lr=0.001, label_smoothing=0.0, precision="fp32", qat=True,
)  # fmt: skip

# A one-cycle rate with Nesterov momentum, larger batches and decay, mirroring in alternate
# epochs, averaged weights, and a beginning on smaller images.
SPEED = Recipe(
    name="speed", epochs=10, batch=256, lr=0.8, schedule="linear", warmup=0.2, warmup_from=0.1,
    final_lr=0.0, nesterov=True, weight_decay=5e-4, decay_norms=False, label_smoothing=0.1,
    padding=2, padding_mode="reflect", flip="alternate", crop="area", area=(0.35, 1.0), ema=0.98,
    progressive=((0.0, 0.625), (0.4, 0.75), (0.7, 1.0)),
)  # fmt: skip

RECIPES = {
    recipe.name: recipe for recipe in (PAPER_CIFAR, PAPER_IMAGENET, MODERN, FINETUNE, QAT, SPEED)
}

SMALLEST_BATCH = 32
STEPS_AN_EPOCH = 40  # below this a batch leaves too few updates to learn from
SMALL = 64  # pixels: up to here images are padded and cropped, not cut out of larger ones


def named(name: str) -> Recipe:
    """A recipe as published.

    Raises:
        UnknownNameError: No such recipe.
    """
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES)
    return RECIPES[name]


def resolve(
    name: str,
    *,
    images: int,
    size: int,
    depth: int,
    settings: dict[str, Any] | None = None,
) -> Recipe:
    """A named recipe for one data set and net.

    The paper's numbers stay where the data are of the paper's size. On a small set the batch is
    halved until an epoch has steps enough, and the rate with it. A recipe that counts steps
    counts epochs where `settings` has epochs: the milestones are fractions, and scale along.

    Args:
        name: One of RECIPES.
        images: Training images, those held out not counted.
        size: Side of the evaluation's images, in pixels.
        depth: Layers of the net.
        settings: Fields to be set, whatever the recipe says.

    Raises:
        UnknownNameError: No such recipe or field.
        InputError: A value that cannot be.
    """
    recipe, given, changed = named(name), dict(settings or {}), dict[str, Any]()
    if name == "paper-cifar" and depth >= DEEP:
        changed |= {"warmup": DEEP_WARMUP, "warmup_shape": "constant"}
    if "epochs" in given:
        changed["steps"] = 0
    if size <= SMALL and recipe.train_scale != 1:
        changed["train_scale"] = 1.0  # there is nothing to be won below 64 pixels
    if "batch" in given:
        changed["batch"] = given["batch"]
    else:
        batch = recipe.batch
        while batch > SMALLEST_BATCH and images // batch < STEPS_AN_EPOCH:
            batch //= 2
        changed["batch"] = max(1, min(batch, images))
    changed["lr"] = recipe.lr * changed["batch"] / recipe.batch
    unknown = set(given) - {field.name for field in dataclasses.fields(Recipe)}
    if unknown:
        raise UnknownNameError("recipe field", sorted(unknown)[0], _fields())
    return dataclasses.replace(recipe, **(changed | given))


def parse(settings: Iterable[str]) -> dict[str, Any]:
    """`field=value` texts to a field's own type; tuples are numbers with commas between.

    Pairs of pairs, as in progressive, are `0:0.5,0.6:1`.

    Raises:
        UnknownNameError: No such field; names the nearest.
        InputError: Not `field=value`, or a value of another type.
    """
    result: dict[str, Any] = {}
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: not FIELD=VALUE", fix="as in --set lr=0.05")
        if field not in _fields():
            raise UnknownNameError("recipe field", field, _fields())
        try:
            result[field] = _value(field, text)
        except ValueError:
            raise InputError(
                f"--set {setting}: {field} is of another type",
                fix=f"as in --set {field}={_example(field)}",
            ) from None
    return result


def _fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Recipe) if field.name != "name"]


def _value(field: str, text: str) -> Any:
    example = getattr(MODERN, field)
    if isinstance(example, bool):
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(text)
        return text.lower() in ("true", "1", "yes")
    if field == "progressive":
        pairs = [pair.split(":") for pair in text.split(",") if pair]
        return tuple((float(start), float(share)) for start, share in pairs)
    if isinstance(example, tuple):
        return tuple(float(part) for part in text.split(",") if part)
    return type(example)(text)


def _example(field: str) -> str:
    value = getattr(SPEED, field)
    if field == "progressive":
        return ",".join(f"{start:g}:{share:g}" for start, share in value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def describe(recipe: Recipe) -> list[str]:
    """The recipe as lines of `field=value`, what is off left out, within 78 columns."""
    unused = {"name"}
    if recipe.schedule != "steps":
        unused |= {"milestones"}
    if recipe.crop != "area":
        unused |= {"area"}
    if recipe.steps:
        unused |= {"epochs"}
    if not recipe.warmup:
        unused |= {"warmup_from", "warmup_shape"}
    entries = [
        f"{field}={_text(value)}"
        for field, value in dataclasses.asdict(recipe).items()
        if field == "seed" or (field not in unused and value not in (0, 0.0, (), False))
    ]
    lines = [f"recipe {recipe.name}:"]
    for entry in entries:
        if len(lines[-1]) + 1 + len(entry) > 78:
            lines.append(" ")
        lines[-1] += " " + entry
    return lines


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "(" + ",".join(_text(entry) for entry in value) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
