"""Histograms of activations, and the methods that choose a clipping point from one. Pure NumPy.

max         the largest magnitude: nothing is clipped
percentile  the magnitude that 99.99 % of the values do not exceed
entropy     the least divergence of the histogram in 128 levels (Migacz, GTC 2017); INT8 only
mse         the least mean square of rounding and clipping errors

A histogram has a few kB per tensor for any number of images. It contains magnitudes because
activations are quantized symmetrically. When a value exceeds its range, the range doubles and two
bins are merged, so one pass over the images is enough.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rtresnet.core.errors import DataError
from rtresnet.quantization.number_formats import INT8, SMALLEST, NumberFormat

BINS = 8192
SAMPLE = 1 << 16  # values per batch that enter the histogram, evenly spread
LEVELS = 128
PERCENTILE = 99.99
CANDIDATES = 160  # clipping points that entropy and mse try


class Histogram:
    """Magnitudes of one tensor.

    Attributes:
        largest: The largest magnitude of all values.
        counts: float64 [BINS], over [0, limit].
        limit: Upper end of the histogram.
        channels: The largest magnitude per channel (axis 1), float32 [C].
        means: The mean per channel, float64 [C].
        n: Number of images.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.largest, self.limit = 0.0, 0.0
        self.counts = np.zeros(BINS)
        self.channels: np.ndarray = np.zeros(1, np.float32)
        self.means: np.ndarray = np.zeros(1)
        self.n = 0

    def add(self, values: np.ndarray) -> None:
        """Add the values of one batch, [N, C, ...].

        Raises:
            DataError: A value is not finite.
        """
        flat = values.ravel()
        axes = tuple(axis for axis in range(values.ndim) if axis != 1)
        peaks = np.maximum(values.max(axes), -values.min(axes))
        peak = float(peaks.max())
        if not np.isfinite(peak):
            raise DataError(f"{self.name} is not finite on the calibration images")
        self.largest = max(self.largest, peak)
        self.channels = np.maximum(self.channels, peaks)
        share = len(values) / (self.n + len(values))
        self.means = self.means + share * (values.mean(axes, dtype=np.float64) - self.means)
        self.n += len(values)
        if self.largest == 0:
            return
        if self.limit == 0:
            self.limit = self.largest
        while self.limit < self.largest:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2)])
            self.limit *= 2
        # An odd stride does not align with rows or channels.
        sample = flat[:: max(1, len(flat) // SAMPLE) | 1]
        index = np.abs(sample) * np.float32(BINS / self.limit)
        index = np.minimum(index, BINS - 1).astype(np.int32)
        self.counts += np.bincount(index, minlength=BINS)

    @property
    def centres(self) -> np.ndarray:
        """Magnitude in the middle of each bin, float64 [BINS]."""
        middle: np.ndarray = (np.arange(BINS) + 0.5) * (self.limit / BINS)
        return middle


def largest(histogram: Histogram, number_format: NumberFormat = INT8) -> float:
    """Return the largest magnitude."""
    return histogram.largest


def percentile(
    histogram: Histogram, number_format: NumberFormat = INT8, *, share: float = PERCENTILE
) -> float:
    """Return the magnitude that `share` percent of the values do not exceed."""
    total = histogram.counts.sum()
    if total == 0:
        return histogram.largest
    reached = np.cumsum(histogram.counts) >= total * share / 100
    return min(histogram.largest, (int(reached.argmax()) + 1) * histogram.limit / BINS)


def mse(histogram: Histogram, number_format: NumberFormat = INT8) -> float:
    """Return the clipping point with the least squared error in a number format."""
    counts, centres = histogram.counts, histogram.centres
    if counts.sum() == 0:
        return histogram.largest
    limits = histogram.largest * np.linspace(1 / CANDIDATES, 1, CANDIDATES)
    steps = limits[:, None] / number_format.largest
    quantized = number_format.round(centres / steps) * steps
    errors = ((quantized - centres) ** 2) @ counts
    return float(limits[int(errors.argmin())])


def entropy(histogram: Histogram, number_format: NumberFormat = INT8) -> float:
    """Return the clipping point with the least Kullback-Leibler divergence.

    The first bin is ignored: exact zeros (half of a ReLU's outputs) carry no information on the
    range and would hide the other values.
    """
    used = int(np.ceil(histogram.largest / histogram.limit * BINS)) if histogram.limit else 0
    counts = histogram.counts[:used].copy()
    if used <= LEVELS or counts[1:].sum() == 0:
        return histogram.largest
    counts[0] = 0
    best, least = used, np.inf
    for stop in np.unique(np.linspace(LEVELS, used, CANDIDATES).astype(int)):
        divergence = _divergence(counts, int(stop))
        if divergence < least:
            best, least = int(stop), divergence
    return min(histogram.largest, histogram.limit * best / BINS)


def _divergence(counts: np.ndarray, stop: int) -> float:
    """Return the divergence of values clipped at bin `stop` from the same values in 128 levels."""
    inside = counts[:stop]
    reference = inside.copy()
    reference[-1] += counts[stop:].sum()
    edges = np.arange(LEVELS) * stop // LEVELS
    occupied = np.add.reduceat((inside > 0).astype(float), edges)
    level = np.add.reduceat(inside, edges) / np.maximum(occupied, 1)
    candidate = np.repeat(level, np.diff(np.append(edges, stop))) * (inside > 0)
    if candidate.sum() == 0:
        return float("inf")
    p, q = reference / reference.sum(), candidate / candidate.sum()
    mass = p > 0
    # An empty bin of q where p has mass gets a tiny probability.
    return float(np.sum(p[mass] * np.log(p[mass] / np.maximum(q[mass], 1e-10))))


def noise(histogram: Histogram, scale: float, number_format: NumberFormat = INT8) -> float:
    """Return the mean square of the errors over the mean square of the values."""
    counts, centres = histogram.counts, histogram.centres
    power = float((centres**2) @ counts)
    if power == 0:
        return 0.0
    quantized = number_format.round(centres / scale) * scale
    return float(((quantized - centres) ** 2) @ counts) / power


METHODS: dict[str, Callable[[Histogram, NumberFormat], float]] = {
    "max": largest,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def methods(number_format: NumberFormat) -> list[str]:
    """Return the methods for a number format: entropy compares with levels of equal size."""
    return [name for name in METHODS if name != "entropy" or number_format is INT8]


def scale(limit: float, number_format: NumberFormat = INT8) -> float:
    """Return the scale of a clipping point; 1 for a tensor that is zero on every image."""
    step = limit / number_format.largest
    return step if step >= SMALLEST else 1.0
