"""Confidence intervals for samples that depend on their neighbours: the circular block bootstrap.

Successive latencies are correlated (a clock that falls, a neighbour that computes), so drawing
samples one by one would promise too much. Blocks of successive samples are drawn instead (Politis
and Romano, 1992). Their length follows the automatic rule of Politis and White (2004), as corrected
by Patton, Politis and White (2009). Pure NumPy, seeded: the same samples give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

REPLICATES = 1000
FEWEST_BLOCKS = 5
"""An interval from fewer independent pieces would be a guess."""

Interval = tuple[float, float]


def block_length(series: np.ndarray) -> int:
    """Samples after which a series has forgotten itself, as far as a block bootstrap is concerned.

    Args:
        series: [n], in order of time.

    Returns:
        From 1, for independent samples, to min(3 sqrt(n), n / 3).
    """
    n = len(series)
    centred = np.asarray(series, np.float64) - np.mean(series)
    if n < 8 or not centred.any():
        return 1
    quiet = max(5, int(np.ceil(np.sqrt(np.log10(n)))))
    longest = int(np.ceil(np.sqrt(n))) + quiet
    covariance = _autocovariance(centred, min(longest + quiet, n - 1))
    if covariance[0] <= 1e-12 * float(np.abs(series).max()) ** 2:  # rounding, no variation
        return 1
    within = np.abs(covariance / covariance[0]) < 2 * np.sqrt(np.log10(n) / n)
    # The first lag after which `quiet` correlations in a row are no more than chance.
    silent = (lag for lag in range(longest) if within[lag + 1 : lag + 1 + quiet].all())
    bandwidth = min(2 * max(next(silent, longest), 1), longest, len(covariance) - 1)
    lags = np.arange(-bandwidth, bandwidth + 1)
    window = np.minimum(1, 2 * (1 - np.abs(lags) / bandwidth))
    terms = window * covariance[np.abs(lags)]
    spectrum = terms.sum()
    if spectrum <= 0:
        return 1
    slope = (np.abs(lags) * terms).sum()
    length = (1.5 * slope**2 / spectrum**2 * n) ** (1 / 3)
    return int(np.clip(round(length), 1, np.ceil(min(3 * np.sqrt(n), n / 3))))


def _autocovariance(centred: np.ndarray, lags: int) -> np.ndarray:
    size = 1 << (2 * len(centred) - 1).bit_length()
    power = np.abs(np.fft.rfft(centred, size)) ** 2
    return np.asarray(np.fft.irfft(power, size)[: lags + 1] / len(centred))


def resample(
    samples: np.ndarray, block: int, shares: Sequence[float] = (), *, seed: int = 0
) -> np.ndarray:
    """The mean and nearest-rank quantiles of resamples, all of them of the same resamples.

    Args:
        samples: [n], in order of time.
        block: Successive samples drawn together.
        shares: Of the quantiles.
        seed: Of the draw.

    Returns:
        [1 + quantiles, replicates]. Long series get fewer replicates, 200 at least.
    """
    n, rng = len(samples), np.random.default_rng(seed)
    order = np.argsort(samples, kind="stable")
    ordered = samples[order]
    blocks = -(-n // block)
    targets = np.asarray(shares) * (blocks * block) - 1e-9
    left = int(np.clip(1e7 / n, 200, REPLICATES))
    found = []
    while left:
        count = min(left, max(1, 100_000 // n))
        left -= count
        starts = rng.integers(n, size=(count, blocks)) + n * np.arange(count)[:, None]
        drawn = np.bincount(starts.ravel(), minlength=count * n).reshape(count, n)
        if block > 1:
            # A sample is drawn by every block that starts on it or less than a block before it.
            around = np.concatenate([drawn[:, n - block :], drawn], axis=1).cumsum(axis=1)
            drawn = around[:, block:] - around[:, :-block]
        row = np.empty((1 + len(shares), count))
        row[0] = drawn @ samples / (blocks * block)
        if len(shares):
            below = drawn[:, order].cumsum(axis=1)
            for place in range(count):
                row[1:, place] = ordered[np.searchsorted(below[place], targets)]
        found.append(row)
    return np.concatenate(found, axis=1)


def interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """The middle `level` of replicates."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
