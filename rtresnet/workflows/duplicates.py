"""Find near-duplicates: the same picture at a different size, compression or brightness.

Pairs are proposed by a perceptual hash of 64 bits and confirmed by the correlation of small
thumbnails. On the 846 first test images of CIFAR-10 the closest two hashes differ in 12 bits; all
copies at JPEG quality 75 and 90 and at half to triple size are found, and 839 at quality 50.

Images with no more detail than 16x16 pixels, such as the 8x8 scans of digits, can be as similar
without being copies: up to a correlation of 0.990, where copies have at least 0.996. They are
confirmed more strictly, by larger thumbnails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rtresnet.core.preprocess import resize
from rtresnet.data.sources import Source

SIDE = 32  # side of the grey image that is transformed
THUMBNAIL = 8
MAX_BITS = 7  # below the number of bytes, so that near hashes share at least one byte
MIN_CORRELATION = 0.97
MIN_COARSE_CORRELATION = 0.995  # correlation of SIDE x SIDE thumbnails
MIN_DETAIL = 0.002  # share of contrast; at least 0.004 in CIFAR-10 and ImageNet, 0.001 in digits

# Orthonormal DCT, [frequency, position].
_COSINES = np.cos(np.pi / (2 * SIDE) * np.outer(np.arange(SIDE), 2 * np.arange(SIDE) + 1))
_COSINES *= np.sqrt(np.where(np.arange(SIDE), 2, 1) / SIDE)[:, None]
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Features by which images are compared.

    Attributes:
        bits: Perceptual hash, uint8 [8]: which of the 64 lowest frequencies are above their
            median. Similar images have hashes that differ in few bits.
        coarse: Whether it has no more detail than 16x16 pixels.
    """

    bits: np.ndarray
    coarse: bool


@dataclass(frozen=True, kw_only=True)
class Hashes:
    """Fingerprints of a source's images.

    Attributes:
        source: The images.
        indices: Indices of the images, int64 [N].
        bits: uint8 [N, 8].
        coarse: bool [N].
    """

    source: Source
    indices: np.ndarray
    bits: np.ndarray
    coarse: np.ndarray

    @classmethod
    def of(cls, source: Source, fingerprints: Mapping[int, Fingerprint]) -> Hashes:
        """Collect the fingerprints of some images, by index."""
        indices = np.array(sorted(fingerprints), np.int64)
        own = [fingerprints[index] for index in indices.tolist()]
        bits = np.array([entry.bits for entry in own], np.uint8).reshape(-1, 8)
        coarse = np.array([entry.coarse for entry in own], bool)
        return cls(source=source, indices=indices, bits=bits, coarse=coarse)


def fingerprint(image: np.ndarray) -> Fingerprint:
    """Compute what an image is compared by.

    Args:
        image: uint8 [H, W, 3].
    """
    grey = resize(image, SIDE, SIDE).astype(np.float64) @ (0.299, 0.587, 0.114)
    waves = _COSINES @ grey @ _COSINES.T
    low = waves[:8, :8].ravel()
    energy = np.square(waves)
    contrast = energy.sum() - energy[0, 0]
    detail = contrast - (energy[: SIDE // 2, : SIDE // 2].sum() - energy[0, 0])
    return Fingerprint(
        bits=np.packbits(low > np.median(low[1:])), coarse=bool(detail < MIN_DETAIL * contrast)
    )


def near_pairs(first: Hashes, second: Hashes | None = None) -> list[tuple[int, int]]:
    """Find near-duplicates within a set of images, or between two.

    Of images with one hash only the first is compared with others. A picture without contrast has
    no near-duplicates: nothing distinguishes it from any other.

    Args:
        first: Hashes of images.
        second: Hashes of others; by default pairs within `first` are searched.

    Returns:
        (index in `first`, index in `second`), sorted. An image is paired with the first image
        that it duplicates.
    """
    other = second or first
    thumbnails: dict[tuple[bool, int, int], np.ndarray] = {}

    def thumbnail(is_second: bool, row: int, length: int) -> np.ndarray:
        key = is_second and second is not None, row, length
        if key not in thumbnails:
            side = other if is_second else first
            image = side.source.image(int(side.indices[row]), SIDE)
            small = resize(image, length, length).astype(np.float64)
            centred = (small - small.mean(axis=(0, 1))).ravel()
            thumbnails[key] = centred / max(float(np.linalg.norm(centred)), 1e-9)
        return thumbnails[key]

    def correlation(a: int, b: int, length: int) -> float:
        return float(thumbnail(False, a, length) @ thumbnail(True, b, length))

    pairs: dict[int, int] = {}
    for a, b in _candidates(first.bits, other.bits, within=second is None):
        if b in pairs or (second is None and a in pairs):
            continue
        if correlation(a, b, THUMBNAIL) < MIN_CORRELATION:
            continue
        coarse = first.coarse[a] and other.coarse[b]
        if not coarse or correlation(a, b, SIDE) >= MIN_COARSE_CORRELATION:
            pairs[b] = a
    return sorted((int(first.indices[a]), int(other.indices[b])) for b, a in pairs.items())


def _candidates(first: np.ndarray, second: np.ndarray, *, within: bool) -> list[tuple[int, int]]:
    """Return the sorted pairs of rows whose hashes differ in at most MAX_BITS bits."""
    hashes, rows = np.unique(first, axis=0, return_index=True)
    members: dict[bytes, list[int]] = {}
    for row, value in enumerate(second):
        members.setdefault(value.tobytes(), []).append(row)
    others = np.array([list(value) for value in members], np.uint8).reshape(-1, first.shape[1])
    lists = list(members.values())
    pairs: set[tuple[int, int]] = set()
    for byte in range(first.shape[1]):
        for value in np.intersect1d(hashes[:, byte], others[:, byte]):
            near = np.flatnonzero(others[:, byte] == value)
            for own in np.flatnonzero(hashes[:, byte] == value):
                distance = _ONES[hashes[own] ^ others[near]].sum(axis=1)
                for hit in near[distance <= MAX_BITS]:
                    same = distance[near == hit][0] == 0
                    candidates = lists[hit] if same or not within else lists[hit][:1]
                    pairs.update((int(rows[own]), row) for row in candidates)
    return sorted((a, b) for a, b in pairs if not within or a < b)
