from __future__ import annotations

import numpy as np
import pytest

from rtresnet.core.errors import DataError
from rtresnet.quantization import calibrators
from rtresnet.quantization.calibrators import BINS, SAMPLE, Histogram


def histogram(samples: np.ndarray, batches: int = 1) -> Histogram:
    result = Histogram("tensor")
    for part in np.array_split(samples.astype(np.float32).reshape(-1, 1), batches):
        result.add(part)
    return result


def normal(count: int = 60_000) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(count)


def test_the_largest_value_sees_every_value_and_the_histogram_a_sample() -> None:
    samples = normal(4 * SAMPLE)
    samples[12345] = -50
    result = histogram(samples)
    assert result.largest == 50
    assert SAMPLE / 2 <= result.counts.sum() <= 2 * SAMPLE


def test_a_range_that_grows_loses_no_count_and_shifts_none() -> None:
    rising = np.concatenate([normal() * scale for scale in (0.01, 1, 100)])
    grown, whole = histogram(rising, 3), histogram(rising)
    assert grown.largest == whole.largest and grown.counts.sum() == pytest.approx(180_000)
    for share in (50.0, 90.0, 99.0):
        first, second = (calibrators.percentile(entry, share=share) for entry in (grown, whole))
        assert first == pytest.approx(second, rel=0.02, abs=2 * grown.limit / BINS)


def test_channels_and_means_are_kept() -> None:
    rng = np.random.default_rng(0)
    values = (
        rng.standard_normal((12, 5, 4, 4)).astype(np.float32) + np.arange(5)[None, :, None, None]
    )
    result = Histogram("tensor")
    for part in (values[:3], values[3:10], values[10:]):
        result.add(part)
    assert result.channels == pytest.approx(np.abs(values).max((0, 2, 3)))
    assert result.means == pytest.approx(values.mean((0, 2, 3)), abs=1e-5)
    assert result.n == 12


@pytest.mark.parametrize("method", calibrators.METHODS)
def test_no_limit_exceeds_the_largest_and_none_is_zero(method: str) -> None:
    for samples in (
        normal(),
        np.abs(normal()),
        np.ones(100),
        np.array([1e-30] * 10),
        normal() * 1e20,
    ):
        result = histogram(samples)
        assert 0 < calibrators.METHODS[method](result) <= result.largest


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_a_lonely_outlier_is_clipped(method: str) -> None:
    limit = calibrators.METHODS[method](histogram(np.append(normal(), 100.0)))
    assert 2 < limit < 30


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_an_even_distribution_keeps_its_range(method: str) -> None:
    samples = np.random.default_rng(0).uniform(-3, 3, 60_000)
    assert calibrators.METHODS[method](histogram(samples)) > 0.95 * 3


def test_mse_is_the_best_of_all_clipping_points() -> None:
    samples = normal()
    best = calibrators.mse(histogram(samples))

    def error(limit: float) -> float:
        step = limit / 127
        return float(np.mean((np.clip(np.rint(samples / step), -127, 127) * step - samples) ** 2))

    tried = [error(limit) for limit in np.linspace(1, np.abs(samples).max(), 60)]
    assert error(best) <= min(tried) * 1.02


def test_a_percentile_is_numpys() -> None:
    samples = np.abs(normal())
    ours = calibrators.percentile(histogram(samples), share=99.0)
    assert ours == pytest.approx(np.percentile(samples, 99.0), rel=0.01)


def test_entropy_does_not_look_at_exact_zeros() -> None:
    with_zeros = histogram(normal())
    before = calibrators.entropy(with_zeros)
    with_zeros.counts[0] += 1e9
    assert calibrators.entropy(with_zeros) == before


def test_zeros_alone_have_no_range_and_a_harmless_scale() -> None:
    result = histogram(np.zeros(100))
    for method in calibrators.METHODS.values():
        assert method(result) == 0
    assert calibrators.scale(0.0) == 1 and calibrators.noise(result, 1.0) == 0


def test_noise_is_the_share_of_the_squared_error() -> None:
    samples = normal()
    scale = 4.0 / 127
    exact = np.clip(np.rint(samples / scale), -127, 127) * scale - samples
    ours = calibrators.noise(histogram(samples), scale)
    assert ours == pytest.approx(np.sum(exact**2) / np.sum(samples**2), rel=0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    with pytest.raises(DataError, match="tensor is not finite"):
        histogram(np.append(normal(100), value))
