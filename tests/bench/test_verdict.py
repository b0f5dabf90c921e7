from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rtresnet.bench import verdict


def rounds(
    seed: int, slowdown: float, count: int = 60, noise: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """Return the latencies of a round under a load that comes and goes for both."""
    rng = np.random.default_rng(seed)
    machine = np.zeros(count)
    for index in range(1, count):
        machine[index] = 0.9 * machine[index - 1] + 0.1 * rng.standard_normal()
    own = rng.normal(0, noise, (2, count)) + rng.exponential(0.1, (2, count))
    first, second = 5 * np.exp(machine + own)
    return first, second * slowdown


def test_paired_same_twice_shows_no_difference_in_95_of_100() -> None:
    verdicts = [verdict.paired(*rounds(seed, 1.0)).verdict for seed in range(100)]
    assert verdicts.count(verdict.NO_DIFFERENCE) >= 95


def test_paired_difference_of_a_tenth_is_detected() -> None:
    slower = [verdict.paired(*rounds(seed, 1.10, count=200)) for seed in range(40)]
    assert sum(result.verdict == verdict.SLOWER for result in slower) >= 38
    faster = verdict.paired(*rounds(0, 1 / 1.10, count=200))
    assert faster.verdict == verdict.FASTER and faster.low > 1


def test_paired_difference_below_the_margin_is_not_claimed() -> None:
    reference = np.full(500, 5.0)
    within = verdict.paired(reference, reference * 1.019)
    assert within.high < 1 and within.verdict == verdict.NO_DIFFERENCE
    assert verdict.paired(reference, reference * 1.03).verdict == verdict.SLOWER


def test_paired_few_rounds_give_no_verdict() -> None:
    comparison = verdict.paired([1.0] * 9, [2.0] * 9)
    assert comparison.speed == pytest.approx(0.5)
    assert (comparison.low, comparison.high) == (0, float("inf"))
    assert comparison.verdict == verdict.NO_DIFFERENCE


def test_paired_more_comparisons_widen_the_interval() -> None:
    one, four = (verdict.paired(*rounds(3, 1.0), comparisons=count) for count in (1, 4))
    assert one.level == 0.95 and four.level == pytest.approx(0.9875)
    assert four.high - four.low > one.high - one.low


@pytest.mark.parametrize(("n", "left_out"), [(10, 1), (15, 3), (20, 5), (100, 39)])
def test_median_bounds_equal_tabled_sign_test(n: int, left_out: int) -> None:
    low, high = verdict.median_bounds(np.arange(n, dtype=np.float64), 0.95)
    assert (low, high) == (left_out, n - 1 - left_out)


def test_compare_unpaired_uses_the_figure() -> None:
    rng = np.random.default_rng(0)
    now, then = rng.gamma(4, size=(2, 2000)) + 5
    heavy = then.copy()
    heavy[::50] += 100  # one request in fifty: not the median, the mean and the p99
    assert verdict.compare_unpaired(now, heavy, figure="median").verdict == verdict.NO_DIFFERENCE
    assert verdict.compare_unpaired(now, heavy, figure="p99").verdict == verdict.SLOWER
    assert verdict.compare_unpaired(now, heavy, figure="mean").verdict == verdict.SLOWER
    assert verdict.compare_unpaired(now[:50], heavy, figure="p99") is None
    assert not verdict.compare_unpaired(now, heavy, figure="mean").paired


def entry(scale: float = 1.0, n: int = 2000, seed: int = 0, **changed: Any) -> dict[str, Any]:
    samples = scale * (5 + np.random.default_rng(seed).gamma(2, 0.2, n))
    reference = {
        "scenario": "single-stream", "measured": "engines/net.onnx", "batch": 1, "device": "cpu",
        "provider": "ONNX Runtime CPU", "threads": 2, "versions": {"onnxruntime": "1.32.0"},
        "precision": "fp32", "with_preprocess": False, "load": {}, "samples": samples.tolist(),
    }  # fmt: skip
    return reference | changed


@pytest.mark.parametrize(
    ("slower", "tolerance", "regression"),
    [(1.00, 0.03, False), (1.05, 0.03, True), (1.05, 0.08, False), (0.90, 0.0, False)],
)
def test_judge_regression_only_beyond_the_tolerance(
    slower: float, tolerance: float, regression: bool
) -> None:
    judged = verdict.judge(entry(slower, seed=1), entry(), tolerance=tolerance)
    assert judged.regression == regression
    assert judged.comparison and judged.comparison.speed == pytest.approx(1 / slower, rel=0.01)


def test_judge_few_samples_are_no_regression() -> None:
    judged = verdict.judge(entry(1.05, n=12), entry(n=12, seed=1), tolerance=0.03)
    assert not judged.regression


def test_judge_uses_the_figure_of_the_scenario() -> None:
    tail = np.asarray(entry()["samples"])
    tail[::60] += 50
    for scenario, regression in (("single-stream", False), ("offline", True), ("server", True)):
        now = entry(scenario=scenario, samples=tail.tolist())
        judged = verdict.judge(now, entry(scenario=scenario), tolerance=0.03)
        assert judged.regression == regression, scenario


def test_config_diff_names_what_differs() -> None:
    assert verdict.config_diff(entry(), entry(seed=5, measured="elsewhere/net.onnx")) == []
    old = entry()
    del old["scenario"], old["with_preprocess"]
    assert verdict.config_diff(entry(with_preprocess=None), old) == []
    for name, value in (
        ("batch", 8), ("device", "H100"), ("threads", 1), ("measured", "other.onnx"),
        ("versions", {"onnxruntime": "1.31.0"}), ("load", {"qps": 5}), ("scenario", "offline"),
    ):  # fmt: skip
        (words,) = verdict.config_diff(entry(**{name: value}), entry())
        assert ", was " in words


def test_config_diff_compares_the_wait_of_batches_where_both_state_it() -> None:
    waits = [entry(load={"max_batch": 4, "max_wait_ms": wait}) for wait in (0, 2)]
    (words,) = verdict.config_diff(*waits)
    assert words == "max_wait_ms: 0, was 2"
    earlier = entry(load={"max_batch": 4})
    assert verdict.config_diff(waits[0], earlier) == []
