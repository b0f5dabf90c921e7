"""Statistics of latency samples. Pure NumPy; every sample is kept, no tail is clipped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A summary in milliseconds. A percentile that `n` samples cannot support is None.

    Attributes:
        n: Samples, each one batch.
        images_per_second: Images over wall time, first start to last finish.
    """

    n: int
    median: float
    mean: float
    std: float
    p90: float | None
    p95: float | None
    p99: float | None
    images_per_second: float


def percentile(samples: np.ndarray, share: float) -> float | None:
    """The sample below or at which at least `share` of the samples lie (nearest rank).

    None where fewer than one sample is expected beyond it: p99 takes 100 samples.
    """
    n = len(samples)
    if n * (1 - share) < 1 - 1e-9:
        return None
    return float(np.sort(samples)[int(np.ceil(share * n - 1e-9)) - 1])


def summarize(milliseconds: np.ndarray, *, batch: int, wall_seconds: float) -> Latency:
    """Summarizes samples of one batch each.

    Args:
        milliseconds: At least one.
        batch: Images a sample.
        wall_seconds: From the first start to the last finish.
    """
    samples = np.asarray(milliseconds, np.float64)
    return Latency(
        n=len(samples),
        median=float(np.median(samples)),
        mean=float(samples.mean()),
        std=float(samples.std(ddof=1)) if len(samples) > 1 else 0.0,
        p90=percentile(samples, 0.90),
        p95=percentile(samples, 0.95),
        p99=percentile(samples, 0.99),
        images_per_second=len(samples) * batch / wall_seconds,
    )
