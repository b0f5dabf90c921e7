"""The images of a run: checked, counted and made ready before its first step.

Small images are cropped into one array, photographs that fit into memory are decoded and kept, so
that the check costs nothing that the first epoch would not. Where photographs do not fit, only the
files' beginnings and ends are read (see `data/validation.py`), unless the job asks for more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtresnet.core import atomic_io
from rtresnet.core.errors import DataError, InputError
from rtresnet.core.reporter import escape_cell
from rtresnet.core.serialization import from_json
from rtresnet.data import cache, loader, validation
from rtresnet.data.sources import Arrays, Source, Subset
from rtresnet.data.validation import Progress, Scan
from rtresnet.models.checkpoint import Checkpoint
from rtresnet.training import train_loader
from rtresnet.training.config import TrainJob
from rtresnet.training.distributed import ALONE, World
from rtresnet.training.recipes import SMALL

BROKEN_LIST = "broken.txt"  # in the run's folder: every file that cannot be decoded
LISTED = 20  # of which so many are printed, and of identical images so many recorded
NAMED = 3  # classes or files that a sentence names
SMALL_SPLIT = 100  # images; below this the 95 % interval of an accuracy reaches 10 points or more
SMALL_CLASS = 10  # training images
IMBALANCE = 10  # largest over smallest class
SPLITS = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What is known of a run's images before its first step.

    Attributes:
        classes: Their names.
        counts: Split (train, val, test) to the images of each class; broken ones are left out.
        check: "decoded": every image was; "files": the beginning and end of every file was read;
            "arrays": there are no files.
        broken: Of the training images (train and val) and the test images: which cannot be
            decoded, as indices of the source.
        identical: Split (val, test) to how many of its images are also trained on, or held out;
            as stored, byte for byte.
        examples: Split to some of these: the other split's image, and the split's.
        transparent: Images with transparency, which are composited on white.
        max_broken: The share of broken images up to which the run goes on without them.
    """

    classes: tuple[str, ...]
    counts: dict[str, list[int]]
    check: str
    broken: dict[str, list[int]]
    identical: dict[str, int]
    examples: dict[str, list[tuple[str, str]]]
    transparent: int
    max_broken: float

    def record(self) -> dict[str, Any]:
        """As checkpoints keep it, which name the classes themselves."""
        entries = dataclasses.asdict(self)
        del entries["classes"]
        return entries

    def warnings(self) -> list[str]:
        """What makes the run's accuracy less certain than it looks, a sentence each."""
        found = []
        for split in ("val", "test"):
            found += self._small_split(split)
        found += self._small_classes()
        for split, count in self.identical.items():
            if count:
                others = "trained on" if split == "val" else "trained on or held out"
                other, own = self.examples[split][0]
                found.append(
                    f"{count} {SPLITS[split]} images are also {others}, such as {own} = {other}: "
                    f"the {SPLITS[split]} accuracy is too high"
                )
        return found

    def _small_split(self, split: str) -> list[str]:
        counts, found = self.counts[split], []
        total = sum(counts)
        if not total:  # nothing is held out, as the recipe asks
            return []
        name = SPLITS[split]
        if total < SMALL_SPLIT:
            found.append(
                f"the {name} split has {total} images: its accuracy is uncertain by up to "
                f"{98 / math.sqrt(total):.0f} points (95 %)"
            )
        few = [self.classes[label] for label, count in enumerate(counts) if count < 2]
        if few:
            found.append(f"the {name} split has fewer than 2 images of {_some(few, 'class')}")
        return found

    def _small_classes(self) -> list[str]:
        counts, found = self.counts["train"], []
        none = [self.classes[label] for label, count in enumerate(counts) if not count]
        few = [
            f"{self.classes[label]} ({count})"
            for label, count in enumerate(counts)
            if 0 < count < SMALL_CLASS
        ]
        if none:
            found.append(f"no training image of {_some(none, 'class')}: it cannot be learned")
        if few:
            found.append(f"fewer than {SMALL_CLASS} training images of {_some(few, 'class')}")
        largest, smallest = max(counts), min(count for count in counts if count)
        if largest >= IMBALANCE * smallest:
            found.append(
                f"class imbalance {largest / smallest:.0f}:1 ("
                f"{self.classes[counts.index(largest)]} {largest}, "
                f"{self.classes[counts.index(smallest)]} {smallest} training images): accuracy "
                "is mostly that of the large classes"
            )
        return found


def saved_report(last: Checkpoint) -> DataReport | None:
    """What a run's last.pt says of its images; None of a version that did not check them.

    Raises:
        InputError: It says something else.
    """
    if "images" not in last.training:
        return None
    try:
        return from_json(DataReport, last.training["images"] | {"classes": last.model.classes})
    except TypeError as error:
        raise InputError(
            f"the saved state's record of its images cannot be read ({error})",
            fix="resume with the version of rtresnet that began the run",
        ) from None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A run's images, ready.

    Attributes:
        source: Images to train on and to hold out, none of them known to be broken.
        test: The set's own test images, or None.
        parts: Indices of `source`.
        tally: Takes the images that turn out to be broken during the run.
        report: What was found when the run began.
    """

    source: Source
    test: Source | None
    parts: train_loader.Split
    tally: loader.DecodeErrors
    report: DataReport


def prepare(
    job: TrainJob,
    *,
    report: DataReport | None = None,
    world: World = ALONE,
    progress: Progress = lambda done, total: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Checks a run's images and makes them ready.

    Args:
        job: Whose images.
        report: Of the run that is resumed. Photographs are not checked again then.
        world: Over which the work is shared.
        progress: Called with the number of training images checked, and of all.
        warn: Gets a line for each broken image, up to a limit.

    Raises:
        DataError: More broken images than `job.max_broken` allows. All of them are named in
            broken.txt in the run's folder.
    """
    held = _hold(job, world)
    every = np.arange(len(job.source))
    scans: dict[str, Scan] = {}
    if report is None:
        scans["train"] = _scan(job.source, held, world, progress)
        if job.test is not None:
            decode = None if held.check != "decoded" else _smallest(job.test)
            scans["test"] = _scan(job.test, _Held(job.test, decode, held.check), world)
        broken = {split: entry.broken for split, entry in scans.items()}
        _settle(job, broken, world, warn)
        left_out = {split: list(entry) for split, entry in broken.items()}
    else:
        left_out = report.broken
        if held.crops is not None:
            known = np.setdiff1d(every, left_out["train"])
            again = validation.scan(job.source, known, decode=held.decode, progress=progress)
            for text in again.broken.values():
                raise DataError(f"{text}; the run began with this image", fix="restore the file")
    good = np.setdiff1d(every, left_out["train"])
    source = _without(held.source, left_out["train"])
    if held.crops is not None:
        crops = held.crops[good] if left_out["train"] else held.crops
        source = Arrays(
            job.source.name, crops, job.source.labels[good], job.source.classes,
            splits=job.source.splits,
        )  # fmt: skip
    parts = train_loader.split(source, job.recipe.seed, job.recipe.holdout)
    test = None if job.test is None else _without(job.test, left_out["test"])
    if report is None:
        report = _report(job, held.check, scans, left_out, good, parts, world)
    return Dataset(
        source=source,
        test=test,
        parts=parts,
        tally=loader.DecodeErrors(
            len(job.source), warn, tolerated=job.max_broken, known=len(left_out["train"]),
            fix="repair or remove them, or --resume with a larger --max-broken",
        ),
        report=dataclasses.replace(report, max_broken=job.max_broken),
    )  # fmt: skip


@dataclass(frozen=True)
class _Held:
    """Where a run's images are read from.

    Attributes:
        decode: Decodes the image of an index to stay there; None where nothing is decoded.
        check: As in `DataReport`.
        crops: Where `decode` puts small images.
    """

    source: Source
    decode: Callable[[int], object] | None
    check: str
    crops: np.ndarray | None = None


def _hold(job: TrainJob, world: World) -> _Held:
    source, contract, side = job.source, job.preprocess, job.preprocess.size
    check = "arrays" if isinstance(source, Arrays) else "decoded"
    if isinstance(source, Arrays) and (
        side > SMALL or (contract.resize == side and source.images.shape[1:3] == (side, side))
    ):
        return _Held(source, None, check)
    if side <= SMALL:
        crops = np.zeros((len(source), side, side, 3), np.uint8)

        def crop(index: int) -> None:
            crops[index] = contract.crop(source.image(index))

        return _Held(source, crop, check, crops)
    if job.cached:
        # Processes of one machine share its memory; each keeps what it comes across.
        smallest = train_loader.at_least(contract.size)
        kept = cache.cached_or_same(source, smallest, cache.default_budget() // world.size)
        if kept is not source:
            return _Held(kept, lambda index: kept.image(index, smallest), check)
    if job.decode_all:
        return _Held(source, _smallest(source), check)
    return _Held(source, None, "files")


def _smallest(source: Source) -> Callable[[int], object]:
    """Decodes images at the least cost that still finds all damage."""
    return lambda index: source.image(index, 1)


def _scan(
    source: Source,
    held: _Held,
    world: World,
    progress: Progress = lambda done, total: None,
) -> Scan:
    """All of a source's images, shared over the processes unless each needs all the pixels."""
    every = np.arange(len(source))
    if held.crops is not None:
        return validation.scan(source, every, decode=held.decode, progress=progress)
    mine = validation.scan(source, world.shard(every), decode=held.decode, progress=progress)
    return validation.merged(world.gather(mine))


def _settle(
    job: TrainJob, broken: dict[str, dict[int, str]], world: World, warn: Callable[[str], None]
) -> None:
    """Names the broken images; too many of them are an error."""
    lines = [text for entry in broken.values() for text in entry.values()]
    if not lines:
        return
    listed = job.out / BROKEN_LIST
    if world.is_main:
        atomic_io.write_text(listed, "".join(f"{escape_cell(line)}\n" for line in lines))
    for line in lines[:LISTED]:
        warn(f"broken: {escape_cell(line)}")
    if len(lines) > LISTED:
        warn(f"broken: {len(lines) - LISTED} more, all of them in {listed}")
    totals = {"train": len(job.source), "test": len(job.test) if job.test is not None else 0}
    shares = {split: len(entry) / totals[split] for split, entry in broken.items()}
    worst = max(shares, key=lambda split: shares[split])
    if shares[worst] > job.max_broken:
        enough = math.ceil(10_000 * shares[worst]) / 100  # rounded up: it will do
        more = f"; all of them in {listed}" if len(lines) > 1 else ""
        raise DataError(
            f"{len(broken[worst])} of {totals[worst]} {SPLITS[worst]} images cannot be decoded, "
            f"and {100 * job.max_broken:g} % are allowed ({next(iter(broken[worst].values()))}"
            f"{more})",
            fix=f"repair or remove them, or leave them out with --max-broken {enough:g}%",
        )


def _without(source: Source, broken: Sequence[int]) -> Source:
    if not broken:
        return source
    return Subset(source, np.setdiff1d(np.arange(len(source)), broken))


def _report(
    job: TrainJob,
    check: str,
    scans: dict[str, Scan],
    broken: dict[str, list[int]],
    good: np.ndarray,
    parts: train_loader.Split,
    world: World,
) -> DataReport:
    """Counts, and looks for images that are in two splits."""
    source, test = job.source, job.test
    train, val = good[parts.train], good[parts.val]
    if test is None:
        assert parts.test is not None
        test, tested, looked = source, good[parts.test], scans["train"]
    else:
        tested = np.setdiff1d(np.arange(len(test)), broken["test"])
        looked = scans["test"]
    own = scans["train"]
    pairs = {}
    if world.is_main:  # images that seem identical are read in full, by one process
        both = own.of(np.concatenate([train, val]))
        pairs = {
            "val": validation.identical(source, own.of(train), source, own.of(val)),
            "test": validation.identical(source, both, test, looked.of(tested)),
        }
    pairs = world.broadcast(pairs)
    where = {"val": source, "test": test}
    labels = {"train": source.labels[train], "val": source.labels[val], "test": test.labels[tested]}
    return DataReport(
        classes=tuple(source.classes),
        counts={
            split: np.bincount(entry, minlength=len(source.classes)).tolist()
            for split, entry in labels.items()
        },
        check=check,
        broken=broken,
        identical={split: len(entry) for split, entry in pairs.items()},
        examples={
            split: [(source.locate(a), where[split].locate(b)) for a, b in entry[:LISTED]]
            for split, entry in pairs.items()
        },
        transparent=sum(entry.transparent for entry in scans.values()),
        max_broken=job.max_broken,
    )


def _some(names: Sequence[str], noun: str) -> str:
    """ "class a", "3 classes (a, b, c)", "9 classes (a, b, c, ...)"."""
    if len(names) == 1:
        return f"{noun} {names[0]}"
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} {noun}es ({', '.join(names[:NAMED])}{more})"
