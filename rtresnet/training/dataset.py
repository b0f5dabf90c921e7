"""The images of a run: checked, counted and loaded before its first step.

Small images are cropped into one array; photographs that fit into memory are decoded and cached. So
the check adds no cost to that of the first epoch. If photographs do not fit, only the
beginning and end of each file are read (`data/validation.py`), unless the job asks for more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rtresnet.core import atomic_io
from rtresnet.core.errors import DataError, InputError
from rtresnet.core.reporter import escape_cell
from rtresnet.core.serialization import from_json
from rtresnet.data import validation
from rtresnet.data.loader import DecodeErrors, cached_or_same, default_budget
from rtresnet.data.sources import Arrays, Source, Subset
from rtresnet.data.validation import Progress, Scan
from rtresnet.models.checkpoint import Checkpoint
from rtresnet.training.config import TrainJob
from rtresnet.training.data_report import SPLITS, DataReport
from rtresnet.training.distributed import ALONE, World
from rtresnet.training.loader import Split, decode_size, split
from rtresnet.training.recipes import SMALL_IMAGE

BROKEN_LIST = "broken.txt"  # in the run's folder: every file that cannot be decoded
LISTED = 20  # broken files that are printed, and identical images that are recorded


def saved_report(last: Checkpoint) -> DataReport | None:
    """Return the report in a run's checkpoint; None from a version that wrote none.

    Raises:
        InputError: The report is not readable.
    """
    if "images" not in last.training:
        return None
    try:
        return from_json(DataReport, last.training["images"] | {"classes": last.model.classes})
    except TypeError as error:
        raise InputError(
            f"the checkpoint's record of its images cannot be read ({error})",
            fix="resume with the version of rtresnet that started the run",
        ) from None


@dataclass(frozen=True)
class Dataset:
    """The images of a run.

    Attributes:
        source: Training and held-out images, without broken ones.
        test: The set's own test images, or None.
        parts: Indices of `source` by split.
        tally: Receives images that turn out to be broken during the run.
        report: Report on the images from the start of the run.
        indices: Index in the job's source of each image of `source`.
    """

    source: Source
    test: Source | None
    parts: Split
    tally: DecodeErrors
    report: DataReport
    indices: np.ndarray


def prepare(
    job: TrainJob,
    *,
    report: DataReport | None = None,
    world: World = ALONE,
    progress: Progress = lambda done, total: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Check and load a run's images.

    Args:
        job: The job of the run.
        report: Report of the resumed run, whose photographs are not checked again.
        world: Processes that share the work.
        progress: Called with the number of training images checked, and of all.
        warn: Called with a line for each broken image, up to a limit.

    Raises:
        DataError: More images are broken than `job.max_broken` allows; broken.txt in the run's
            folder names all of them.
    """
    store = _open_store(job, world)
    scans: dict[str, Scan] = {}
    if report is None:
        scans["train"] = _scan(job.source, store, world, progress)
        if job.test is not None:
            decode = None if store.check != "decoded" else _decode_smallest(job.test)
            scans["test"] = _scan(job.test, _Store(job.test, decode, store.check), world)
        broken = {split: scan.broken for split, scan in scans.items()}
        _report_broken(job, broken, world, warn)
        left_out = {split: list(entries) for split, entries in broken.items()}
    else:
        left_out = report.broken
    good = np.setdiff1d(np.arange(len(job.source)), left_out["train"])
    if report is not None and store.crops is not None:
        again = validation.scan(job.source, good, decode=store.decode, progress=progress)
        for text in again.broken.values():
            raise DataError(f"{text}; the run started with this image", fix="restore the file")
    source = _without(store.source, left_out["train"])
    if store.crops is not None:
        crops = store.crops[good] if left_out["train"] else store.crops
        source = Arrays(
            job.source.name, crops, job.source.labels[good], job.source.classes,
            splits=job.source.splits,
        )  # fmt: skip
    parts = split(source, job.recipe)
    if report is None:
        report = _report(job, store.check, scans, left_out, good, parts, world)
    return Dataset(
        source=source,
        test=None if job.test is None else _without(job.test, left_out["test"]),
        parts=parts,
        tally=DecodeErrors(
            len(job.source), warn, tolerated=job.max_broken, known=len(left_out["train"]),
            fix="repair or remove them, or --resume with a larger --max-broken",
        ),
        report=dataclasses.replace(report, max_broken=job.max_broken),
        indices=good,
    )  # fmt: skip


@dataclass(frozen=True)
class _Store:
    """Storage of a run's images.

    Attributes:
        decode: Decodes the image of an index into memory; None if nothing is decoded.
        check: As in `DataReport`.
        crops: Array that `decode` fills with small images.
    """

    source: Source
    decode: Callable[[int], object] | None
    check: str
    crops: np.ndarray | None = None


def _open_store(job: TrainJob, world: World) -> _Store:
    source, contract, side = job.source, job.preprocess, job.preprocess.size
    check = "arrays" if isinstance(source, Arrays) else "decoded"
    if isinstance(source, Arrays) and (
        side > SMALL_IMAGE or (contract.resize == side and source.images.shape[1:3] == (side, side))
    ):
        return _Store(source, None, check)
    if side <= SMALL_IMAGE:
        crops = np.zeros((len(source), side, side, 3), np.uint8)

        def crop(index: int) -> None:
            crops[index] = contract.crop(source.image(index))

        return _Store(source, crop, check, crops)
    if job.cached:
        # Processes of one machine share its memory; each caches the images that it decodes.
        shorter = decode_size(contract.size)
        cache = cached_or_same(source, shorter, default_budget() // world.size)
        if cache is not source:
            return _Store(cache, lambda index: cache.image(index, shorter), check)
    if job.decode_all:
        return _Store(source, _decode_smallest(source), check)
    return _Store(source, None, "files")


def _decode_smallest(source: Source) -> Callable[[int], object]:
    """Decode at the smallest size, which still finds all damage."""
    return lambda index: source.image(index, 1)


def _scan(
    source: Source, store: _Store, world: World, progress: Progress = lambda done, total: None
) -> Scan:
    """Check all images, divided over the processes unless each needs all the pixels."""
    every = np.arange(len(source))
    if store.crops is not None:
        return validation.scan(source, every, decode=store.decode, progress=progress)
    own = validation.scan(source, world.shard(every), decode=store.decode, progress=progress)
    return validation.merged(world.gather(own))


def _report_broken(
    job: TrainJob, broken: dict[str, dict[int, str]], world: World, warn: Callable[[str], None]
) -> None:
    """Name the broken images; raise DataError if there are too many."""
    lines = [escape_cell(text) for entries in broken.values() for text in entries.values()]
    if not lines:
        return
    listed = job.out / BROKEN_LIST
    if world.is_main:
        atomic_io.write_text(listed, "".join(f"{line}\n" for line in lines))
    for line in lines[:LISTED]:
        warn(f"broken: {line}")
    if len(lines) > LISTED:
        warn(f"broken: {len(lines) - LISTED} more, all of them in {listed}")
    totals = {"train": len(job.source), "test": len(job.test) if job.test is not None else 0}
    shares = {split: len(entries) / totals[split] for split, entries in broken.items()}
    worst = max(shares, key=lambda split: shares[split])
    if shares[worst] > job.max_broken:
        sufficient = math.ceil(100 * len(broken[worst]) / totals[worst])  # enough for all
        more = f"; all of them in {listed}" if len(lines) > 1 else ""
        raise DataError(
            f"{len(broken[worst])} of {totals[worst]} {SPLITS[worst]} images cannot be decoded, "
            f"but only {100 * job.max_broken:g} % are allowed ({next(iter(broken[worst].values()))}"
            f"{more})",
            fix=f"repair or remove them, or ignore them with --max-broken {sufficient}%",
        )


def _without(source: Source, broken: Sequence[int]) -> Source:
    return Subset(source, np.setdiff1d(np.arange(len(source)), broken)) if broken else source


def _report(
    job: TrainJob,
    check: str,
    scans: dict[str, Scan],
    broken: dict[str, list[int]],
    good: np.ndarray,
    parts: Split,
    world: World,
) -> DataReport:
    """Count images, and find those that are in two splits."""
    source, test, scan = job.source, job.test, scans["train"]
    train, val = good[parts.train], good[parts.val]
    if test is None:
        assert parts.test is not None
        test, tested, test_scan = source, good[parts.test], scan
    else:
        tested, test_scan = np.setdiff1d(np.arange(len(test)), broken["test"]), scans["test"]
    pairs = {}
    if world.is_main:  # images that seem identical are read in full, by one process
        both = scan.of(np.concatenate([train, val]))
        pairs = {
            "val": validation.identical(source, scan.of(train), source, scan.of(val)),
            "test": validation.identical(source, both, test, test_scan.of(tested)),
        }
    pairs = world.broadcast(pairs)
    places = {"val": source, "test": test}
    labels = {"train": source.labels[train], "val": source.labels[val], "test": test.labels[tested]}
    return DataReport(
        classes=tuple(source.classes),
        counts={
            split: np.bincount(entries, minlength=len(source.classes)).tolist()
            for split, entries in labels.items()
        },
        check=check,
        broken=broken,
        identical={split: len(entries) for split, entries in pairs.items()},
        examples={
            split: [(source.locate(a), places[split].locate(b)) for a, b in entries[:LISTED]]
            for split, entries in pairs.items()
        },
        transparent=sum(entry.transparent for entry in scans.values()),
        max_broken=job.max_broken,
    )
