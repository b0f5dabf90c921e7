"""The named recipes, and how one is adapted to a data set and to the user's settings.

paper-cifar     section 4.2, as published
paper-imagenet  section 3.4, as published
modern          later findings, for long runs on many images
finetune        from weights to other images
qat             from weights to the same net in INT8 or FP8, trained with its rounding
speed           good accuracy in as few passes as possible, on small images
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from rtresnet.core.config import options_of
from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.core.reporter import plural
from rtresnet.training import config
from rtresnet.training.config import Recipe

# 64,000 steps of 128 images of 45,000; divided by 10 at 32,000 and 48,000. `epochs` only counts
# if the user sets it. One difference from the paper: after the mean image is subtracted, pixels are
# also divided by ImageNet's standard deviation of their colour, as in every public net.
PAPER_CIFAR = Recipe(
    name="paper-cifar", epochs=182, steps=64_000, batch=128, lr=0.1, milestones=(0.5, 0.75),
    split="class", mean_image=True, fc_init="he", precision="fp32",
)  # fmt: skip

# From 110 layers on: "0.01 to warm up until the training error is below 80 % (about 400
# iterations)".
DEEP, DEEP_ERROR = 110, 80.0

# The paper divides "when the error plateaus", which is `--set schedule=plateau`; its figure 4 does
# so at 150,000 and 300,000 steps.
PAPER_IMAGENET = Recipe(
    name="paper-imagenet", epochs=120, steps=600_000, batch=256, lr=0.1,
    milestones=(0.25, 0.5, 0.75), holdout=0.0, crop="scale", colour=0.1, bn_images=50_000,
    split="class", fc_init="he", precision="fp32",
)  # fmt: skip

# torchvision's second recipe for ResNet-50 (80.86 %), for a shorter run and a batch of 256; rate
# and averaging are scaled accordingly.
MODERN = Recipe(
    name="modern", epochs=100, batch=256, lr=0.125, schedule="cosine", warmup=0.05,
    warmup_from=0.01, weight_decay=2e-5, decay_norms=False, label_smoothing=0.1, mixup=0.2,
    cutmix=1.0, trivial_augment=True, erasing=0.1, crop="area", padding_mode="reflect",
    train_scale=176 / 224, ema=0.9998, split="class",
)  # fmt: skip

FINETUNE = Recipe(
    name="finetune", epochs=10, batch=64, lr=0.01, schedule="cosine", warmup=0.1,
    warmup_from=0.01, nesterov=True, decay_norms=False, label_smoothing=0.1, crop="area",
    area=(0.35, 1.0), padding_mode="reflect", ema=0.99, split="class",
)  # fmt: skip

# Few passes at a tenth of the rate, with images as in evaluation, because the ranges of the
# activations are trained together with the weights.
QAT = dataclasses.replace(
    FINETUNE, name="qat", epochs=3, lr=0.001, label_smoothing=0.0, precision="fp32", qat=True,
)  # fmt: skip

# One-cycle rate, Nesterov momentum, larger batch and decay, mirroring in alternate epochs, averaged
# weights, and smaller images at the start.
SPEED = Recipe(
    name="speed", epochs=10, batch=256, lr=0.8, schedule="linear", warmup=0.2, warmup_from=0.1,
    final_lr=0.0, nesterov=True, weight_decay=5e-4, decay_norms=False, label_smoothing=0.1,
    padding=2, padding_mode="reflect", flip="alternate", crop="area", area=(0.35, 1.0), ema=0.98,
    progressive=((0.0, 0.625), (0.4, 0.75), (0.7, 1.0)), split="class",
)  # fmt: skip

RECIPES = {
    recipe.name: recipe for recipe in (PAPER_CIFAR, PAPER_IMAGENET, MODERN, FINETUNE, QAT, SPEED)
}
EXAMPLES = {"lr": "0.05", "milestones": "0.3,0.6", "progressive": "0:0.5,0.6:1", "area": "0.35,1"}

MIN_BATCH = 32
FEW_UPDATES = 100  # number of weight updates in a run
HIGH_RATE = 2  # times the recipe's learning rate
# Linear scaling with the batch holds up to this rate, at 8,192 images (Goyal et al., 2017).
MAX_SCALED_RATE = 3.2
STEPS_PER_EPOCH = 40  # fewer updates than this are too few to learn from
SMALL_IMAGE = 64  # pixels: up to this size images are padded and cropped as in CIFAR recipes


def named(name: str) -> Recipe:
    """Return a recipe by name, as published.

    Raises:
        UnknownNameError: The recipe is unknown.
    """
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES)
    return RECIPES[name]


def resolve(
    name: str, *, images: int, size: int, depth: int, settings: Mapping[str, Any] | None = None
) -> Recipe:
    """Adapt a named recipe to a data set and a net.

    On a small set the batch is halved until an epoch has enough steps; the learning rate is scaled
    with the batch, see `scaled_rate`. A recipe that counts steps counts epochs if `settings` has
    epochs; milestones are fractions and scale with the length.

    Args:
        name: One of RECIPES.
        images: Number of training images without the held-out ones.
        size: Side of the images in evaluation, in pixels.
        depth: Layers of the net.
        settings: Fields that override the recipe.

    Raises:
        UnknownNameError: The recipe or a field is unknown.
        InputError: A value that is out of bounds.
    """
    recipe, settings, changed = named(name), dict(settings or {}), dict[str, Any]()
    if name == "paper-cifar" and depth >= DEEP:
        changed["warmup_until"] = 0.0 if settings.get("warmup") else DEEP_ERROR
    if "epochs" in settings:
        changed["steps"] = 0
    if settings.get("progressive") or settings.get("train_scale", 1) != 1:
        changed["mean_image"] = False  # which has one size
    if size <= SMALL_IMAGE and recipe.train_scale != 1:
        changed["train_scale"] = 1.0
    batch = settings.get("batch")
    if batch is None:
        batch = recipe.batch
        while batch > MIN_BATCH and images // batch < STEPS_PER_EPOCH:
            batch //= 2
        batch = max(1, min(batch, images))
    changed |= {"batch": batch, "lr": scaled_rate(recipe, batch)}
    unknown = sorted(set(settings).difference(_types()))
    if unknown:
        raise UnknownNameError("recipe field", unknown[0], _types())
    return dataclasses.replace(recipe, **(changed | settings))


def scaled_rate(recipe: Recipe, batch: int) -> float:
    """Return a recipe's learning rate for another batch: in proportion, up to MAX_SCALED_RATE."""
    return min(recipe.lr * batch / recipe.batch, max(recipe.lr, MAX_SCALED_RATE))


def advice(recipe: Recipe, images: int) -> list[str]:
    """Describe what is unlikely to train well, one sentence each.

    Args:
        recipe: The resolved recipe.
        images: Number of training images without the held-out ones.
    """
    lines = []
    updates = recipe.total(max(1, images // recipe.batch))
    if updates < FEW_UPDATES:
        lines.append(
            f"the run has only {plural(updates, 'weight update')}: train longer (--epochs), or "
            "with a smaller --batch"
        )
    base = RECIPES.get(recipe.name)
    if base is not None:
        usual = scaled_rate(base, recipe.batch)
        if recipe.lr > HIGH_RATE * usual:
            lines.append(
                f"the learning rate {recipe.lr:g} is {recipe.lr / usual:.2g} times that of the "
                f"recipe for a batch of {recipe.batch} ({usual:g}), and training may diverge"
            )
    return lines


def parse(settings: Iterable[str]) -> dict[str, object]:
    """Convert `field=value` texts to values of the fields' types.

    Tuples are comma-separated; pairs within them, as in progressive, are `0:0.5,0.6:1`.

    Raises:
        UnknownNameError: The field is unknown; the message names the nearest one.
        InputError: Not `field=value`, or a value of the wrong type.
    """
    values: dict[str, object] = {}
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: not FIELD=VALUE", fix="as in --set lr=0.05")
        if field not in _types():
            raise UnknownNameError("recipe field", field, _types())
        kind = _types()[field]
        try:
            if typing.get_origin(kind) is tuple:
                entries = [part.split(":") if ":" in part else part for part in text.split(",")]
                values[field] = msgspec.convert([e for e in entries if e], kind, strict=False)
            else:
                choice = typing.get_origin(kind) is typing.Literal
                values[field] = text if choice else msgspec.convert(text, kind, strict=False)
        except msgspec.ValidationError:
            example = EXAMPLES.get(field) or config.text(getattr(SPEED, field))
            raise InputError(
                f"--set {setting}: wrong type for {field}", fix=f"as in --set {field}={example}"
            ) from None
    return values


def _types() -> dict[str, Any]:
    """Return the fields that a user may set, with their types."""
    return {field.name: kind for field, kind, _ in options_of(Recipe) if field.name != "name"}
