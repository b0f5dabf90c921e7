"""The batches of each training step: selection, augmentation, normalization.

Everything is derived from (seed, step) and (seed, epoch, image): resuming at any step restores no
state, and results do not depend on the number of threads or processes.

Small images are on the device as one uint8 tensor. Photographs are decoded and cropped in threads,
copied to the device as uint8, and augmented there in batches.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtresnet.core.errors import DataError, InputError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.reporter import plural
from rtresnet.data import augment, loader, trivial
from rtresnet.data.decode import CorruptImage
from rtresnet.data.sources import Arrays, Source, Subset
from rtresnet.training import recipes
from rtresnet.training.config import Recipe
from rtresnet.training.distributed import ALONE, World

# Purposes of random generators, next to the seed: no two share a stream.
SPLIT, ORDER, STEP, CROP, FLIP, DEPTH = range(6)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Indices of training, validation and test images; `test` is None if the set has its own."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray | None


def split(source: Source, recipe: Recipe) -> Split:
    """Hold out a share for validation (45k/5k in section 4.2), and a tenth for testing if needed.

    A split by class takes the shares from each class: at least one image for each part, as far as
    the class has images. Training comes first, then testing.

    Args:
        source: All images without broken ones.
        recipe: Its seed, share for validation, and kind of split.

    Raises:
        DataError: Fewer than 20 images.
    """
    if len(source) < 20:
        raise DataError(
            f"{source.name}: {plural(len(source), 'image')}, too few for training and validation",
            fix="use at least 20 images",
        )
    return _divided(source, recipe)


def training_images(source: Source, recipe: Recipe) -> int:
    """Return the number of images that `split` leaves to train on, also of a set too small."""
    return len(_divided(source, recipe).train)


def resolve_recipe(
    name: str, source: Source, *, size: int, depth: int, settings: Mapping[str, Any]
) -> Recipe:
    """Adapt a named recipe to the training images of a set; see `recipes.resolve`.

    Raises:
        UnknownNameError: The recipe or a field is unknown.
        InputError: A value that is out of bounds, or a batch of more than the training images.
    """
    shares = {key: settings[key] for key in ("holdout", "split", "seed") if key in settings}
    divided = dataclasses.replace(recipes.named(name), **shares)
    images = training_images(source, divided)
    if settings.get("batch", 0) > images:
        raise InputError(
            f"a batch of {settings['batch']} images: {source.name} has {images} training images",
            fix=f"use --batch {min(images, 64)}",
        )
    return recipes.resolve(name, images=images, size=size, depth=depth, settings=settings)


def _divided(source: Source, recipe: Recipe) -> Split:
    order = np.random.default_rng((recipe.seed, SPLIT)).permutation(len(source))
    test_share = 0.0 if source.splits else 0.1
    if recipe.split == "random":
        n_val = round(recipe.holdout * len(source))
        val, test, train = np.split(order, [n_val, n_val + int(test_share * len(source))])
    else:
        order = order[np.argsort(source.labels[order], kind="stable")]
        labels, counts = source.labels[order], np.bincount(source.labels)
        rank = np.arange(len(order)) - (np.cumsum(counts) - counts)[labels]
        n_tests = _class_shares(counts, test_share, counts - 1)
        n_vals = _class_shares(counts, recipe.holdout, counts - 1 - n_tests)
        is_val = rank < n_vals[labels]
        is_test = ~is_val & (rank < (n_vals + n_tests)[labels])
        val, test, train = order[is_val], order[is_test], order[~is_val & ~is_test]
    return Split(train=train, val=val, test=None if source.splits else test)


def _class_shares(counts: np.ndarray, share: float, limits: np.ndarray) -> np.ndarray:
    """Return the number of images to take from each class, int [classes]."""
    least = 1 if share else 0
    return np.round(share * counts).astype(int).clip(least, np.maximum(limits, 0))


def decode_size(size: int) -> int:
    """Return the shorter side to which photographs are decoded for crops of `size`, in pixels."""
    return math.ceil(augment.LARGEST_SCALE * size)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The input of one forward and backward pass.

    Attributes:
        inputs: float32 [N, 3, S, S], normalized, channels-last.
        labels: int64 [N].
        others: Labels of the images mixed in, int64 [N].
        share: Share of `labels` in the mix; 1 if nothing is mixed.
    """

    inputs: Tensor
    labels: Tensor
    others: Tensor
    share: float


class TrainLoader:
    """The training batches of one run, this process's part of them.

    Args:
        source: All images; Arrays of the net's size, or photographs.
        indices: The training images.
        preprocess: The net's input contract.
        recipe: Batch, order and augmentation.
        world: This process among several.
        device: Device of the augmentation.
        tally: Receives the broken images.
        workers: Threads that decode photographs; one per core by default.
        min_side: Smallest side of an image that the net takes, in pixels.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        preprocess: Preprocess,
        recipe: Recipe,
        *,
        world: World = ALONE,
        device: str = "cpu",
        tally: loader.DecodeErrors,
        workers: int | None = None,
        min_side: int = 4,
    ) -> None:
        self.source, self.indices, self.preprocess = source, np.asarray(indices), preprocess
        self.recipe, self.world, self.device, self.tally = recipe, world, device, tally
        self.workers, self.decoded, self.decode_seconds = workers, 0, 0.0
        self.min_side = min_side
        self._lock = threading.Lock()
        self.batch = recipe.batch
        self.steps_per_epoch = max(1, len(self.indices) // self.batch)
        self.total = recipe.total(self.steps_per_epoch)
        self.pixels: Tensor | None = None
        if isinstance(source, Arrays):
            self.pixels = torch.from_numpy(np.ascontiguousarray(source.images)).to(device)
        self.labels = torch.from_numpy(source.labels).to(device)
        self.flips = np.random.default_rng((recipe.seed, FLIP)).random(len(source)) < 0.5

    def decode_rate(self) -> float | None:
        """Return the photographs that a core decoded per second since the last call.

        Cached photographs do not count; None if none was decoded.
        """
        with self._lock:
            decoded, seconds = self.decoded, self.decode_seconds
            self.decoded, self.decode_seconds = 0, 0.0
        return decoded / seconds if seconds else None

    def steps(self, first: int, end: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Make the batches of steps `first` to `end` - 1 of the run, all in one epoch.

        Yields:
            (step, the parts of its batch).

        Raises:
            DataError: No image of a part can be decoded, or too many images cannot.
        """
        epoch = first // self.steps_per_epoch
        order = self._order(np.random.default_rng((self.recipe.seed, ORDER, epoch)))
        parts = []
        for step in range(first, end):
            start = (step % self.steps_per_epoch) * self.batch
            chosen = order[start : start + self.batch]
            for micro in range(self.recipe.accumulate):
                own = self.world.part(len(chosen), self.recipe.accumulate, micro)
                parts.append((step, own, chosen[own]))
        loaded = self._gathered(parts) if self.pixels is not None else self._decoded(parts, epoch)
        ready: list[MicroBatch] = []
        for (step, own, _), (images, labels, mirrored) in zip(parts, loaded, strict=True):
            ready.append(self._augmented(step, own, images, labels, mirrored))
            if len(ready) == self.recipe.accumulate:
                yield step, ready
                ready = []

    def class_weights(self) -> np.ndarray:
        """Return the inverse frequency of each class; its mean over the training images is 1."""
        counts = np.bincount(self.source.labels[self.indices], minlength=len(self.source.classes))
        present = counts > 0
        weights = np.zeros(len(counts), np.float32)
        weights[present] = len(self.indices) / (present.sum() * counts[present])
        return weights

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """Return the order of the images of an epoch: each once, or each class equally often."""
        if self.recipe.balance != "sampling":
            return rng.permutation(self.indices)
        shares = self.class_weights()[self.source.labels[self.indices]].astype(np.float64)
        return rng.choice(self.indices, len(self.indices), p=shares / shares.sum())

    def side(self, step: int) -> int:
        """Return the side of the images of a step, in pixels."""
        return self.recipe.side_at(step, self.total, self.preprocess.size, self.min_side)

    def _gathered(self, parts: list[Part]) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        recipe = self.recipe
        assert self.pixels is not None
        for step, own, chosen in parts:
            rng = np.random.default_rng((recipe.seed, CROP, step))
            offsets = rng.integers(0, 2 * recipe.padding + 1, (2, self.batch))[:, own]
            mirrored = self._mirrored(step, own, chosen)
            images = augment.gather(
                self.pixels, chosen, offsets=offsets, mirrored=mirrored,
                padding=recipe.padding, mode=recipe.padding_mode,
            )  # fmt: skip
            labels = self.labels[augment.to_device(chosen, self.device)]
            yield images, labels, np.zeros(len(chosen), bool)

    def _decoded(
        self, parts: list[Part], epoch: int
    ) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        sides = {step: self.side(step) for step, _, _ in parts}
        items = ((int(index), sides[step]) for step, _, chosen in parts for index in chosen)

        def work(item: tuple[int, int]) -> np.ndarray | CorruptImage:
            started, cached = time.thread_time(), self._is_cached(item[0])
            try:
                return self._crop(item[0], epoch, item[1])
            except CorruptImage as error:
                return error
            finally:
                if not cached:  # a crop of cached pixels is much faster than a decoded image
                    with self._lock:
                        self.decoded += 1
                        self.decode_seconds += time.thread_time() - started

        results = loader.prefetch_map(work, items, self.workers)
        for step, own, chosen in parts:
            crops = [next(results) for _ in chosen]
            for (index, _), result in crops:
                if isinstance(result, CorruptImage):
                    self.tally.skip(index, result)
            good = [n for n, (_, result) in enumerate(crops) if isinstance(result, np.ndarray)]
            if not good:
                raise DataError(f"{self.source.name}: no image of step {step} could be decoded")
            # A good image of the same part replaces a broken one, so other steps do not change.
            filled = np.array(good)[np.arange(len(crops)) % len(good)]
            filled[good] = good
            images = augment.stack_to_device([crops[n][1] for n in filled], self.device)
            labels = self.labels[augment.to_device(chosen[filled], self.device)]
            yield images.permute(0, 3, 1, 2), labels, self._mirrored(step, own, chosen)[filled]

    def _is_cached(self, index: int) -> bool:
        source, at_least = self.source, decode_size(self.preprocess.size)
        return isinstance(source, Subset) and source.holds(index, at_least)

    def _crop(self, index: int, epoch: int, side: int) -> np.ndarray:
        rng = np.random.default_rng((self.recipe.seed, CROP, epoch, index))
        image = self.source.image(index, at_least=decode_size(self.preprocess.size))
        height, width = image.shape[:2]
        if self.recipe.crop == "scale":
            box = augment.scale_box(height, width, self.preprocess.size, rng)
        else:
            low, high = self.recipe.area
            box = augment.area_box(height, width, rng, area=(low, high))
        return augment.crop_and_resize(image, box, side)

    def _mirrored(self, step: int, own: slice, chosen: np.ndarray) -> np.ndarray:
        if self.recipe.flip == "none":
            return np.zeros(len(chosen), bool)
        if self.recipe.flip == "alternate":  # each image both ways in any two epochs
            mirrored: np.ndarray = self.flips[chosen] ^ (step // self.steps_per_epoch % 2 == 1)
            return mirrored
        drawn = np.random.default_rng((self.recipe.seed, FLIP, step)).random(self.batch)
        mirrored = drawn < 0.5
        return mirrored[own]

    def _augmented(
        self, step: int, own: slice, images: Tensor, labels: Tensor, mirrored: np.ndarray
    ) -> MicroBatch:
        """Augment cropped images. Draws random numbers for the whole batch, and uses its part."""
        recipe, side = self.recipe, self.side(step)
        rng = np.random.default_rng((recipe.seed, STEP, step))
        images = augment.mirror(images, mirrored)
        if recipe.trivial_augment:
            images = trivial.trivial_augment(images, trivial.draw(rng, self.batch)[own])
        if recipe.colour:
            strengths = rng.normal(0, recipe.colour, (self.batch, 3))[own]
            images = augment.shift_colours(images, strengths)
        inputs = augment.normalize(images, self.preprocess)
        inputs = augment.shrink(inputs, side)
        if recipe.erasing:
            boxes = augment.erasing_boxes(rng, self.batch, side, recipe.erasing)[own]
            inputs = augment.erase(inputs, boxes)
        share, others = 1.0, labels
        mixes = [name for name in ("mixup", "cutmix") if getattr(recipe, name)]
        if mixes and len(labels) > 1:
            mix = mixes[int(rng.integers(len(mixes)))]
            alpha = getattr(recipe, mix)
            share, others = float(rng.beta(alpha, alpha)), labels.roll(1)
            if mix == "mixup":
                inputs = augment.mixup(inputs, share)
            else:
                inputs, share = augment.cutmix(inputs, augment.cutmix_box(rng, side, share))
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        return MicroBatch(inputs=inputs, labels=labels, others=others, share=share)


Part = tuple[int, slice, np.ndarray]
"""A step, this process's slice of its batch, and the indices of its images."""
