"""Checks the images of a data set: which cannot be read, which are the same, which are transparent.

Every image is looked at once, in threads. Whether it is decoded in full, or only its file's
beginning and end are read, is the caller's choice: the first finds all damage, the second takes
two short reads an image, whatever its size. Knows nothing of training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rtresnet.core import hardware
from rtresnet.core.errors import DataError
from rtresnet.data.decode import Ends, declares_transparency
from rtresnet.data.loader import prefetch_map
from rtresnet.data.sources import Arrays, Source

CHUNK = 64  # images a thread takes at a time
READERS_A_CORE = 4  # reading a file's ends is waiting for a disk

Progress = Callable[[int, int], None]
"""Called with the number of images that are done, and of all images."""


@dataclass(kw_only=True)
class Scan:
    """What a look at some of a source's images has shown.

    Attributes:
        indices: Which images, int64 [N].
        keys: uint64 [N], the same for images that are stored as the same bytes, and with near
            certainty for those only.
        broken: Image's index to what is wrong with it; the text names the file.
        transparent: How many images declare an alpha channel or a transparent colour.
    """

    indices: np.ndarray
    keys: np.ndarray
    broken: dict[int, str]
    transparent: int

    def of(self, chosen: np.ndarray) -> Scan:
        """Keys of some of the images; what else was found is left out."""
        kept = np.isin(self.indices, chosen)
        return Scan(indices=self.indices[kept], keys=self.keys[kept], broken={}, transparent=0)


def scan(
    source: Source,
    indices: np.ndarray,
    *,
    decode: Callable[[int], object] | None = None,
    progress: Progress = lambda done, total: None,
) -> Scan:
    """Looks at images.

    Args:
        source: The images.
        indices: Which of them, int64 [N].
        decode: Decodes the image of an index, and may keep the pixels. By default only those are
            decoded, at their smallest, whose files do not begin and end as their formats ask.
        progress: Called after every few images.
    """
    chunks = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
    threads = hardware.cores() * (1 if decode else READERS_A_CORE)
    parts, done = [], 0
    for chunk, part in prefetch_map(lambda chunk: _scan(source, chunk, decode), chunks, threads):
        parts.append(part)
        done += len(chunk)
        progress(done, len(indices))
    return merged(parts)


def merged(scans: Sequence[Scan]) -> Scan:
    """Scans of different images of one source as one, in the source's order."""
    indices = np.concatenate([np.empty(0, np.int64), *(entry.indices for entry in scans)])
    keys = np.concatenate([np.empty(0, np.uint64), *(entry.keys for entry in scans)])
    order = np.argsort(indices)
    broken = {index: text for entry in scans for index, text in entry.broken.items()}
    return Scan(
        indices=indices[order],
        keys=keys[order],
        broken=dict(sorted(broken.items())),
        transparent=sum(entry.transparent for entry in scans),
    )


def _scan(source: Source, chunk: np.ndarray, decode: Callable[[int], object] | None) -> Scan:
    keys = np.zeros(len(chunk), np.uint64)
    broken, transparent = {}, 0
    for place, index in enumerate(map(int, chunk)):
        try:
            ends = source.ends(index)
            if decode is not None:
                decode(index)
            elif not isinstance(source, Arrays) and not ends.complete():
                source.image(index, 1)
            if not isinstance(source, Arrays):
                transparent += _transparent(source, index, ends)
        except DataError as error:  # also of a file that cannot be opened
            broken[index] = str(error)
        else:
            digest = hashlib.blake2b(b"%d " % ends.size + ends.tail, digest_size=8).digest()
            keys[place] = int.from_bytes(digest, "little")
    return Scan(indices=chunk, keys=keys, broken=broken, transparent=transparent)


def _transparent(source: Source, index: int, ends: Ends) -> bool:
    if ends.jpeg:
        return False
    known = declares_transparency(ends.head)
    return bool(declares_transparency(source.content(index)) if known is None else known)


def identical(source: Source, scan: Scan, other: Source, its: Scan) -> list[tuple[int, int]]:
    """Images of `other` that are stored as the same bytes as one of `source`.

    The same photograph at another size or compression is not found.

    Args:
        source: Images.
        scan: Of those that count.
        other: Images to be looked for; may be the same source.
        its: Of those that count.

    Returns:
        (index in `source`, index in `other`), one pair for each such image of `other`.
    """
    common = np.intersect1d(scan.keys, its.keys)
    ours: dict[bytes, int] = {}
    for index in scan.indices[np.isin(scan.keys, common)]:
        ours.setdefault(_digest(source, int(index)), int(index))
    pairs = []
    for index in np.sort(its.indices[np.isin(its.keys, common)]):
        digest = _digest(other, int(index))
        if digest in ours:
            pairs.append((ours[digest], int(index)))
    return pairs


def _digest(source: Source, index: int) -> bytes:
    return hashlib.blake2b(source.content(index), digest_size=16).digest()
