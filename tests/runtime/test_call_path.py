"""The call path through the real CUDA bindings, on a stub of libcuda: results, errors and cost.

What the fake device of fake_gpu.py cannot show: that our calls fit the bindings' signatures and
return values, that a wait releases the GIL, and what `infer` costs. Orders are its matter.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import stub_gpu

BUILDERS = {"tensorrt": 2.5, "tensorrt_rtx": 3.0}
"""Most times the lean sequence that `infer` may take: RTX captures its graph itself, so that the
copies are calls of their own."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("cuda.bindings.driver")
    if shutil.which(stub_gpu.COMPILER) is None:
        pytest.skip(f"no {stub_gpu.COMPILER} to compile the stub with")
    return stub_gpu.compile_stub(tmp_path_factory.mktemp("stub"))


@pytest.mark.parametrize(
    ("builder", "graphs", "captured"),
    [
        ("tensorrt", None, "by hand"),
        ("tensorrt", False, "none"),
        ("tensorrt_rtx", None, "built in"),
    ],
)
def test_infer_over_the_real_bindings_returns_the_engines_numbers(
    library: Path, builder: str, graphs: bool | None, captured: str
) -> None:
    output = stub_gpu.run(library, "results", builder, graphs)
    assert output["wrong"] == [] and output["graphs"] == captured
    assert output["timings"].pop("enqueue") > 0
    assert output["timings"] == {"h2d": 0.5, "compute": 0.5, "d2h": 0.5}
    assert output["left"] == 0, "memory, streams, events or graphs that were not given back"
    assert output["contexts"] == 0 and output["depth"] == 0


def test_every_operation_fits_the_bindings_and_names_a_failure(library: Path) -> None:
    output = stub_gpu.run(library, "operations")
    assert output["types"] == ["int"] * 3 and output["memory"] == [4 << 30, 8 << 30]
    assert output["copied"] == [0] * 8 + list(range(8, 64))
    assert output["launched"] == list(range(64))
    assert output["elapsed"] == 0.5 and output["pinned"] == [True, False]
    for function, (kind, message, code) in output["failed"].items():
        called = function.replace("WithFlags", "").removesuffix("_v2")
        assert (kind, code) == ("UnavailableError", 3), function
        assert message == f"{called} failed: CUDA_ERROR_OUT_OF_MEMORY (2)"
    assert output["outside"][1] == "cuMemAlloc failed: CUDA_ERROR_INVALID_CONTEXT (201)"
    assert output["left"] == 0 and output["depth"] == 0


@pytest.mark.parametrize("blocking", [True, False])
def test_infer_waiting_for_the_device_releases_the_gil(library: Path, blocking: bool) -> None:
    output = stub_gpu.run(library, "waiting", blocking)
    assert output["steps"] > 10_000, "a loop of Python that stood still for the 300 ms"


@pytest.mark.parametrize("builder", BUILDERS)
def test_infer_costs_little_more_than_its_driver_calls(library: Path, builder: str) -> None:
    results: dict[str, Any] = {}
    for _ in range(5):  # the machine may be busy: the ratio of the best rounds is what counts
        results = stub_gpu.run(library, "call_cost", builder, 0.3)
        if results["ratio"] <= BUILDERS[builder]:
            break
    assert results["ratio"] <= BUILDERS[builder], results
    assert results["driver_calls"] == {"tensorrt": 4, "tensorrt_rtx": 5}[builder]


def test_pinned_over_the_real_bindings_is_freed_with_its_last_view(library: Path) -> None:
    output = stub_gpu.run(library, "pinned_memory")
    kind, message, code = output.pop("failed")
    assert (kind, code) == ("UnavailableError", 3) and "cuMemAllocHost failed" in message
    assert output == {"pinned": True, "during": 1, "kept": True, "left": 0}


def test_batcher_of_a_plan_keeps_the_device_busier_than_with_staging(library: Path) -> None:
    """That it does is a matter of order, not of speed; by how much is the benchmark's."""
    for _ in range(3):  # the machine may be busy
        rows = stub_gpu.run(library, "gathering", 0.1, 128)["rows"]
        busy = {row["way"]: row["device_busy"] for row in rows if row["dtype"] == "float32"}
        if busy["pinned, 2 contexts"] > busy["staged"]:
            return
    raise AssertionError(busy)


def test_infer_next_to_a_computing_thread_gains_by_a_short_switch_interval(library: Path) -> None:
    for _ in range(3):
        output = stub_gpu.run(library, "gil", 60)
        slow, fast = output["next to a thread"], output["next to a thread, 1e-4"]
        if fast["median_ms"] < slow["median_ms"] / 2:
            return
    raise AssertionError(output)
