from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from rtresnet.bench import scenarios
from rtresnet.core.errors import InputError


def erlang(time: float, load: float) -> float:
    """Erlang's own formula of 1909, an alternating sum: exact in fractions, useless in floats."""
    total = Fraction(0)
    rho, t = Fraction(load), Fraction(time)
    for k in range(int(time) + 1):
        x = rho * (k - t)
        exponential = sum(((-x) ** j) / math.factorial(j) for j in range(60))
        total += x**k / math.factorial(k) * exponential
    return float((1 - rho) * total)


@pytest.mark.parametrize("load", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("time", [0.0, 0.25, 1.0, 2.5, 7.75])
def test_the_wait_is_erlangs(load: float, time: float) -> None:
    lengths = scenarios.md1_queue_lengths(load, 32)
    found = scenarios.md1_waiting_below(time, load=load, lengths=lengths)
    assert found == pytest.approx(erlang(time, load), abs=1e-10)


@pytest.mark.parametrize("load", [0.05, 0.5, 0.8, 0.95])
def test_queue_lengths_are_pollaczek_and_khinchines(load: float) -> None:
    lengths = scenarios.md1_queue_lengths(load, 600)
    assert lengths.min() >= 0 and lengths.sum() == pytest.approx(1, abs=1e-9)
    mean = load + load**2 / (2 * (1 - load))
    assert lengths @ np.arange(600) == pytest.approx(mean, rel=1e-6)


def test_few_arrivals_do_not_wait() -> None:
    assert scenarios.md1_latency_quantile(0.99, rate=1, service=0.005) == pytest.approx(0.005)


def test_more_than_can_be_served_has_no_quantile() -> None:
    with pytest.raises(InputError, match="more than one server"):
        scenarios.md1_latency_quantile(0.99, rate=200, service=0.005)
