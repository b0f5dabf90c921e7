"""Which image goes into which step. Order and crops follow from (seed, epoch, image) alone.

So a run that was killed and resumed at an epoch sees what the unbroken run would have seen, on
any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rtresnet.data import loader
from rtresnet.data.sources import Arrays, Source
from rtresnet.errors import DataError
from rtresnet.preprocess import Preprocess, resize

SMALL = 64  # pixels: below, whole sets fit in memory and crops come from padding

# Section 3.4: the shorter side is drawn from [256, 480] for a crop of 224.
SCALES = (256 / 224, 480 / 224)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Indices of training and held-out images; `test` is None where the set has its own."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray | None


def split(source: Source, seed: int) -> Split:
    """Holds a tenth out for choosing (45k/5k in section 4.2); another for testing if need be.

    Raises:
        DataError: Fewer than 20 images.
    """
    if len(source) < 20:
        raise DataError(f"{source.name}: {len(source)} images are too few to train and to hold out")
    order = np.random.default_rng((seed, 0x5B117)).permutation(len(source))
    tenth = len(source) // 10
    if source.splits:
        return Split(train=order[tenth:], val=order[:tenth], test=None)
    return Split(train=order[2 * tenth :], val=order[:tenth], test=order[tenth : 2 * tenth])


def epoch(
    source: Source,
    indices: np.ndarray,
    preprocess: Preprocess,
    *,
    batch: int,
    seed: int,
    number: int,
    tally: loader.Tally,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch's batches: uint8 [N, S, S, 3], int64 labels. A last partial one is left out."""
    order = np.random.default_rng((seed, number)).permutation(indices)
    batch = min(batch, len(order))
    if isinstance(source, Arrays):
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            yield source.images[chosen], source.labels[chosen]
        return

    def crop(index: int, image: np.ndarray) -> np.ndarray:
        return random_crop(image, preprocess.size, np.random.default_rng((seed, number, index)))

    images: list[np.ndarray] = []
    kept: list[int] = []
    for index, image in loader.indexed(source, order, crop, tally):
        images.append(image)
        kept.append(index)
        if len(images) == batch:
            yield np.stack(images), source.labels[kept]
            images, kept = [], []


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Scale augmentation and random crop (section 3.4), cutting before resizing.

    Resizing the shorter side to s and cutting `size` pixels shows what cutting
    `size * shorter / s` pixels and resizing to `size` shows, at a fraction of the work.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    side = min(short, max(1, round(short / rng.uniform(*SCALES))))
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    return resize(image[top : top + side, left : left + side], size, size)
