"""Statistics of latency samples: percentiles, and confidence intervals. Pure NumPy.

Every sample is kept, no tail is clipped. Successive latencies are correlated (a falling clock,
another process that computes), so a bootstrap that draws samples one by one would give intervals
that are too narrow. The circular block bootstrap draws blocks of successive samples instead
(Politis and Romano, 1992). The block length follows the automatic rule of Politis and White (2004),
as corrected by Patton, Politis and White (2009). It is seeded: the same samples give the same
interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Interval = tuple[float, float]
SHARES = {"p90": 0.90, "p95": 0.95, "p99": 0.99, "p999": 0.999}
REPLICATES = 1000
FEWEST_BLOCKS = 5
"""An interval from fewer independent pieces would be a guess."""
BEYOND = 10
"""Samples that must be expected beyond a percentile before an interval is given for it."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A summary in milliseconds. What `n` samples cannot support is None.

    Attributes:
        n: Samples, each one request.
        images_per_second: Images over wall time, first start to last finish; None for a part of
            a request.
        block: Successive samples that were drawn together for the intervals.
        intervals: 95 % confidence intervals by the name of the figure: median, mean, p90, p95,
            p99, p999, images_per_second.
    """

    n: int
    median: float
    mean: float
    std: float
    p90: float | None
    p95: float | None
    p99: float | None
    p999: float | None
    images_per_second: float | None
    block: int = 1
    intervals: dict[str, Interval | None] = field(default_factory=dict)


def percentile(samples: np.ndarray, share: float) -> float | None:
    """The sample below or at which at least `share` of the samples lie (nearest rank).

    None where fewer than one sample is expected beyond it: p99 takes 100 samples.
    """
    n = len(samples)
    if n * (1 - share) < 1 - 1e-9:
        return None
    return float(np.sort(samples)[int(np.ceil(share * n - 1e-9)) - 1])


def summarize(
    milliseconds: np.ndarray,
    *,
    batch: int,
    wall_seconds: float | None,
    open_loop: bool = False,
) -> Latency:
    """Summarizes samples of one request each.

    Args:
        milliseconds: At least one, in order of time.
        batch: Images a request.
        wall_seconds: From the first start to the last finish; None where it means nothing.
        open_loop: Whether requests came at times of their own, so that throughput is what was
            offered and has no interval.
    """
    samples = np.asarray(milliseconds, np.float64)
    n = len(samples)
    rate = n * batch / wall_seconds if wall_seconds else None
    block, intervals = _intervals(samples)
    spread = intervals["mean"]
    if rate is not None and spread is not None and not open_loop:
        # In a closed loop the rate is the number of requests in flight over their mean latency.
        scale = rate * float(samples.mean())
        intervals["images_per_second"] = (scale / spread[1], scale / spread[0])
    return Latency(
        n=n,
        median=float(np.median(samples)),
        mean=float(samples.mean()),
        std=float(samples.std(ddof=1)) if n > 1 else 0.0,
        **{name: percentile(samples, share) for name, share in SHARES.items()},
        images_per_second=rate,
        block=block,
        intervals=intervals,
    )


def _intervals(samples: np.ndarray) -> tuple[int, dict[str, Interval | None]]:
    """The block length, and an interval or None for each figure."""
    n = len(samples)
    found: dict[str, Interval | None] = dict.fromkeys(
        ("median", "mean", *SHARES, "images_per_second")
    )
    shares = {"median": 0.5} | SHARES
    shares = {name: share for name, share in shares.items() if n * (1 - share) >= BEYOND - 1e-9}
    if not shares:
        return 1, found
    # One length for all figures, the longest that the mean or any of the percentiles asks for.
    series = [samples, *(samples > np.quantile(samples, share) for share in shares.values())]
    block = max(block_length(part) for part in series)
    if n < FEWEST_BLOCKS * block:
        return block, found
    values = resample(samples, block, list(shares.values()))
    found |= zip(("mean", *shares), map(interval, values), strict=True)
    return block, found


def trtexec(
    milliseconds: np.ndarray,
    *,
    wall_seconds: float,
    parts: Mapping[str, np.ndarray] | None = None,
) -> str:
    """What trtexec would have printed of the same samples, to be laid beside its output.

    Throughput is batches a second of host time, whatever the batch. Latency is copy in, compute
    and copy out where these were measured on a GPU, and wall time otherwise: trtexec has no
    counterpart on a CPU.

    Args:
        milliseconds: Wall time of each request.
        wall_seconds: From the first start to the last finish.
        parts: Milliseconds of h2d, compute, d2h and enqueue, one a request.
    """
    parts = parts or {}
    on_gpu = all(name in parts for name in ("h2d", "compute", "d2h"))
    latency = parts["h2d"] + parts["compute"] + parts["d2h"] if on_gpu else milliseconds
    lines = [
        f"Throughput: {len(milliseconds) / wall_seconds:g} qps",
        f"Latency: {_trtexec_line(latency)}",
    ]
    titles = {
        "enqueue": "Enqueue Time", "h2d": "H2D Latency", "compute": "GPU Compute Time",
        "d2h": "D2H Latency",
    }  # fmt: skip
    lines += [f"{title}: {_trtexec_line(parts[n])}" for n, title in titles.items() if n in parts]
    lines.append(f"Total Host Walltime: {wall_seconds:g} s")
    if "compute" in parts:
        lines.append(f"Total GPU Compute Time: {parts['compute'].sum() / 1e3:g} s")
    return "\n".join(lines)


def trtexec_percentile(milliseconds: np.ndarray, percent: float) -> float:
    """trtexec's rule: sorted[N - 1 - int((1 - p) N)], in float32 as there."""
    n = len(milliseconds)
    left_out = int((np.float32(1) - np.float32(percent) / np.float32(100)) * np.float32(n))
    return float(np.sort(milliseconds)[max(n - 1 - left_out, 0)])


def _trtexec_line(milliseconds: np.ndarray) -> str:
    figures = {
        "min": milliseconds.min(),
        "max": milliseconds.max(),
        "mean": milliseconds.mean(),
        "median": np.median(milliseconds),
    } | {f"percentile({p}%)": trtexec_percentile(milliseconds, p) for p in (90, 95, 99)}
    return ", ".join(f"{name} = {value:g} ms" for name, value in figures.items())


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
