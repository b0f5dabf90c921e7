"""Batches of a source's images, decoded in threads; and a cache of decoded images.

A batch for evaluation and calibration is float32 NCHW, ready for a net. Pillow and NumPy release
the GIL while they decode and resize, so threads are enough. `training/loader.py` makes the batches
for training.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from rtresnet.core import hardware
from rtresnet.core.errors import DataError
from rtresnet.core.preprocess import Preprocess
from rtresnet.data.decode import CorruptImage
from rtresnet.data.sources import Arrays, Source, Subset

T = TypeVar("T")
U = TypeVar("U")

TOLERATED = 0.01  # share of broken images above which a data set is rejected
PROBES = 48  # images that the size of all decoded images is estimated from


class DecodeErrors:
    """Counts broken images, reports each once, and raises if there are too many.

    Args:
        total: Number of images.
        warn: Called with a line for each broken image, as `Reporter.note`.
        tolerated: Allowed share of broken images.
        known: Number of images that were ignored before; they count as broken.
        fix: Instruction for the error message.
    """

    def __init__(
        self,
        total: int,
        warn: Callable[[str], None] = lambda line: None,
        *,
        tolerated: float = TOLERATED,
        known: int = 0,
        fix: str = "repair or remove them",
    ) -> None:
        self.total, self.warn, self.tolerated = total, warn, tolerated
        self.known, self.fix = known, fix
        self.skipped: dict[int, str] = {}

    def skip(self, index: int, error: CorruptImage) -> None:
        """Count and report one broken image.

        Raises:
            DataError: More images are broken than tolerated.
        """
        if index in self.skipped:
            return
        self.skipped[index] = str(error)
        self.warn(f"skipped {error}")
        self._require_tolerated()

    def merge(self, others: Iterable[Mapping[int, str]]) -> None:
        """Add the images that other processes could not read, given as `skipped`.

        Raises:
            DataError: More images are broken than tolerated.
        """
        for skipped in others:
            self.skipped |= skipped
        self._require_tolerated()

    def _require_tolerated(self) -> None:
        broken = self.known + len(self.skipped)
        if self.skipped and broken / self.total > self.tolerated:
            raise DataError(
                f"{broken} of {self.total} images cannot be decoded, which is more than "
                f"{100 * self.tolerated:g}%: the last one is {[*self.skipped.values()][-1]}",
                fix=self.fix,
            )


def indexed(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    transform: Callable[[int, np.ndarray], np.ndarray],
    tally: DecodeErrors,
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode and transform images in order, a few in advance; skip broken ones.

    Args:
        source: The images.
        indices: Indices of the images, in order.
        transform: Called with an index and its uint8 image [H, W, 3], in a thread.
        tally: Receives the broken images.

    Yields:
        (index, uint8 [S, S, 3]).
    """

    def work(index: int) -> np.ndarray | CorruptImage:
        try:
            return transform(index, source.image(index))
        except CorruptImage as error:
            return error

    for index, result in prefetch_map(work, (int(index) for index in indices)):
        if isinstance(result, CorruptImage):
            tally.skip(index, result)
        else:
            yield index, result


def prefetch_map(
    work: Callable[[T], U], items: Iterable[T], threads: int | None = None
) -> Iterator[tuple[T, U]]:
    """Map items in threads and in order, some in advance. Raises what `work` raises.

    Args:
        work: Called with each item.
        items: Read as they are needed.
        threads: One per core by default.

    Yields:
        (item, result).
    """
    threads = threads or hardware.cores()
    with ThreadPoolExecutor(threads) as pool:
        remaining = iter(items)
        pending = deque((i, pool.submit(work, i)) for i in islice(remaining, 8 * threads))
        try:
            while pending:
                item, future = pending.popleft()
                result = future.result()
                for following in islice(remaining, 1):
                    pending.append((following, pool.submit(work, following)))
                yield item, result
        finally:
            for _, future in pending:
                future.cancel()


def batches(
    source: Source,
    preprocess: Preprocess,
    size: int,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    tally: DecodeErrors | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Make batches for evaluation and calibration.

    Args:
        source: The images.
        preprocess: The net's input contract.
        size: Images per batch; the last batch may be smaller.
        indices: Indices of the images, in order; all by default.
        tally: Receives the broken images.

    Yields:
        (images as the artifact's input, int64 labels [N]).
    """
    chosen = range(len(source)) if indices is None else indices
    tally = tally or DecodeErrors(len(source))
    decoded = indexed(source, chosen, lambda _, image: preprocess.crop(image), tally)
    while part := list(islice(decoded, size)):
        images = preprocess.prepare(np.stack([image for _, image in part]))
        yield images, source.labels[[index for index, _ in part]]


def sample(source: Source, n: int) -> np.ndarray:
    """Draw `n` indices at random, balanced over the classes; the same ones in every call."""
    order = np.random.default_rng(0).permutation(len(source))
    labels = source.labels[order]
    # Each image's rank within its class: sorting by it takes the classes alternately.
    by_class = np.argsort(labels, kind="stable")
    rank = np.empty(len(order), int)
    rank[by_class] = np.arange(len(order)) - np.searchsorted(labels[by_class], labels[by_class])
    return order[np.argsort(rank, kind="stable")][:n]


def batch_size(preprocess: Preprocess) -> int:
    """Return a batch with activations of at most some hundred MB: 128 at 32 pixels, 4 at 224."""
    return int(np.clip(128 * 32**2 / preprocess.size**2, 4, 128))


class Cached(Subset):
    """A source whose images are decoded once, as far as the memory budget allows.

    The pixels are those of the source: they depend only on the image and on `at_least`. They are
    shared between threads and therefore read-only. A broken image is not cached: it raises
    CorruptImage each time.

    Args:
        source: The images.
        at_least: Value of later requests; images requested with another value are not cached.
        budget: Largest number of bytes of pixels to cache.
    """

    def __init__(self, source: Source, *, at_least: int | None, budget: int) -> None:
        super().__init__(source)
        self.at_least, self.budget, self.used = at_least, budget, 0
        self._images: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def image(self, index: int, at_least: int | None = None) -> np.ndarray:
        if at_least != self.at_least:
            return self.source.image(index, at_least)
        cached = self._images.get(index)
        if cached is not None:
            return cached
        image = self.source.image(index, at_least)
        with self._lock:
            if index not in self._images and self.used + image.nbytes <= self.budget:
                image.setflags(write=False)
                self._images[index] = image
                self.used += image.nbytes
            return self._images.get(index, image)

    def holds(self, index: int, at_least: int | None = None) -> bool:
        return at_least == self.at_least and index in self._images

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def cached_or_same(source: Source, at_least: int | None, budget: int) -> Source:
    """Put a cache before a source if all its images are estimated to fit, else return it.

    Decodes a few dozen images, evenly spaced, for the estimate.

    Args:
        source: Any source; arrays are in memory already.
        at_least: Value of later requests.
        budget: Bytes of pixels, such as `default_budget()`, divided by the machine's processes.
    """
    if isinstance(source, Arrays):
        return source
    cached = Cached(source, at_least=at_least, budget=budget)
    sizes = []
    for index in np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int)):
        with contextlib.suppress(CorruptImage):
            sizes.append(cached.image(int(index), at_least).nbytes)
    fits = bool(sizes) and np.mean(sizes) * len(source) <= budget
    return cached if fits else source


def default_budget() -> int:
    """Return a quarter of the free memory, in bytes; 1 GB if that is unknown."""
    available = hardware.available_memory()
    return 10**9 if available is None else available // 4
