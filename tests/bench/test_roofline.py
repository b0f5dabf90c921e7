from __future__ import annotations

from pathlib import Path

import pytest

from rtresnet.bench import roofline
from rtresnet.bench.roofline import Roof


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RTRESNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "roofline.json"


def counter(calls: list[int]) -> object:
    def measure(threads: int) -> Roof:
        calls.append(threads)
        return Roof(fp32=1e9 * threads, int8=2e9, bandwidth=3e9)

    return measure


def test_a_roof_is_measured_once_for_each_number_of_threads(cache: Path) -> None:
    calls: list[int] = []
    measure = counter(calls)
    assert roofline.of_this_machine(2, measure=measure)[1] is True  # type: ignore[arg-type]
    roof, fresh = roofline.of_this_machine(2, measure=measure)  # type: ignore[arg-type]
    assert not fresh and roof.fp32 == 2e9
    assert roofline.of_this_machine(1, measure=measure)[1] is True  # type: ignore[arg-type]
    assert roofline.of_this_machine(2, remeasure=True, measure=measure)[1] is True  # type: ignore[arg-type]
    assert calls == [2, 1, 2]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": 1}', '{"%s": {"fp32": 1.0}}',
                '{"%s": {"fp32": 0.0, "int8": 1.0, "bandwidth": 1.0}}', "\x00\xff"]
)  # fmt: skip
def test_a_broken_cache_is_measured_anew(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content.replace("%s", roofline.key(2)), encoding="utf-8")
    calls: list[int] = []
    assert roofline.of_this_machine(2, measure=counter(calls))[0].fp32 == 2e9  # type: ignore[arg-type]
    assert calls == [2]
    assert not roofline.of_this_machine(2, measure=counter(calls))[1]  # type: ignore[arg-type]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("RTRESNET_CACHE", str(tmp_path / "file"))
    assert roofline.of_this_machine(1, measure=counter([]))[0].int8 == 2e9  # type: ignore[arg-type]


def test_real_rates_are_those_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(roofline, "SECONDS", 0.02)
    monkeypatch.setattr(roofline, "SIDES", (128,))
    monkeypatch.setattr(roofline, "COPY", 8 << 20)
    roof = roofline.measure_roof(1)
    assert 1e7 < roof.fp32 < 1e13 and 1e7 < roof.int8 < 1e14 and 1e7 < roof.bandwidth < 1e12
    assert roof.rate("fp16") == roof.fp32 and roof.rate("int8") == roof.int8
