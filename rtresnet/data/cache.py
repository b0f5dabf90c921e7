"""Decoded images kept in memory, where all of them fit: every epoch but the first decodes nothing.

The same bits as without: what a photograph is decoded to depends on the photograph and on
`at_least` alone.
"""

from __future__ import annotations

import contextlib
import threading

import numpy as np

from rtresnet.core import hardware
from rtresnet.data.decode import CorruptImage, Ends
from rtresnet.data.sources import Arrays, Source

PROBES = 48  # images that the size of all is estimated from


class Cached:
    """A source whose images are decoded once, as long as there is room.

    Threads may ask at the same time. What is handed out is read-only, since it is shared. A
    broken image is not kept: it raises CorruptImage each time it is asked for.

    Args:
        source: Where images come from at first.
        at_least: As images will be asked for; those asked for otherwise are not kept.
        budget: Bytes of pixels to keep at most.
    """

    def __init__(self, source: Source, *, at_least: int | None, budget: int) -> None:
        self.source, self.at_least, self.budget = source, at_least, budget
        self.name, self.classes, self.splits = source.name, source.classes, source.splits
        self.labels, self.named = source.labels, source.named
        self.held = 0
        self._images: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int, at_least: int | None = None) -> np.ndarray:
        """uint8 RGB [H, W, 3]. Raises CorruptImage."""
        if at_least != self.at_least:
            return self.source.image(index, at_least)
        found = self._images.get(index)
        if found is not None:
            return found
        image = self.source.image(index, at_least)
        with self._lock:
            if index not in self._images and self.held + image.nbytes <= self.budget:
                image.setflags(write=False)
                self._images[index] = image
                self.held += image.nbytes
            return self._images.get(index, image)

    def ends(self, index: int) -> Ends:
        """The source's."""
        return self.source.ends(index)

    def content(self, index: int) -> bytes:
        """The source's."""
        return self.source.content(index)

    def locate(self, index: int) -> str:
        """The source's."""
        return self.source.locate(index)

    def fingerprint(self) -> str:
        """The source's own."""
        return self.source.fingerprint()


def cached_or_same(source: Source, at_least: int | None, budget: int | None = None) -> Source:
    """The source behind a cache if all of it, by estimate, fits; else the source itself.

    A few dozen images spread over the set are decoded for the estimate.

    Args:
        source: Any; arrays lie in memory already.
        at_least: As images will be asked for.
        budget: Bytes of pixels. `default_budget()` by default, which is one process's alone:
            processes that share a machine share it.
    """
    if isinstance(source, Arrays):
        return source
    budget = default_budget() if budget is None else budget
    cached = Cached(source, at_least=at_least, budget=budget)
    sizes = []
    for index in np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int)):
        with contextlib.suppress(CorruptImage):
            sizes.append(cached.image(int(index), at_least).nbytes)
    fits = bool(sizes) and np.mean(sizes) * len(source) <= budget
    return cached if fits else source  # no probe could be decoded: the run will say why


def default_budget() -> int:
    """A quarter of the memory that is free, in bytes; 1 GB where that is not known."""
    available = hardware.available_memory()
    return 10**9 if available is None else available // 4
