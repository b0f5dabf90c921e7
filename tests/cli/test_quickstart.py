"""What `quickstart` says next to its table; the whole of it runs in tests/test_readme.py."""

from __future__ import annotations

from typing import Any

import pytest

from rtresnet.cli.quickstart import caveat


def result(speeds: dict[int, float]) -> dict[str, Any]:
    entries = [
        {"precision": "int8", "batch": batch, "speed": speed, "provider": "ONNX Runtime CPU"}
        for batch, speed in speeds.items()
    ]
    plain = {"precision": "fp32", "batch": 1, "speed": 1.0, "provider": "ONNX Runtime CPU"}
    return {"model": "resnet20", "bench": {"results": [plain, *entries]}}


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
