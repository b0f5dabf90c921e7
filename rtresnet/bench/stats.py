"""Statistics of latency samples. Pure NumPy; every sample is kept, no tail is clipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rtresnet.bench import bootstrap
from rtresnet.bench.bootstrap import Interval

SHARES = {"p90": 0.90, "p95": 0.95, "p99": 0.99, "p999": 0.999}
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
    block = max(bootstrap.block_length(part) for part in series)
    if n < bootstrap.FEWEST_BLOCKS * block:
        return block, found
    values = bootstrap.resample(samples, block, list(shares.values()))
    found |= zip(("mean", *shares), map(bootstrap.interval, values), strict=True)
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
