from __future__ import annotations

import numpy as np
import pytest

from rtresnet.bench import compare


def rounds(
    seed: int, slowdown: float, count: int = 60, noise: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """Latencies a round under a load that comes and goes, which both meet."""
    rng = np.random.default_rng(seed)
    machine = np.zeros(count)
    for index in range(1, count):
        machine[index] = 0.9 * machine[index - 1] + 0.1 * rng.standard_normal()
    own = rng.normal(0, noise, (2, count)) + rng.exponential(0.1, (2, count))
    first, second = 5 * np.exp(machine + own)
    return first, second * slowdown


def test_the_same_twice_is_no_difference_in_nineteen_of_twenty() -> None:
    verdicts = [compare.paired(*rounds(seed, 1.0)).verdict for seed in range(100)]
    assert verdicts.count(compare.NO_DIFFERENCE) >= 95


def test_a_tenth_is_found_and_has_the_right_sign() -> None:
    slower = [compare.paired(*rounds(seed, 1.10, count=200)) for seed in range(40)]
    assert sum(found.verdict == compare.SLOWER for found in slower) >= 38
    faster = compare.paired(*rounds(0, 1 / 1.10, count=200))
    assert faster.verdict == compare.FASTER and faster.low > 1


def test_nothing_is_claimed_below_the_margin_however_certain() -> None:
    reference = np.full(500, 5.0)
    within = compare.paired(reference, reference * 1.019)
    assert within.high < 1 and within.verdict == compare.NO_DIFFERENCE
    assert compare.paired(reference, reference * 1.03).verdict == compare.SLOWER


def test_few_rounds_say_nothing() -> None:
    found = compare.paired([1.0] * 9, [2.0] * 9)
    assert found.speed == pytest.approx(0.5)
    assert (found.low, found.high) == (0, float("inf"))
    assert found.verdict == compare.NO_DIFFERENCE


def test_more_comparisons_need_more_confidence() -> None:
    one, four = (compare.paired(*rounds(3, 1.0), comparisons=count) for count in (1, 4))
    assert one.level == 0.95 and four.level == pytest.approx(0.9875)
    assert four.high - four.low > one.high - one.low


@pytest.mark.parametrize(("n", "left_out"), [(10, 1), (15, 3), (20, 5), (100, 39)])
def test_the_sign_tests_interval_is_the_tabled_one(n: int, left_out: int) -> None:
    low, high = compare.median_bounds(np.arange(n, dtype=np.float64), 0.95)
    assert (low, high) == (left_out, n - 1 - left_out)


def test_runs_apart_are_compared_by_the_figure_asked_for() -> None:
    rng = np.random.default_rng(0)
    now, then = rng.gamma(4, size=(2, 2000)) + 5
    heavy = then.copy()
    heavy[::50] += 100  # one request in fifty: not the median, the mean and the p99
    assert compare.compare_unpaired(now, heavy, figure="median").verdict == compare.NO_DIFFERENCE
    assert compare.compare_unpaired(now, heavy, figure="p99").verdict == compare.SLOWER
    assert compare.compare_unpaired(now, heavy, figure="mean").verdict == compare.SLOWER
    assert compare.compare_unpaired(now[:50], heavy, figure="p99") is None
    assert not compare.compare_unpaired(now, heavy, figure="mean").paired
