"""Checkpoints and class folders with names for the four tints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from rtresnet.models import checkpoint
from tests.conftest import tinted_noise

TINTS = ("red", "green", "blue", "grey")  # of the labels of `tints`


def with_classes(path: Path, names: tuple[str, ...], out: Path, order: Sequence[int] = ()) -> Path:
    """Write a checkpoint with other class names, of its first classes or in another order."""
    loaded = checkpoint.load(path)
    state = dict(loaded.state)
    for name in ("fc.weight", "fc.bias"):
        state[name] = state[name][list(order) or slice(len(names))]
    model = dataclasses.replace(loaded.model, classes=names)
    checkpoint.save(out, dataclasses.replace(loaded, model=model, state=state))
    return out


def folders(root: Path, names: dict[str, int], count: int = 12) -> str:
    """Return a data set of class folders, each with images of one of the four tints."""
    images, labels = tinted_noise(4 * count, seed=3)
    for name, label in names.items():
        (root / name).mkdir(parents=True)
        for index, image in enumerate(images[labels == label]):
            Image.fromarray(image).save(root / name / f"{index}.png")
    return str(root)
