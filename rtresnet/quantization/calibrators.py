"""From a tensor's histogram to the magnitude at which it is clipped. Pure NumPy.

max         the largest seen: nothing is clipped
percentile  what 99.99 % of the values do not exceed
entropy     where the divergence of the 128-level histogram is smallest (Migacz, GTC 2017)
mse         where the mean square of rounding and clipping errors is smallest
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rtresnet.quantization.histogram import BINS, Histogram

LEVELS = 128
PERCENTILE = 99.99
TRIED = 160  # clipping points that entropy and mse try


def largest(histogram: Histogram) -> float:
    """The largest magnitude."""
    return histogram.largest


def percentile(histogram: Histogram, share: float = PERCENTILE) -> float:
    """The magnitude that `share` percent of the values do not exceed."""
    total = histogram.counts.sum()
    if total == 0:
        return histogram.largest
    reached = np.cumsum(histogram.counts) >= total * share / 100
    return min(histogram.largest, (int(reached.argmax()) + 1) * histogram.limit / BINS)


def mse(histogram: Histogram) -> float:
    """The clipping point of least squared error at 127 steps of equal size."""
    counts, centres = histogram.counts, histogram.centres
    if counts.sum() == 0:
        return histogram.largest
    tried = histogram.largest * np.linspace(1 / TRIED, 1, TRIED)
    steps = tried[:, None] / 127
    quantized = np.minimum(np.rint(centres / steps), 127) * steps
    errors = ((quantized - centres) ** 2) @ counts
    return float(tried[int(errors.argmin())])


def entropy(histogram: Histogram) -> float:
    """The clipping point of least Kullback-Leibler divergence.

    Exact zeros (half of what a ReLU puts out) say nothing of the range and would hide the rest:
    the first bin is left out.
    """
    used = int(np.ceil(histogram.largest / histogram.limit * BINS)) if histogram.limit else 0
    counts = histogram.counts[:used].copy()
    if used <= LEVELS or counts[1:].sum() == 0:
        return histogram.largest
    counts[0] = 0
    best, least = used, np.inf
    for stop in np.unique(np.linspace(LEVELS, used, TRIED).astype(int)):
        divergence = _loss(counts, int(stop))
        if divergence < least:
            best, least = int(stop), divergence
    return min(histogram.largest, histogram.limit * best / BINS)


def _loss(counts: np.ndarray, stop: int) -> float:
    """Divergence of the values clipped at bin `stop` from the same in 128 levels."""
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
    # An empty bin of q under mass of p counts as a tiny share.
    return float(np.sum(p[mass] * np.log(p[mass] / np.maximum(q[mass], 1e-10))))


def noise(histogram: Histogram, scale: float) -> float:
    """Mean square of rounding and clipping errors over the mean square of the values."""
    counts, centres = histogram.counts, histogram.centres
    power = float((centres**2) @ counts)
    if power == 0:
        return 0.0
    quantized = np.minimum(np.rint(centres / scale), 127) * scale
    return float(((quantized - centres) ** 2) @ counts) / power


METHODS: dict[str, Callable[[Histogram], float]] = {
    "max": largest,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def scale(limit: float) -> float:
    """The size of one of 127 steps; a tensor that is zero on every image gets a harmless one."""
    return limit / 127 if limit / 127 >= float(np.finfo(np.float32).tiny) else 1.0
