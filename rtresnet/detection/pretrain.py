"""Equal pre-training for detectors: classify crops of the objects in the training images.

The crops run through the detector's own shared layers and head, so every weight but those of the
region proposal network is trained. All backbones see the same crops in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rtresnet.core.detector_preprocess import STRIDE
from rtresnet.core.errors import CheckFailedError, DataError
from rtresnet.core.preprocess import Preprocess, resize
from rtresnet.core.sidecar import Weights
from rtresnet.detection import checkpoint, net
from rtresnet.detection.data import DetectionSource
from rtresnet.detection.training import DetectionJob
from rtresnet.models import checkpoint as files
from rtresnet.models.checkpoint import Checkpoint
from rtresnet.training.checkpointing import state_of

CONTEXT = 0.15  # of an object's sides, shown around it


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """Recipe of the classification of objects: SGD with a linear warm-up, then a cosine down to 0.

    Attributes:
        steps: Length of the run.
        batch: Crops in a step.
        lr: Highest learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        clip: Largest norm of the gradient.
    """

    steps: int = 300
    batch: int = 32
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 5.0


def pretrain(
    job: DetectionJob,
    recipe: PretrainRecipe,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Checkpoint:
    """Train a detector's net to classify the objects of `job.source`.

    Writes `job.out`/pretrain.pt; a finished file of the same terms is read instead.

    Args:
        job: The detector's run; its net, images, seed, device and folder are used.
        recipe: Length, batch and rate.
        on_step: Receives the number of each step, from 1, and its loss.

    Returns:
        The weights to start from.

    Raises:
        CheckFailedError: The loss is not finite.
        DataError: The images have no objects.
    """
    path = job.out / "pretrain.pt"
    about = {
        "recipe": dataclasses.asdict(recipe), "seed": job.recipe.seed,
        "fingerprint": job.source.fingerprint(), "net": dataclasses.asdict(job.detection),
    }  # fmt: skip
    if path.exists():
        before = checkpoint.load(path)
        if before.training == about and before.spec == job.spec:
            return before
    torch.manual_seed(job.recipe.seed)
    model = net.build(job.spec, job.detection, len(job.source.classes)).to(job.device).train()
    with torch.no_grad():
        model.score.weight.mul_(0.1)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )  # fmt: skip
    objects = [
        (image, int(row))
        for image, targets in enumerate(job.source.targets)
        for row in np.flatnonzero(~targets.ignored)
    ]
    if not objects:
        raise DataError(
            f"{job.source.name}: no object to pre-train on; all boxes are difficult or crowds",
            fix="add images with objects",
        )
    side = job.detection.pool * STRIDE
    rng = np.random.default_rng((job.recipe.seed, len(objects)))
    for step in range(recipe.steps):
        chosen = rng.integers(len(objects), size=recipe.batch)
        flips = rng.integers(2, size=recipe.batch)
        pairs = [objects[index] for index in chosen]
        crops = np.stack([
            crop(job.source, image, row, side, job.preprocess, flipped=bool(flip))
            for (image, row), flip in zip(pairs, flips, strict=True)
        ])  # fmt: skip
        labels = [int(job.source.targets[image].labels[row]) + 1 for image, row in pairs]
        progress = step / recipe.steps
        rate = recipe.lr * min(1.0, progress / 0.1 + 0.05) * (1 + np.cos(np.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _step(model, torch.from_numpy(crops), torch.tensor(labels), optimizer, recipe, job)
        if not np.isfinite(loss):
            raise CheckFailedError(f"the loss of pre-training is {loss} at step {step}")
        on_step(step + 1, loss)
    trained = Checkpoint(
        model=files.model_of(job.spec, job.source.classes), input=job.preprocess,
        weights=Weights(origin="trained", source=job.source.name), state=state_of(model),
        training=about, detection=job.detection,
    )  # fmt: skip
    files.save(path, trained)
    return trained


def _step(
    model: net.Detector,
    crops: Tensor,
    labels: Tensor,
    optimizer: Any,
    recipe: PretrainRecipe,
    job: DetectionJob,
) -> float:
    optimizer.zero_grad(set_to_none=True)
    logits, _ = model.head(model.shared(crops.to(job.device)))
    loss = nn.functional.cross_entropy(logits, labels.to(job.device))
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return float(loss.detach())


def crop(
    source: DetectionSource, image: int, row: int, side: int, preprocess: Preprocess, *,
    flipped: bool,
) -> np.ndarray:  # fmt: skip
    """Return one object with some context, resized and normalized: float32 [3, side, side]."""
    pixels = source.read(image)
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = source.targets[image].boxes[row]
    dx, dy = CONTEXT * (x2 - x1), CONTEXT * (y2 - y1)
    left, top = max(0, int(x1 - dx)), max(0, int(y1 - dy))
    right, bottom = min(width, int(np.ceil(x2 + dx))), min(height, int(np.ceil(y2 + dy)))
    small = resize(
        np.ascontiguousarray(pixels[top:bottom, left:right]), side, side, preprocess.interpolation
    )
    if flipped:
        small = small[:, ::-1]
    result: np.ndarray = preprocess.normalize(small[None])[0]
    return result
