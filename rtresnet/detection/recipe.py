"""Recipe of a detector's training: one frozen record, stored in checkpoints and compared on resume.

Sources: the Faster R-CNN paper (Ren et al. 2015) for batches, rates and sampling, Fast R-CNN for
the layers that stay as they are, and appendix A of the ResNet paper for the fixed batch norm. Both
papers train the proposals and the head in alternation; here they are trained jointly, as in the
authors' released code.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from rtresnet.core.errors import InputError, UnknownNameError
from rtresnet.core.sidecar import Detection


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe:
    """Everything that determines a run, except for data, net and weights to start from.

    Attributes:
        name: Name of the recipe it started as.
        steps: Length of the run in steps; 0 leaves it to `epochs`.
        epochs: Passes over the training images, where `steps` is 0.
        batch: Images in a step.
        seed: Seed of initialization, order of images, mirroring and sampling.
        lr: Learning rate.
        milestones: Fractions of the run at which the rate is divided by 10.
        warmup: Fraction of the run in which the rate rises linearly from a tenth.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        clip: Largest norm of the gradient; 0 is off.
        flip: Whether images are mirrored at random.
        freeze: Number of leading parts that are not trained: 1 the stem, 2 also the first stage.
        norm_fraction: Fraction of the run in which batch norm is trained. 0 fixes it from the
            start, as in appendix A, which needs pre-trained weights.
        candidates: Boxes before non-maximum suppression, in training.
        regions: Regions after it, in training.
        rpn_batch: Anchors of an image in the loss of the region proposal network.
        rpn_positives: Largest share of objects among these anchors.
        rpn_high: IoU from which an anchor is an object.
        rpn_low: IoU below which it is background.
        head_batch: Regions of an image in the loss of the head.
        head_positives: Largest share of objects among these regions.
        head_iou: IoU from which a region is an object; below it is background.
        precision: Data type of the convolutions: "fp32" or "bf16".
    """

    name: str = "custom"
    steps: int = 0
    epochs: int = 10
    batch: int = 1
    seed: int = 0
    lr: float = 0.001
    milestones: tuple[float, ...] = (0.75,)
    warmup: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 0.0
    flip: bool = True
    freeze: int = 0
    norm_fraction: float = 0.0
    candidates: int = 6000
    regions: int = 2000
    rpn_batch: int = 256
    rpn_positives: float = 0.5
    rpn_high: float = 0.7
    rpn_low: float = 0.3
    head_batch: int = 128
    head_positives: float = 0.25
    head_iou: float = 0.5
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for field, low, high in BOUNDS:
            value = getattr(self, field)
            if not low <= value <= high:
                raise InputError(f"{field}={value}: must be from {low:g} to {high:g}")
        if list(self.milestones) != sorted(self.milestones):
            raise InputError(f"milestones={self.milestones}: must increase")
        if self.precision not in ("fp32", "bf16"):
            raise UnknownNameError("precision", self.precision, ("fp32", "bf16"))

    def total(self, images: int) -> int:
        """Return the number of steps of the run on `images` images."""
        return self.steps or self.epochs * self.steps_an_epoch(images)

    def steps_an_epoch(self, images: int) -> int:
        """Return the number of steps in which each image is used once."""
        return -(-images // self.batch)

    def lr_at(self, step: int, total: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        ramp = self.warmup * total
        if step < ramp:
            return self.lr * (0.1 + 0.9 * step / ramp)
        return float(self.lr * 0.1 ** sum(step / total >= mark for mark in self.milestones))


BOUNDS = (
    ("steps", 0, 1e9), ("epochs", 1, 1e6), ("batch", 1, 1e4), ("seed", 0, 2**31), ("lr", 1e-9, 10),
    ("warmup", 0, 1), ("momentum", 0, 0.9999), ("weight_decay", 0, 1), ("clip", 0, 1e9),
    ("freeze", 0, 5), ("norm_fraction", 0, 1), ("candidates", 1, 1e5), ("regions", 1, 1e5),
    ("rpn_batch", 2, 1e5), ("rpn_positives", 0, 1), ("rpn_high", 0, 1), ("rpn_low", 0, 1),
    ("head_batch", 2, 1e5), ("head_positives", 0, 1), ("head_iou", 0, 1),
)  # fmt: skip

# PASCAL VOC: 60,000 steps at 0.001 and 20,000 at 0.0001, weight decay 0.0005, one image a step.
# COCO (appendix A): 240,000 and 80,000 steps of 8 images at the same rates: the same milestone.
# Fast R-CNN (section 4.5) trains the third stage and later ones.
PAPER = DetectionRecipe(name="paper-detection", steps=80_000, freeze=2)

# From untrained weights on few, small images: batch norm is trained in the first half.
SCRATCH = DetectionRecipe(
    name="scratch-detection", epochs=24, batch=8, lr=0.04, milestones=(0.75, 0.92), warmup=0.03,
    weight_decay=1e-4, clip=10.0, norm_fraction=0.6, candidates=1000, regions=200, rpn_batch=64,
    head_batch=16,
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in (PAPER, SCRATCH)}


def named(name: str) -> DetectionRecipe:
    """Return a recipe by name.

    Raises:
        UnknownNameError: There is no such recipe.
    """
    if name not in RECIPES:
        raise UnknownNameError("detection recipe", name, RECIPES)
    return RECIPES[name]


T = typing.TypeVar("T", DetectionRecipe, Detection)


def changed(
    recipe: DetectionRecipe, spec: Detection, settings: typing.Iterable[str]
) -> tuple[DetectionRecipe, Detection]:
    """Set fields of the recipe or of the net from texts such as "lr=0.01" or "anchors=32,64".

    Raises:
        UnknownNameError: Neither has such a field.
        InputError: Not FIELD=VALUE, or a value of another type.
    """
    own = [f.name for f in dataclasses.fields(DetectionRecipe) if f.name != "name"]
    net = [f.name for f in dataclasses.fields(Detection) if f.name not in ("canvas", *own)]
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: not FIELD=VALUE", fix="as in --set lr=0.005")
        if field in own:
            recipe = _replaced(recipe, field, text)
        elif field in net:
            spec = _replaced(spec, field, text)
        else:
            raise UnknownNameError("field of a detection recipe", field, [*own, *net])
    return recipe, spec


def _replaced(record: T, field: str, text: str) -> T:
    example = getattr(record, field)
    try:
        if isinstance(example, bool):
            value: Any = {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        elif isinstance(example, tuple):
            value = tuple(float(part) for part in text.split(",") if part)
        else:
            value = type(example)(text)
    except (ValueError, KeyError):
        raise InputError(
            f"--set {field}={text}: not a value of this field", fix=f"as in --set {field}={example}"
        ) from None
    return dataclasses.replace(record, **{field: value})


def describe(recipe: DetectionRecipe, spec: Detection) -> list[str]:
    """Return the recipe and the net's sizes as lines of `field=value`, at most 78 columns wide."""
    entries = [(k, v) for k, v in dataclasses.asdict(recipe).items() if k != "name"]
    entries += [(k, v) for k, v in dataclasses.asdict(spec).items() if v is not None]
    lines = [f"recipe {recipe.name}:"]
    for name, value in entries:
        text = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)
        entry = f"{name}={text}"
        if len(lines[-1]) + 1 + len(entry) > 78:
            lines.append(" ")
        lines[-1] += " " + entry
    return lines
