"""Batches of a source's images: decoded in threads, broken images counted and reported.

A batch for evaluation and calibration is float32 NCHW, ready for a net. A batch for training is
uint8 NHWC and is augmented and normalized on the device (`augment.py`). Pillow and NumPy release
the GIL while they decode and resize, so threads are enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from rtresnet.core import hardware
from rtresnet.core.errors import DataError
from rtresnet.core.preprocess import Preprocess
from rtresnet.data.decode import CorruptImage
from rtresnet.data.sources import Source

T = TypeVar("T")
U = TypeVar("U")

TOLERATED = 0.01  # share of broken images above which the data set is refused


class DecodeErrors:
    """Counts broken images, reports each once, and raises if there are too many.

    Args:
        total: Number of images.
        warn: Called with a line for each broken image, as `Reporter.note`.
        tolerated: Share of broken images that is accepted.
        known: Number of images that were left out before; they count as broken.
        fix: What to do where there are too many.
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
        """Counts and reports one broken image.

        Raises:
            DataError: More images are broken than tolerated.
        """
        if index in self.skipped:
            return
        self.skipped[index] = str(error)
        self.warn(f"skipped {error}")
        broken = self.known + len(self.skipped)
        if broken / self.total > self.tolerated:
            raise DataError(
                f"{broken} of {self.total} images cannot be decoded, more than "
                f"{100 * self.tolerated:g}%: the last one is {error}",
                fix=self.fix,
            )


def indexed(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    transform: Callable[[int, np.ndarray], np.ndarray],
    tally: DecodeErrors,
) -> Iterator[tuple[int, np.ndarray]]:
    """Decodes and transforms images in order, a few in advance; leaves out broken ones.

    Args:
        source: The images.
        indices: Which images, in which order.
        transform: Called with an index and its uint8 image [H, W, 3], in a thread.
        tally: Takes the broken images.

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
    """Maps items in threads and in order, some items in advance. Raises what `work` raises.

    Args:
        work: Called with each item.
        items: Taken as they are needed.
        threads: One for each core by default.

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
    """Makes batches for evaluation and calibration.

    Args:
        source: The images.
        preprocess: How an image becomes the net's input.
        size: Images in a batch; the last batch may be smaller.
        indices: Which images, in which order; all of them by default.
        tally: Takes the broken images.

    Yields:
        (images as the file takes them, int64 labels [N]).
    """
    chosen = range(len(source)) if indices is None else indices
    tally = tally or DecodeErrors(len(source))
    images: list[np.ndarray] = []
    kept: list[int] = []
    for index, image in indexed(source, chosen, lambda _, im: preprocess.crop(im), tally):
        images.append(image)
        kept.append(index)
        if len(images) == size:
            yield preprocess.prepare(np.stack(images)), source.labels[kept]
            images, kept = [], []
    if images:
        yield preprocess.prepare(np.stack(images)), source.labels[kept]


def sample(source: Source, n: int, seed: int = 0) -> np.ndarray:
    """Draws `n` indices, spread evenly over the classes; the same for the same seed."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(source))
    # Each image's rank within its class: sorting by it takes one of every class in turn.
    rank = np.empty(len(order), int)
    counts: dict[int, int] = {}
    for position, index in enumerate(order):
        label = int(source.labels[index])
        rank[position] = counts.get(label, 0)
        counts[label] = rank[position] + 1
    return order[np.argsort(rank, kind="stable")][:n]


def batch_size(preprocess: Preprocess) -> int:
    """Batch size that keeps activations below some hundred MB: 128 at 32 pixels, 4 at 224."""
    return int(np.clip(128 * 32**2 / preprocess.size**2, 4, 128))
