"""Check a data set for broken, identical and transparent images.

Every image is read once, in threads. The caller chooses whether it is decoded in full, which finds
all damage, or only the beginning and end of its file are read, which takes two short reads per
image. Independent of training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rtresnet.core import hardware
from rtresnet.core.errors import DataError
from rtresnet.data.decode import FileEnds, declares_transparency
from rtresnet.data.loader import prefetch_map
from rtresnet.data.sources import Arrays, Source

CHUNK = 64  # images per task
READERS_PER_CORE = 4  # reading the ends of files waits for the disk

Progress = Callable[[int, int], None]
"""Called with the number of checked images and the total number."""


@dataclass(kw_only=True)
class Scan:
    """Result of reading some of a source's images.

    Attributes:
        indices: Indices of the images, int64 [N].
        keys: uint64 [N], equal for images with the same bytes, and almost always different for
            others.
        broken: Index of a broken image to its error, which names the file.
        transparent: Number of images that declare an alpha channel or a transparent colour.
    """

    indices: np.ndarray
    keys: np.ndarray
    broken: dict[int, str]
    transparent: int

    def of(self, chosen: np.ndarray) -> Scan:
        """Return the keys of some of the images, without the rest."""
        kept = np.isin(self.indices, chosen)
        return Scan(indices=self.indices[kept], keys=self.keys[kept], broken={}, transparent=0)


def scan(
    source: Source,
    indices: np.ndarray,
    *,
    decode: Callable[[int], object] | None = None,
    progress: Progress = lambda done, total: None,
) -> Scan:
    """Check images.

    Args:
        source: The images.
        indices: Indices of the images, int64 [N].
        decode: Decodes the image of an index; can cache the pixels. By default only images
            whose files look incomplete are decoded, at the smallest size.
        progress: Called after every few images.
    """
    chunks = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
    threads = hardware.cores() * (1 if decode else READERS_PER_CORE)
    parts, done = [], 0
    for chunk, part in prefetch_map(lambda chunk: _scan(source, chunk, decode), chunks, threads):
        parts.append(part)
        done += len(chunk)
        progress(done, len(indices))
    return merged(parts)


def merged(scans: Sequence[Scan]) -> Scan:
    """Combine scans of different images of one source, in the source's order."""
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
        except DataError as error:  # also if the file cannot be opened
            broken[index] = str(error)
        else:
            digest = hashlib.blake2b(b"%d " % ends.size + ends.tail, digest_size=8).digest()
            keys[place] = int.from_bytes(digest, "little")
    return Scan(indices=chunk, keys=keys, broken=broken, transparent=transparent)


def _transparent(source: Source, index: int, ends: FileEnds) -> bool:
    if ends.jpeg:
        return False
    known = declares_transparency(ends.head)
    return bool(declares_transparency(source.content(index)) if known is None else known)


def identical(source: Source, scan: Scan, other: Source, other_scan: Scan) -> list[tuple[int, int]]:
    """Find images of `other` that are stored as the same bytes as one of `source`.

    Does not find the same photograph at a different size or compression.

    Args:
        source: Images.
        scan: Scan of the images of `source` to compare.
        other: Images to look for; may be the same source.
        other_scan: Scan of the images of `other` to compare.

    Returns:
        (index in `source`, index in `other`), one pair for each such image of `other`.
    """
    common = np.intersect1d(scan.keys, other_scan.keys)
    known: dict[bytes, int] = {}
    for index in scan.indices[np.isin(scan.keys, common)]:
        known.setdefault(_digest(source, int(index)), int(index))
    pairs = []
    for index in np.sort(other_scan.indices[np.isin(other_scan.keys, common)]):
        digest = _digest(other, int(index))
        if digest in known:
            pairs.append((known[digest], int(index)))
    return pairs


def _digest(source: Source, index: int) -> bytes:
    return hashlib.blake2b(source.content(index), digest_size=16).digest()
