from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from rtresnet.bench import stats
from rtresnet.bench.stats import percentile, summarize, trtexec
from rtresnet.core.errors import InputError


@pytest.mark.parametrize(
    ("n", "share", "expected"),
    [
        (100, 0.99, 99),
        (100, 0.95, 95),
        (100, 0.90, 90),
        (10, 0.90, 9),
        (11, 0.90, 10),
        (20, 0.95, 19),
        (1000, 0.99, 990),
        (101, 0.99, 100),
        (199, 0.99, 198),
        (2, 0.5, 1),
        (3, 0.5, 2),
    ],
)
def test_percentile_is_the_nearest_rank(n: int, share: float, expected: float) -> None:
    samples = np.arange(1, n + 1, dtype=np.float64)
    shuffled = np.random.default_rng(0).permutation(samples)
    assert percentile(shuffled, share) == expected
    assert (samples <= expected).mean() >= share
    assert (samples < expected).mean() < share


@pytest.mark.parametrize(("share", "needed"), [(0.99, 100), (0.95, 20), (0.90, 10)])
def test_percentile_without_a_sample_beyond_it_is_none(share: float, needed: int) -> None:
    for n in (1, needed // 2, needed - 1):
        assert percentile(np.ones(n), share) is None
    assert percentile(np.ones(needed), share) == 1


def test_percentile_of_any_n_is_a_sample() -> None:
    for n in range(1, 400):
        samples = np.arange(n, dtype=np.float64)
        for share in (0.9, 0.95, 0.99):
            value = percentile(samples, share)
            assert (value is None) == (n < round(1 / (1 - share)))
            if value is not None:
                assert (samples <= value).sum() >= share * n - 1e-6


def test_percentile_is_never_interpolated() -> None:
    samples = np.array([1.0] * 94 + [50.0] * 6)
    assert percentile(samples, 0.90) == 1
    assert percentile(samples, 0.95) == 50


def test_summarize_gives_every_figure() -> None:
    milliseconds = np.arange(1, 101, dtype=np.float32)
    summary = summarize(milliseconds, batch=8, wall_seconds=4.0)
    assert (summary.n, summary.median, summary.mean, summary.images_per_second) == (
        100,
        50.5,
        50.5,
        200,
    )
    assert summary.std == pytest.approx(np.std(np.arange(1, 101), ddof=1))
    assert (summary.p90, summary.p95, summary.p99, summary.p999) == (90, 95, 99, None)
    # A ramp is as correlated as can be: there are too few independent pieces for an interval.
    assert set(summary.intervals) >= {"median", "mean", "p99"}


def test_summarize_intervals_of_correlated_samples_cover_the_mean() -> None:
    rng, inside, plain = np.random.default_rng(0), 0, 0
    for _ in range(200):
        shocks = rng.standard_normal(600)
        series = np.empty(600)
        series[0] = shocks[0]
        for n in range(1, 600):
            series[n] = 0.7 * series[n - 1] + shocks[n]
        interval = summarize(series + 50, batch=1, wall_seconds=1).intervals["mean"]
        assert interval is not None
        inside += interval[0] < 50 < interval[1]
        half = 1.96 * series.std() / np.sqrt(600)
        plain += abs(series.mean()) < half
    assert inside >= 0.87 * 200 and plain < 0.75 * 200


def test_trtexec_uses_its_percentile_rule_and_batches_per_second() -> None:
    line = trtexec(np.arange(1.0, 201.0), wall_seconds=4)
    assert "Throughput: 50 qps" in line
    # sorted[N - 1 - int((1 - p) * N)] of 200 samples; 1 - 0.99 is a little less in float32.
    for share, value in ((90, 180), (95, 190), (99, 199)):
        assert f"percentile({share}%) = {value} ms" in line, line


def test_summarize_keeps_the_tail() -> None:
    summary = summarize(np.array([1.0] * 99 + [1000.0]), batch=1, wall_seconds=1.099)
    assert summary.median == 1
    assert summary.mean == pytest.approx(10.99)
    assert summary.images_per_second == pytest.approx(100 / 1.099)
    assert summary.p99 == 1
    assert summary.std > 90


def test_summarize_single_sample_has_no_percentiles() -> None:
    summary = summarize(np.array([2.5]), batch=4, wall_seconds=0.0025)
    assert (summary.n, summary.median, summary.mean, summary.std) == (1, 2.5, 2.5, 0)
    assert summary.p90 is summary.p95 is summary.p99 is summary.p999 is None
    assert summary.images_per_second == pytest.approx(1600)
    assert not any(summary.intervals.values())


def test_summarize_does_not_change_its_samples() -> None:
    samples = np.array([3.0, 1.0, 2.0])
    summarize(samples, batch=1, wall_seconds=1)
    assert samples.tolist() == [3, 1, 2]


def erlang(time: float, load: float) -> float:
    """Return Erlang's formula of 1909, an alternating sum: exact in fractions only."""
    total = Fraction(0)
    rho, t = Fraction(load), Fraction(time)
    for k in range(int(time) + 1):
        x = rho * (k - t)
        exponential = sum(((-x) ** j) / math.factorial(j) for j in range(60))
        total += x**k / math.factorial(k) * exponential
    return float((1 - rho) * total)


@pytest.mark.parametrize("load", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("time", [0.0, 0.25, 1.0, 2.5, 7.75])
def test_md1_waiting_below_equals_erlangs_formula(load: float, time: float) -> None:
    lengths = stats.md1_queue_lengths(load, 32)
    result = stats.md1_waiting_below(time, load=load, lengths=lengths)
    assert result == pytest.approx(erlang(time, load), abs=1e-10)


@pytest.mark.parametrize("load", [0.05, 0.5, 0.8, 0.95])
def test_md1_queue_lengths_have_the_pollaczek_khinchine_mean(load: float) -> None:
    lengths = stats.md1_queue_lengths(load, 600)
    assert lengths.min() >= 0 and lengths.sum() == pytest.approx(1, abs=1e-9)
    mean = load + load**2 / (2 * (1 - load))
    assert lengths @ np.arange(600) == pytest.approx(mean, rel=1e-6)


def test_md1_latency_quantile_of_few_arrivals_is_the_service_time() -> None:
    assert stats.md1_latency_quantile(0.99, rate=1, service=0.005) == pytest.approx(0.005)


def test_md1_latency_quantile_of_an_overload_is_refused() -> None:
    with pytest.raises(InputError, match="200 requests/s"):
        stats.md1_latency_quantile(0.99, rate=200, service=0.005)
