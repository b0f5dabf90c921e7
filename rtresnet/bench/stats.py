"""Statistics of latencies: percentiles, confidence intervals, and the M/D/1 queue. Pure NumPy.

Every sample is kept, no tail is clipped. Successive latencies are correlated (a falling clock,
another process that computes), so a bootstrap that draws samples one by one would give intervals
that are too narrow. The circular block bootstrap draws blocks of successive samples instead
(Politis and Romano, 1992). The block length follows the automatic rule of Politis and White (2004),
as corrected by Patton, Politis and White (2009). It is seeded: the same samples give the same
interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rtresnet.core.errors import InputError

Interval = tuple[float, float]
SHARES = {"p90": 0.90, "p95": 0.95, "p99": 0.99, "p999": 0.999}
REPLICATES = 1000
FEWEST_BLOCKS = 5
"""Smallest number of independent blocks for an interval."""
BEYOND = 10
"""Samples that must be expected beyond a percentile before an interval is given for it."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A summary in milliseconds; None if there are too few samples.

    Attributes:
        n: Number of samples, one per request.
        images_per_second: Images over wall time, first start to last finish; None for a part of
            a request.
        block: Block length of the bootstrap.
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
    """Return the sample below or at which at least `share` of the samples lie (nearest rank).

    None if fewer than one sample is expected beyond it: p99 takes 100 samples.
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
    """Summarize samples of one request each.

    Args:
        milliseconds: At least one, in order of time.
        batch: Images per request.
        wall_seconds: Time from the first start to the last finish; None if it is not meaningful.
        open_loop: Whether requests arrived at scheduled times, so that throughput is the offered
            rate and has no interval.
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
    """Return the block length, and an interval or None for each figure."""
    n = len(samples)
    intervals: dict[str, Interval | None] = dict.fromkeys(
        ("median", "mean", *SHARES, "images_per_second")
    )
    shares = {"median": 0.5} | SHARES
    shares = {name: share for name, share in shares.items() if n * (1 - share) >= BEYOND - 1e-9}
    if not shares:
        return 1, intervals
    # One block length for all figures: the longest that the mean or a percentile needs.
    series = [samples, *(samples > np.quantile(samples, share) for share in shares.values())]
    block = max(block_length(part) for part in series)
    if n < FEWEST_BLOCKS * block:
        return block, intervals
    values = resample(samples, block, list(shares.values()))
    intervals |= zip(("mean", *shares), map(interval, values), strict=True)
    return block, intervals


def trtexec(
    milliseconds: np.ndarray,
    *,
    wall_seconds: float,
    parts: Mapping[str, np.ndarray] | None = None,
) -> str:
    """Format samples as trtexec does, for comparison with its output.

    Throughput is batches per second of host time, for any batch size. Latency is the sum of copy
    in, compute and copy out if these were measured on a GPU, else wall time: trtexec does not run
    on a CPU.

    Args:
        milliseconds: Wall time of each request.
        wall_seconds: Time from the first start to the last finish.
        parts: Milliseconds of h2d, compute, d2h and enqueue of each request.
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
    """Return a percentile by trtexec's rule: sorted[N - 1 - int((1 - p) N)], in float32."""
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
    """Return the block length for a block bootstrap of a series.

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
    rounding = 1e-12 * float(np.abs(series).max()) ** 2
    if covariance[0] <= rounding:
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
    """Draw resamples, and compute the mean and nearest-rank quantiles of each.

    Args:
        samples: [n], in order of time.
        block: Number of successive samples drawn together.
        shares: Shares of the quantiles, as 0.99.
        seed: Random seed.

    Returns:
        [1 + quantiles, replicates]. Long series get fewer replicates, but at least 200.
    """
    n, rng = len(samples), np.random.default_rng(seed)
    order = np.argsort(samples, kind="stable")
    ordered = samples[order]
    blocks = -(-n // block)
    targets = np.asarray(shares) * (blocks * block) - 1e-9
    left = int(np.clip(1e7 / n, 200, REPLICATES))
    rows = []
    while left:
        count = min(left, max(1, 100_000 // n))
        left -= count
        starts = rng.integers(n, size=(count, blocks)) + n * np.arange(count)[:, None]
        drawn = np.bincount(starts.ravel(), minlength=count * n).reshape(count, n)
        if block > 1:
            # A block contains a sample if it starts at it or less than a block length before it.
            around = np.concatenate([drawn[:, n - block :], drawn], axis=1).cumsum(axis=1)
            drawn = around[:, block:] - around[:, :-block]
        row = np.empty((1 + len(shares), count))
        row[0] = drawn @ samples / (blocks * block)
        if len(shares):
            below = drawn[:, order].cumsum(axis=1)
            for column in range(count):
                row[1:, column] = ordered[np.searchsorted(below[column], targets)]
        rows.append(row)
    return np.concatenate(rows, axis=1)


def interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Return the central interval with a share `level` of the replicates."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def md1_latency_quantile(share: float, *, rate: float, service: float) -> float:
    """Return the latency that a share of the requests does not exceed in an M/D/1 queue.

    Poisson arrivals, one server, the same service time for all requests: the behaviour of an
    undisturbed server in the scenario `server`. A higher measured figure is caused by the machine,
    not by the queue.

    Args:
        share: Share of the requests, such as 0.99.
        rate: Requests per second.
        service: Seconds.

    Returns:
        Seconds, waiting and service together.

    Raises:
        InputError: The load is 1 or more, so the queue grows without end.
    """
    load = rate * service
    if load >= 1:
        raise InputError(
            f"{rate:g} requests/s of {service:g} s each: more than the capacity of one server"
        )
    low, high, size = 0.0, 1.0, 64
    lengths = md1_queue_lengths(load, size)
    while md1_waiting_below(high, load=load, lengths=lengths) < share:
        high *= 2
        if high + 3 > size:
            size *= 4
            lengths = md1_queue_lengths(load, size)
    for _ in range(60):
        middle = (low + high) / 2
        if md1_waiting_below(middle, load=load, lengths=lengths) < share:
            low = middle
        else:
            high = middle
    return service * (1 + (0.0 if share <= 1 - load else high))


def md1_queue_lengths(load: float, count: int) -> np.ndarray:
    """Return the stationary probabilities of 0, 1, ... `count` - 1 requests in an M/D/1 system.

    Balances the crossings of each level upwards and downwards, so that every term is positive and
    no precision is lost at any load.
    """
    events = _poisson(load, count + 60)  # during one service; the rest is below 1e-60
    beyond = np.cumsum(events[::-1])[::-1][1:]  # more than k of them
    lengths = np.zeros(count)
    lengths[0] = 1 - load
    for level in range(count - 1):
        up = lengths[0] * beyond[level] + lengths[1 : level + 1] @ beyond[level:0:-1]
        lengths[level + 1] = up / events[0]
    return lengths


def md1_waiting_below(time: float, *, load: float, lengths: np.ndarray) -> float:
    """Return P(wait <= `time`), with time in units of the service time.

    Franx's form of Erlang's and Crommelin's result, a sum of positive terms (Operations Research
    Letters 29, 2001).

    Args:
        time: At least 0.
        load: Arrival rate times service time, below 1.
        lengths: From `md1_queue_lengths`, more than `time` + 2 of them.
    """
    steps = int(time) + 1
    waiting = np.cumsum(lengths)[1 : steps + 1]  # P(at most j waiting), without the one served
    return float(waiting[::-1] @ _poisson(load * (steps - time), steps))


def _poisson(mean: float, count: int) -> np.ndarray:
    """Return the Poisson probabilities of 0, 1, ... `count` - 1 events."""
    terms = [math.exp(-mean)]
    for number in range(1, count):
        terms.append(terms[-1] * mean / number)
    return np.asarray(terms)
