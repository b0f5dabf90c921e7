"""Decide which of two artifacts is faster, and whether one became slower than an earlier result.

A verdict needs more than an interval without 1: two processes that load the same file differ
by 1 % as measured, because of their memory layout. So the whole interval must lie beyond a
margin of 2 %; otherwise no difference is reported.

A comparison with a recorded result requires the same workload of the same file on the same device
and versions (`config_diff`). Pure NumPy; reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from rtresnet.bench import stats

MARGIN = 0.02
FEWEST_PAIRS = 10
FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference shown"
QUANTILES = {"median": 0.5} | stats.SHARES
FIGURES = {
    "single-stream": "median",
    "multi-stream": "median",
    "offline": "mean",
    "closed": "mean",
    "server": "p99",
}
"""The latency figure that is compared, by scenario. In a closed loop the throughput is the number
of requests in flight divided by their mean latency, so the mean also compares throughputs."""
LOAD = ("qps", "concurrency", "max_batch", "in_flight")
PLAN = ("contexts", "graphs")
"""Compared if both results have them; earlier files do not."""
ALIKE = ("batch", "device", "provider", "threads", "versions", "precision", "with_preprocess")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One artifact compared with another.

    Attributes:
        speed: Speed relative to the other; above 1 is faster.
        low, high: Confidence interval of `speed`; 0 and infinity if there are too few pairs.
        level: Confidence of the interval: 0.95, divided among all comparisons of one call.
        n: Pairs of slices; without pairing, the smaller number of samples.
        paired: Whether both were measured in alternating slices.
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
    """Return the verdict that an interval of the speed supports."""
    if low > 1 + MARGIN:
        return FASTER
    return SLOWER if high < 1 / (1 + MARGIN) else NO_DIFFERENCE


def paired(
    reference: Sequence[float], other: Sequence[float], *, comparisons: int = 1
) -> Comparison:
    """Compare latencies that were measured in alternating slices, one pair per round.

    The speed is the median of the rounds' ratios: a disturbance during one slice moves it by one
    rank, however long it took. The interval is the hull of two: a block bootstrap over rounds,
    which allows for rounds that depend on their neighbours, and the sign test's interval, which is
    valid for any number of rounds and any noise.

    Args:
        reference: One latency per round.
        other: One latency per round of the compared artifact.
        comparisons: Number of comparisons with this reference, among which the confidence is
            divided.
    """
    n = min(len(reference), len(other))
    ratios = np.log(np.divide(reference[:n], other[:n]))
    level = 1 - 0.05 / max(comparisons, 1)
    ranks = ratios.argsort().argsort().astype(np.float64)
    block = stats.block_length(ranks)
    drawn = stats.interval(stats.resample(ratios, block, [0.5])[1], level)
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


def median_bounds(samples: np.ndarray, level: float) -> stats.Interval:
    """Return the sign test's confidence interval of the median of independent samples."""
    n, ordered = len(samples), np.sort(samples)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    chances = log_factorial[-1] - log_factorial - log_factorial[::-1] - n * np.log(2)
    below = np.cumsum(np.exp(chances))  # P(at most k of n lie below the median)
    out = int(np.searchsorted(below, (1 - level) / 2, side="right"))  # samples left out at each end
    return float(ordered[max(out - 1, 0)]), float(ordered[min(n - out, n - 1)])


def compare_unpaired(
    reference: Sequence[float], other: Sequence[float], *, figure: str, comparisons: int = 1
) -> Comparison | None:
    """Compare samples of two runs that ran one after the other.

    The interval covers the variation within each run, not changes of the machine between
    them.

    Args:
        reference: Samples in order of time.
        other: Samples in order of time.
        figure: "mean", "median" or a percentile as in `stats.SHARES`.
        comparisons: See `paired`.

    Returns:
        None if a percentile has too few samples.
    """
    level = 1 - 0.05 / max(comparisons, 1)
    logs, points = [], []
    for seed, run in enumerate((reference, other)):
        samples = np.asarray(run, np.float64)
        share = QUANTILES.get(figure)
        point = float(samples.mean()) if share is None else stats.percentile(samples, share)
        if point is None:
            return None
        series = samples if share is None else (samples > np.quantile(samples, share))
        block = stats.block_length(np.asarray(series, np.float64))
        shares = [] if share is None else [share]
        logs.append(np.log(stats.resample(samples, block, shares, seed=seed)[-1]))
        points.append(point)
    count = min(map(len, logs))
    low, high = np.exp(stats.interval(logs[0][:count] - logs[1][:count], level))
    return Comparison(
        speed=points[0] / points[1],
        low=float(low),
        high=float(high),
        level=level,
        n=min(len(reference), len(other)),
        paired=False,
        verdict=verdict(low, high),
    )


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A result compared with its baseline.

    Attributes:
        figure: The latency figure that was compared: median, mean or p99.
        comparison: Comparison of the result with the baseline; None if a percentile has too few
            samples.
        regression: Whether the whole interval is slower by more than the tolerance.
        tolerance: Allowed slowdown: 0.03 is 3 %.
        baseline: The file of the baseline.
    """

    figure: str
    comparison: Comparison | None
    regression: bool
    tolerance: float
    baseline: str = ""


def judge(
    now: Mapping[str, Any], then: Mapping[str, Any], *, tolerance: float, baseline: str = ""
) -> Judgement:
    """Compare the samples of two results.

    Args:
        now: An entry of `results`, as `bench --json` writes it.
        then: The baseline's entry.
        tolerance: 0.03 allows it to be 3 % slower.
        baseline: Name of the baseline's file.
    """
    figure = FIGURES[scenario(now)]
    comparison = compare_unpaired(then["samples"], now["samples"], figure=figure)
    regression = comparison is not None and comparison.high < 1 / (1 + tolerance)
    return Judgement(
        figure=figure, comparison=comparison, regression=regression, tolerance=tolerance,
        baseline=baseline,
    )  # fmt: skip


def config_diff(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Return the differences that prevent a comparison, as "device: A, was B"."""
    both = (now, then)
    pairs: dict[str, list[Any]] = {
        "scenario": [scenario(entry) for entry in both],
        "file": [PurePath(str(entry.get("measured"))).name for entry in both],
    }
    pairs |= {name: [entry.get(name) for entry in both] for name in ALIKE}
    pairs |= {
        name: values for name in PLAN if None not in (values := [entry.get(name) for entry in both])
    }
    loads = [entry.get("load") or {} for entry in both]
    pairs |= {name: [load.get(name) for load in loads] for name in LOAD}
    waits = [load.get("max_wait_ms") for load in loads]
    if None not in waits:  # earlier files have none
        pairs["max_wait_ms"] = waits
    return [f"{name}: {_words(a)}, was {_words(b)}" for name, (a, b) in pairs.items() if a != b]


def scenario(entry: Mapping[str, Any]) -> str:
    """Return the scenario of a result; files of the first version have no such field."""
    return str(entry.get("scenario") or "single-stream")


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name} {entry}" for name, entry in value.items())
    return "unknown" if value is None else str(value)
