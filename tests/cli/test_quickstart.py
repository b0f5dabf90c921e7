"""Notes of `quickstart`; tests/test_documentation.py runs all of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rtresnet.reporting.quickstart import caveat


def result(speeds: dict[int, float]) -> Any:
    def entry(precision: str, batch: int, speed: float) -> SimpleNamespace:
        run = SimpleNamespace(provider="ONNX Runtime CPU")
        return SimpleNamespace(
            artifact=SimpleNamespace(precision=precision, run=run),
            measurement=SimpleNamespace(batch=batch, speed=speed),
        )

    entries = [entry("int8", batch, speed) for batch, speed in speeds.items()]
    bench = SimpleNamespace(results=[entry("fp32", 1, 1.0), *entries])
    return SimpleNamespace(model="resnet20", bench=bench)


@pytest.mark.parametrize(
    ("speeds", "where"),
    [
        ({1: 0.96, 8: 1.22}, "at batch 1 here"),
        ({1: 1.1, 8: 0.7}, "at batch 8 here"),
        ({1: 0.9, 8: 1.0}, "at batch 1 and batch 8 here"),
    ],
)
def test_where_int8_is_no_faster_it_says_so_and_only_there(
    speeds: dict[int, float], where: str
) -> None:
    assert f"INT8 is not faster than FP32 {where}: resnet20" in (caveat(result(speeds)) or "")


def test_nothing_is_said_where_it_is_faster() -> None:
    assert caveat(result({1: 1.1, 8: 1.2})) is None
