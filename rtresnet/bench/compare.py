"""Which of two artifacts is faster, and whether that can be said at all. Pure NumPy.

A verdict takes more than an interval without 1 in it: two loads of one file differ by where their
memory lies, by 1 % as measured, and do so for as long as they live. So the whole interval has to
lie beyond a margin of 2 %, below which nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rtresnet.bench import bootstrap, stats

MARGIN = 0.02
FEWEST_PAIRS = 10
FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference shown"
FIGURES = {"median": 0.5} | stats.SHARES


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One artifact held against another.

    Attributes:
        speed: How many times as fast as the other; above 1 is faster.
        low, high: Confidence interval of `speed`; 0 and infinity where there are too few pairs.
        level: Its confidence, 0.95 shared by all comparisons of one call.
        n: Pairs of slices, or the smaller number of samples where these were not paired.
        paired: Whether both were measured in turn.
        verdict: "faster", "slower" or "no difference shown".
    """

    speed: float
    low: float
    high: float
    level: float
    n: int
    paired: bool
    verdict: str


def verdict(low: float, high: float) -> str:
    """What an interval of the speed lets one say."""
    if low > 1 + MARGIN:
        return FASTER
    return SLOWER if high < 1 / (1 + MARGIN) else NO_DIFFERENCE


def paired(
    reference: Sequence[float], other: Sequence[float], *, comparisons: int = 1
) -> Comparison:
    """Compares latencies of slices measured side by side, one pair a round.

    The median of the rounds' ratios: a round in which something else ran during one of its slices
    moves it by one rank, however much it took. Its interval is the hull of two: one that draws
    blocks of rounds, for rounds that depend on their neighbours, and the sign test's, which holds
    for any number of rounds and any noise.

    Args:
        reference: A latency a round.
        other: The same of the artifact in question.
        comparisons: With the same reference; the confidence is shared among them.
    """
    n = min(len(reference), len(other))
    ratios = np.log(np.divide(reference[:n], other[:n]))
    level = 1 - 0.05 / max(comparisons, 1)
    ranks = ratios.argsort().argsort().astype(np.float64)
    block = bootstrap.block_length(ranks)
    drawn = bootstrap.interval(bootstrap.resample(ratios, block, [0.5])[1], level)
    signs = median_bounds(ratios, level)
    low, high = np.exp([min(drawn[0], signs[0]), max(drawn[1], signs[1])])
    if n < FEWEST_PAIRS:
        low, high = 0.0, float("inf")
    return Comparison(
        speed=float(np.exp(np.median(ratios))),
        low=float(low),
        high=float(high),
        level=level,
        n=n,
        paired=True,
        verdict=verdict(low, high),
    )


def median_bounds(samples: np.ndarray, level: float) -> bootstrap.Interval:
    """The sign test's interval for the median of independent samples: two of the samples."""
    n, ordered = len(samples), np.sort(samples)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    chances = log_factorial[-1] - log_factorial - log_factorial[::-1] - n * np.log(2)
    below = np.cumsum(np.exp(chances))  # P(at most k of n lie below the median)
    out = int(np.searchsorted(below, (1 - level) / 2, side="right"))  # samples left out a side
    return float(ordered[max(out - 1, 0)]), float(ordered[min(n - out, n - 1)])


def compare_unpaired(
    reference: Sequence[float], other: Sequence[float], *, figure: str, comparisons: int = 1
) -> Comparison | None:
    """Compares samples of two runs that were not taken in turn.

    The interval knows how the samples vary within each run. It cannot know what changed on the
    machine between them.

    Args:
        reference: Samples in order of time.
        other: Likewise.
        figure: "mean", "median" or a percentile as in `stats.SHARES`.
        comparisons: See `paired`.

    Returns:
        None where a percentile has too few samples.
    """
    level = 1 - 0.05 / max(comparisons, 1)
    logs, points = [], []
    for seed, given in enumerate((reference, other)):
        samples = np.asarray(given, np.float64)
        share = FIGURES.get(figure)
        point = float(samples.mean()) if share is None else stats.percentile(samples, share)
        if point is None:
            return None
        series = samples if share is None else (samples > np.quantile(samples, share))
        block = bootstrap.block_length(np.asarray(series, np.float64))
        shares = [] if share is None else [share]
        logs.append(np.log(bootstrap.resample(samples, block, shares, seed=seed)[-1]))
        points.append(point)
    count = min(map(len, logs))
    low, high = np.exp(bootstrap.interval(logs[0][:count] - logs[1][:count], level))
    return Comparison(
        speed=points[0] / points[1],
        low=float(low),
        high=float(high),
        level=level,
        n=min(len(reference), len(other)),
        paired=False,
        verdict=verdict(low, high),
    )
