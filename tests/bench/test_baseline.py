from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rtresnet.bench import compare


def entry(scale: float = 1.0, n: int = 2000, seed: int = 0, **changed: Any) -> dict[str, Any]:
    samples = scale * (5 + np.random.default_rng(seed).gamma(2, 0.2, n))
    known = {
        "scenario": "single-stream", "measured": "engines/net.onnx", "batch": 1, "device": "cpu",
        "provider": "ONNX Runtime CPU", "threads": 2, "versions": {"onnxruntime": "1.32.0"},
        "precision": "fp32", "with_preprocess": False, "load": {}, "samples": samples.tolist(),
    }  # fmt: skip
    return known | changed


@pytest.mark.parametrize(
    ("slower", "tolerance", "regression"),
    [(1.00, 0.03, False), (1.05, 0.03, True), (1.05, 0.08, False), (0.90, 0.0, False)],
)
def test_a_regression_is_one_beyond_the_tolerance(
    slower: float, tolerance: float, regression: bool
) -> None:
    judged = compare.judge(entry(slower, seed=1), entry(), tolerance=tolerance)
    assert judged.regression == regression
    assert judged.comparison and judged.comparison.speed == pytest.approx(1 / slower, rel=0.01)


def test_what_cannot_be_told_apart_from_chance_is_no_regression() -> None:
    judged = compare.judge(entry(1.05, n=12), entry(n=12, seed=1), tolerance=0.03)
    assert not judged.regression


def test_throughput_and_tails_are_judged_where_they_are_the_figure() -> None:
    tail = np.asarray(entry()["samples"])
    tail[::60] += 50
    for scenario, regression in (("single-stream", False), ("offline", True), ("server", True)):
        now = entry(scenario=scenario, samples=tail.tolist())
        judged = compare.judge(now, entry(scenario=scenario), tolerance=0.03)
        assert judged.regression == regression, scenario


def test_like_is_alike_and_what_is_not_is_named() -> None:
    assert compare.config_diff(entry(), entry(seed=5, measured="elsewhere/net.onnx")) == []
    old = entry()
    del old["scenario"], old["with_preprocess"]
    assert compare.config_diff(entry(with_preprocess=None), old) == []
    for name, value in (
        ("batch", 8), ("device", "H100"), ("threads", 1), ("measured", "other.onnx"),
        ("versions", {"onnxruntime": "1.31.0"}), ("load", {"qps": 5}), ("scenario", "offline"),
    ):  # fmt: skip
        (words,) = compare.config_diff(entry(**{name: value}), entry())
        assert ", was " in words
