"""Which images go into which step, and how they are changed on the way.

All of it follows from (seed, step) and (seed, epoch, image): nothing has to be restored when a
run is resumed at any step, and nothing depends on the number of threads or processes.

Small sets lie on the device as one uint8 tensor. Photographs are decoded and cut in threads,
handed over as uint8, and changed on the device in batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rtresnet.core.errors import DataError
from rtresnet.core.preprocess import Preprocess
from rtresnet.data import augment, loader, trivial
from rtresnet.data.crops import WORKING, area_box, cut, scale_box
from rtresnet.data.decode import CorruptImage
from rtresnet.data.sources import Arrays, Source
from rtresnet.data.transfer import stack_to_device, to_device
from rtresnet.training.distributed import ALONE, World
from rtresnet.training.recipe import Recipe

# What a random generator is for, next to the seed: no two of them share a stream.
SPLIT, ORDER, STEP, CROP, FLIP = range(5)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Indices of training and held-out images; `test` is None where the set has its own."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray | None


def split(source: Source, seed: int, holdout: float = 0.1) -> Split:
    """Holds a share out for choosing (45k/5k in section 4.2); a tenth for testing if need be.

    Raises:
        DataError: Fewer than 20 images.
    """
    if len(source) < 20:
        raise DataError(f"{source.name}: {len(source)} images are too few to train and to hold out")
    order = np.random.default_rng((seed, SPLIT)).permutation(len(source))
    held, tenth = round(holdout * len(source)), len(source) // 10
    if source.splits:
        return Split(train=order[held:], val=order[:held], test=None)
    return Split(train=order[held + tenth :], val=order[:held], test=order[held : held + tenth])


def at_least(size: int) -> int:
    """The shorter side that a photograph is decoded to for crops of `size`, in pixels."""
    return math.ceil(WORKING * size)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward and backward pass takes.

    Attributes:
        inputs: float32 [N, 3, S, S], normalized, channels-last.
        labels: int64 [N].
        others: Labels of what is mixed in, int64 [N].
        share: Of `labels` in the mix; 1 where nothing is mixed.
    """

    inputs: Tensor
    labels: Tensor
    others: Tensor
    share: float


class TrainLoader:
    """The training images of one run, as this process sees them.

    Args:
        source: All images; Arrays of the net's size, or photographs.
        indices: Those to train on.
        preprocess: The net's input contract.
        recipe: Batch, order and augmentation.
        world: Which part of each batch is ours.
        device: Where the augmentation runs.
        tally: Takes the broken images.
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
    ) -> None:
        self.source, self.indices, self.preprocess = source, np.asarray(indices), preprocess
        self.recipe, self.world, self.device, self.tally = recipe, world, device, tally
        self.batch = recipe.batch
        self.steps_an_epoch = max(1, len(self.indices) // self.batch)
        self.total = recipe.total(self.steps_an_epoch)
        self.pixels: Tensor | None = None
        if isinstance(source, Arrays):
            self.pixels = torch.from_numpy(np.ascontiguousarray(source.images)).to(device)
        self.labels = torch.from_numpy(source.labels).to(device)
        self.flips = np.random.default_rng((recipe.seed, FLIP)).random(len(source)) < 0.5

    def steps(self, first: int, end: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Steps `first` to `end` - 1 of the run, which must lie in one epoch.

        Yields:
            (step, its parts, one after another).

        Raises:
            DataError: A part of which no image can be decoded, or too many that cannot.
        """
        epoch = first // self.steps_an_epoch
        order = np.random.default_rng((self.recipe.seed, ORDER, epoch)).permutation(self.indices)
        parts = []
        for step in range(first, end):
            start = (step % self.steps_an_epoch) * self.batch
            chosen = order[start : start + self.batch]
            for micro in range(self.recipe.accumulate):
                place = self.world.part(len(chosen), self.recipe.accumulate, micro)
                parts.append((step, place, chosen[place]))
        found = self._held(parts) if self.pixels is not None else self._decoded(parts, epoch)
        ready: list[MicroBatch] = []
        for (step, place, _), (images, labels, mirrored) in zip(parts, found, strict=True):
            ready.append(self._micro(step, place, images, labels, mirrored))
            if len(ready) == self.recipe.accumulate:
                yield step, ready
                ready = []

    def side(self, step: int) -> int:
        """Side of the images of a step, in pixels."""
        return self.recipe.side_at(step, self.total, self.preprocess.size)

    def _held(self, parts: list[Part]) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        recipe = self.recipe
        assert self.pixels is not None
        for step, place, chosen in parts:
            rng = np.random.default_rng((recipe.seed, CROP, step))
            offsets = rng.integers(0, 2 * recipe.padding + 1, (2, self.batch))[:, place]
            images = augment.gather(
                self.pixels,
                chosen,
                offsets=offsets,
                mirrored=self._mirrored(step, place, chosen),
                padding=recipe.padding,
                mode=recipe.padding_mode,
            )
            yield images, self.labels[to_device(chosen, self.device)], np.zeros(len(chosen), bool)

    def _decoded(
        self, parts: list[Part], epoch: int
    ) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        sides = {step: self.side(step) for step, _, _ in parts}
        wanted = ((int(index), sides[step]) for step, _, chosen in parts for index in chosen)

        def work(item: tuple[int, int]) -> np.ndarray | CorruptImage:
            try:
                return self._cut(item[0], epoch, item[1])
            except CorruptImage as error:
                return error

        results = loader.prefetch_map(work, wanted)
        for step, place, chosen in parts:
            cuts = [next(results) for _ in chosen]
            for (index, _), result in cuts:
                if isinstance(result, CorruptImage):
                    self.tally.skip(index, result)
            good = [n for n, (_, result) in enumerate(cuts) if isinstance(result, np.ndarray)]
            if not good:
                raise DataError(f"{self.source.name}: no image of step {step} could be decoded")
            # A broken image's place goes to a good one of the same part: later steps keep theirs.
            filled = np.array(good)[np.arange(len(cuts)) % len(good)]
            filled[good] = good
            images = stack_to_device([cuts[n][1] for n in filled], self.device)
            labels = self.labels[to_device(chosen[filled], self.device)]
            yield images.permute(0, 3, 1, 2), labels, self._mirrored(step, place, chosen)[filled]

    def _cut(self, index: int, epoch: int, side: int) -> np.ndarray:
        rng = np.random.default_rng((self.recipe.seed, CROP, epoch, index))
        image = self.source.image(index, at_least=at_least(self.preprocess.size))
        height, width = image.shape[:2]
        if self.recipe.crop == "scale":
            box = scale_box(height, width, self.preprocess.size, rng)
        else:
            box = area_box(height, width, rng, area=(self.recipe.area[0], self.recipe.area[1]))
        return cut(image, box, side)

    def _mirrored(self, step: int, place: slice, chosen: np.ndarray) -> np.ndarray:
        if self.recipe.flip == "none":
            return np.zeros(len(chosen), bool)
        if self.recipe.flip == "alternate":  # each image is seen both ways in any two epochs
            mirrored: np.ndarray = self.flips[chosen] ^ (step // self.steps_an_epoch % 2 == 1)
            return mirrored
        drawn = np.random.default_rng((self.recipe.seed, FLIP, step)).random(self.batch)
        mirrored = drawn < 0.5
        return mirrored[place]

    def _micro(
        self, step: int, place: slice, images: Tensor, labels: Tensor, mirrored: np.ndarray
    ) -> MicroBatch:
        """Everything behind decoding and cropping. Draws for the whole batch, takes its part."""
        recipe, side = self.recipe, self.side(step)
        rng = np.random.default_rng((recipe.seed, STEP, step))
        images = augment.mirror(images, mirrored)
        if recipe.trivial_augment:
            images = trivial.trivial_augment(images, trivial.draw(rng, self.batch)[place])
        if recipe.colour:
            strengths = rng.normal(0, recipe.colour, (self.batch, 3))[place]
            images = augment.shift_colours(images, strengths)
        inputs = augment.normalize(images, self.preprocess)
        inputs = augment.shrink(inputs, side)
        if recipe.erasing:
            boxes = augment.erasing_boxes(rng, self.batch, side, recipe.erasing)[place]
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
"""A step, the part of its batch that is ours, and the images of that part."""
