"""Batches out of a source: decoded in threads, broken images counted and named.

For evaluation and calibration a batch is float32 NCHW, ready for a net; for training it is uint8
NHWC, and the rest happens on the device (`augment.py`). Pillow and NumPy release the GIL while
they decode and resize, so threads are enough.
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

TOLERATED = 0.01  # the share of broken images above which the data is at fault, not an image


class DecodeErrors:
    """Broken images: named once, counted, and too many of them an error.

    Args:
        total: How many images there are.
        warn: Called with a line for each broken image.
        tolerated: The share of broken images that is no error.
        known: How many are left out already, and count too.
        fix: What mends it where there are too many.
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
        """Notes one broken image.

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
    """Decodes and transforms images in order, a few ahead, leaving out the broken ones.

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
    """Maps in threads, in order, a few items ahead of who asks. What `work` raises comes out."""
    threads = threads or hardware.cores()
    with ThreadPoolExecutor(threads) as pool:
        waiting = iter(items)
        pending = deque((i, pool.submit(work, i)) for i in islice(waiting, 8 * threads))
        try:
            while pending:
                item, future = pending.popleft()
                result = future.result()
                for following in islice(waiting, 1):
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
    """Evaluation batches.

    Args:
        source: The images.
        preprocess: The net's input contract.
        size: Images a batch; the last one may be smaller.
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
    """`n` indices spread evenly over the classes, the same for the same seed."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(source))
    # Each image's rank within its class: sorting by it takes one of every class in turn.
    rank = np.empty(len(order), int)
    seen: dict[int, int] = {}
    for position, index in enumerate(order):
        label = int(source.labels[index])
        rank[position] = seen.get(label, 0)
        seen[label] = rank[position] + 1
    return order[np.argsort(rank, kind="stable")][:n]


def batch_size(preprocess: Preprocess) -> int:
    """A batch that keeps a net's activations within some hundred MB: 128 at 32 pixels, 4 at 224."""
    return int(np.clip(128 * 32**2 / preprocess.size**2, 4, 128))
