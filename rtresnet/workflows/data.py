"""Describe a data set before training: counts, sizes, broken and duplicate images, augmentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rtresnet.core import reporter
from rtresnet.core.config import Config, option
from rtresnet.core.reporter import Reporter
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import require_torch
from rtresnet.workflows.train_job import TrainConfig, new_job
from rtresnet.workflows.train_text import recipe_lines

if TYPE_CHECKING:
    from rtresnet.data.sources import Source
    from rtresnet.data.validation import Scan
    from rtresnet.workflows.duplicates import Hashes

PERCENTILES = (0, 5, 50, 95, 100)


@dataclass(frozen=True, kw_only=True)
class DataInspectConfig(Config):
    """Options of the search for duplicates."""

    near: bool = option(
        True,
        "Search for near-duplicates: copies at another size or compression.",
        names=("--near/--no-near",),
    )
    samples: int = option(4, "Sample images per class.", minimum=0, maximum=100)


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """An image of the data set.

    Attributes:
        split: "train", "test" or "all".
        index: Index of the split.
        place: Path of the file, or data set and index.
        label: Name of its class.
    """

    split: str
    index: int
    place: str
    label: str


@dataclass(frozen=True, kw_only=True)
class DuplicatePair:
    """Two images that show the same picture.

    Attributes:
        exact: Whether they are stored as the same bytes.
    """

    first: ImageRef
    second: ImageRef
    exact: bool


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """One split.

    Attributes:
        name: "train", "test" or "all".
        images: Number of images, without broken ones.
        counts: For each class, in the order of `DataInspectResult.classes`.
        broken: Error of each image that cannot be decoded; names the file.
        ignored: Notes on files that look like images and are not read, one for each reason.
        transparent: Number of images with transparency, which are composited on white.
        widths: Smallest, 5 %, median, 95 % and largest width, in pixels.
        heights: As `widths`.
        coarse: Number of images with no more detail than 16x16 pixels, such as 8x8 scans; two of
            them are near-duplicates only if they are almost equal. 0 without that search.
        samples: Some images of each class.
    """

    name: str
    images: int
    counts: tuple[int, ...]
    broken: tuple[str, ...]
    ignored: tuple[str, ...]
    transparent: int
    widths: tuple[int, ...]
    heights: tuple[int, ...]
    coarse: int
    samples: tuple[ImageRef, ...]


@dataclass(frozen=True, kw_only=True)
class DataInspectResult:
    """Result of `data`: the contents of a data set.

    Attributes:
        data: The data set as it was named.
        classes: Class names.
        splits: The splits; a single "all" if the data set has none.
        duplicates: Pairs of images that show the same picture, within and across splits; near ones
            only if the config asks for them.
    """

    data: str
    classes: tuple[str, ...]
    splits: tuple[SplitSummary, ...]
    duplicates: tuple[DuplicatePair, ...]

    def across(self) -> tuple[DuplicatePair, ...]:
        """Return the duplicates of which one image is trained on and the other one tests."""
        return tuple(p for p in self.duplicates if p.first.split != p.second.split)


@dataclass(frozen=True, kw_only=True)
class _Split:
    name: str
    source: Source
    scan: Scan
    sizes: dict[int, tuple[int, int]]
    hashes: Hashes

    def image(self, index: int) -> ImageRef:
        return ImageRef(
            split=self.name,
            index=index,
            place=self.source.locate(index),
            label=self.source.classes[self.source.labels[index]],
        )


def inspect_data(
    data: str,
    config: DataInspectConfig | None = None,
    *,
    reporter: Reporter = reporter.DEFAULT,
) -> DataInspectResult:
    """Decode every image of a data set and describe what it contains.

    Args:
        data: Labelled images, as in "digits", "folder:DIR" or "npz:FILE".
        config: What is searched for.
        reporter: Receives progress.

    Returns:
        Counts, sizes, broken images and duplicates.

    Raises:
        DataError: The data cannot be read.
        UnknownNameError: No such form of data.
    """
    require_torch("reading images")
    from rtresnet.data.sources import open_source

    config = config or DataInspectConfig()
    source = open_source(data, "train")
    names = ("train", "test") if source.splits else ("all",)
    splits = [_read(name, open_source(data, name), config, reporter) for name in names]
    with reporter.progress("comparing images"):
        pairs = [pair for one in range(len(splits)) for pair in _pairs(splits, one, config.near)]
    return DataInspectResult(
        data=data,
        classes=tuple(source.classes),
        splits=tuple(_summary(split, config.samples) for split in splits),
        duplicates=tuple(pairs),
    )


def _read(name: str, source: Source, config: DataInspectConfig, reporter: Reporter) -> _Split:
    from rtresnet.data import validation
    from rtresnet.workflows.duplicates import Fingerprint, Hashes, fingerprint

    sizes: dict[int, tuple[int, int]] = {}
    fingerprints: dict[int, Fingerprint] = {}

    def decode(index: int) -> None:
        image = source.image(index)
        sizes[index] = image.shape[:2]
        if config.near:
            fingerprints[index] = fingerprint(image)

    with reporter.progress(f"reading {name}", total=len(source)) as update:
        scan = validation.scan(
            source,
            np.arange(len(source)),
            decode=decode,
            progress=lambda done, total: update(done),
        )
    hashes = Hashes.of(source, fingerprints)
    return _Split(name=name, source=source, scan=scan, sizes=sizes, hashes=hashes)


def _pairs(splits: list[_Split], number: int, near: bool) -> Iterable[DuplicatePair]:
    """Return pairs of a split's images, and of its images with those of later splits."""
    from rtresnet.data.validation import identical
    from rtresnet.workflows.duplicates import near_pairs

    one = splits[number]
    good = one.scan.of(np.setdiff1d(one.scan.indices, list(one.scan.broken)))
    for other in splits[number:]:
        others = other.scan.of(np.setdiff1d(other.scan.indices, list(other.scan.broken)))
        same = [
            (a, b)
            for a, b in identical(one.source, good, other.source, others)
            if other is not one or a != b
        ]
        exact = set(same)
        for a, b in same:
            yield DuplicatePair(first=one.image(a), second=other.image(b), exact=True)
        for a, b in near_pairs(one.hashes, None if other is one else other.hashes) if near else ():
            if (a, b) not in exact:
                yield DuplicatePair(first=one.image(a), second=other.image(b), exact=False)


def _summary(split: _Split, samples: int) -> SplitSummary:
    from rtresnet.data.loader import sample
    from rtresnet.data.sources import ignored_files

    source, broken = split.source, split.scan.broken
    good = np.setdiff1d(np.arange(len(source)), list(broken))
    labels = source.labels[good]
    per_class: dict[int, list[int]] = {label: [] for label in range(len(source.classes))}
    for index in sample(source, len(source)).tolist():
        if index not in broken and len(per_class[source.labels[index]]) < samples:
            per_class[source.labels[index]].append(index)
    sizes = np.array([split.sizes[index] for index in good.tolist()]).reshape(-1, 2)
    heights, widths = (
        tuple(int(v) for v in np.percentile(column, PERCENTILES, method="nearest"))
        if len(good)
        else ()
        for column in sizes.T
    )
    return SplitSummary(
        name=split.name,
        images=len(good),
        counts=tuple(np.bincount(labels, minlength=len(source.classes)).tolist()),
        broken=tuple(broken.values()),
        ignored=tuple(ignored_files(source)),
        transparent=split.scan.transparent,
        widths=widths,
        heights=heights,
        coarse=int(split.hashes.coarse.sum()),
        samples=tuple(split.image(index) for indices in per_class.values() for index in indices),
    )


@dataclass(frozen=True, kw_only=True)
class AugmentedBatch:
    """Training images as the net receives them.

    Attributes:
        pixels: uint8 [N, S, S, 3], the normalization undone.
        labels: Class name of each image.
        mixed: Class name of the image that is mixed in; the label itself without mixing.
        share: Share of `labels` in the mix, in [0, 1].
        recipe: The recipe as `field=value` lines.
    """

    pixels: np.ndarray
    labels: tuple[str, ...]
    mixed: tuple[str, ...]
    share: float
    recipe: tuple[str, ...]


def augmented_batch(
    config: TrainConfig | None = None,
    *,
    images: int = 32,
    epoch: int = 0,
    stated: InputConfig | None = None,
) -> AugmentedBatch:
    """Make a batch as `train` would, from a sample of the training images.

    Args:
        config: As for `train`; its data, net and recipe count.
        images: Number of images.
        epoch: Number of the epoch, which changes the augmentation.
        stated: Input of the net that replaces the default.

    Returns:
        The images with the normalization undone, and their labels.

    Raises:
        InputError: Unknown names or values.
        DataError: The data cannot be read.
    """
    require_torch("training")
    from rtresnet.data.loader import DecodeErrors, sample
    from rtresnet.data.sources import Arrays, Subset
    from rtresnet.training.loader import TrainLoader
    from rtresnet.training.recipes import SMALL_IMAGE

    config = config or TrainConfig()
    job = new_job(Path(), config, stated or InputConfig())
    chosen = sample(job.source, min(images, len(job.source)))
    source: Source = Subset(job.source, chosen)
    if job.preprocess.size <= SMALL_IMAGE:
        crops = [job.preprocess.crop(source.image(index)) for index in range(len(source))]
        source = Arrays(job.source.name, np.stack(crops), source.labels, job.source.classes)
    recipe = dataclasses.replace(job.recipe, batch=len(chosen), accumulate=1)
    loader = TrainLoader(
        source, np.arange(len(chosen)), job.preprocess, recipe, tally=DecodeErrors(len(chosen))
    )
    ((_, (batch,)),) = loader.steps(epoch, epoch + 1)
    mean, std = (np.array(v)[:, None, None] for v in (job.preprocess.mean, job.preprocess.std))
    levels = 255 * (batch.inputs.numpy() * std + mean)
    classes = job.source.classes
    return AugmentedBatch(
        pixels=np.clip(np.round(levels), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1),
        labels=tuple(classes[label] for label in batch.labels.tolist()),
        mixed=tuple(classes[label] for label in batch.others.tolist()),
        share=batch.share,
        recipe=tuple(recipe_lines(job.recipe)),
    )
