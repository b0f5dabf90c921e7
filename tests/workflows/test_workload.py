from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtresnet.bench.workload import Candidate
from rtresnet.core.config import parse_milliseconds, parse_wait
from rtresnet.core.errors import InputError
from rtresnet.workflows import workload
from rtresnet.workflows.benchmark import BenchmarkConfig
from rtresnet.workflows.benchmark_search import SearchConfig
from rtresnet.workflows.loading import RuntimeConfig, load_artifact
from rtresnet.workflows.workload import Workload


def test_measure_queued_clients_without_batcher_call_at_the_same_time() -> None:
    inside, most, lock, durations = 0, 0, threading.Lock(), list[float]()

    def serve(request: object) -> None:
        nonlocal inside, most
        begin = time.perf_counter()
        with lock:
            inside, most = inside + 1, max(most, inside + 1)
        time.sleep(0.01)
        with lock:
            inside -= 1
        durations.append(1e3 * (time.perf_counter() - begin))

    session: Any = None
    requested = Workload(scenario="closed", seconds=3, queries=40, concurrency=4)
    measured = workload.measure_queued(session, Candidate(serve=serve, requests=[0]), requested)
    assert most == 4 and measured.latency.n == 40 and inside == 0
    # If they waited for each other, four would take four times as long as one.
    assert measured.latency.median < 2.5 * np.median(durations)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"scenario": "server"}, "--qps"),
        ({"scenario": "closed"}, "--concurrency"),
        ({"scenario": "offline", "qps": 5}, "server"),
        ({"qps": 5, "batch": (8,)}, "--batch"),
        ({"qps": 0}, "--qps"),
        ({"max_batch": 4}, "--max-batch"),
        ({"qps": 5, "max_batch": 4, "with_preprocess": "."}, "--max-batch"),
        ({"max_wait_ms": 1.0}, "--max-wait"),
        ({"qps": 5, "max_batch": 4, "max_wait_ms": -1.0}, "max_wait_ms"),
        ({"seconds": 0}, "--seconds"),
        ({"seconds": float("nan")}, "--seconds"),
        ({"batch": (0,)}, "batch"),
        ({"scenario": "swarm"}, "single-stream"),
    ],
)
def test_benchmark_config_contradicting_options_are_refused(
    options: dict[str, Any], word: str
) -> None:
    with pytest.raises(InputError, match=word):
        BenchmarkConfig(**options)


@pytest.mark.parametrize(
    ("options", "scenario", "batches"),
    [
        ({}, "single-stream", (1, 8)),
        ({"batch": [4]}, "single-stream", (4,)),
        ({"scenario": "multi-stream"}, "multi-stream", (8,)),
        ({"scenario": "offline"}, "offline", (8,)),
        ({"qps": 5}, "server", (1,)),
        ({"concurrency": 5, "max_batch": 8}, "closed", (1,)),
    ],
)
def test_workload_scenario_follows_from_options(
    options: dict[str, Any], scenario: str, batches: tuple[int, ...]
) -> None:
    requested = BenchmarkConfig(**options).workload()
    assert (requested.scenario, requested.batches) == (scenario, batches)


@pytest.mark.parametrize(("wait", "expected"), [(None, 2.0), (0.0, 0.0), (5.0, 5.0)])
def test_workload_max_wait_of_0_is_not_the_default(wait: float | None, expected: float) -> None:
    config = BenchmarkConfig(qps=5, max_batch=4, max_wait_ms=wait)
    assert config.workload().max_wait_ms == config.wait_ms == expected


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"what": "batch"}, "--p99"),
        ({"what": "size", "p99_ms": 1.0}, "batch or qps"),
        ({"what": "batch", "p99_ms": 1.0, "queries": 3}, "a p99 needs at least 100"),
        ({"what": "qps", "p99_ms": -1.0}, "--p99"),
        (
            {"what": "qps", "p99_ms": 1.0, "max_batch": 4, "with_preprocess": "."},
            "--with-preprocess",
        ),
    ],
)
def test_search_config_without_a_usable_bound_is_refused(
    options: dict[str, Any], word: str
) -> None:
    with pytest.raises(InputError, match=word):
        SearchConfig(**options)


@pytest.mark.parametrize(
    ("text", "expected"), [("10ms", 10), ("0.5s", 500), ("250us", 0.25), ("7", 7), (".5ms", 0.5)]
)
def test_parse_milliseconds_of_a_time(text: str, expected: float) -> None:
    assert parse_milliseconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["0", "0ms", "0s", "0.0"])
def test_parse_wait_takes_0(text: str) -> None:
    assert parse_wait(text) == 0


@pytest.mark.parametrize("text", ["", "0", "-1ms", "ms", "1e3", "1 h", "0ms"])
def test_parse_milliseconds_of_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not a time"):
        parse_milliseconds(text)


def test_read_images_of_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert workload.read_images(None) == ()
    with pytest.raises(InputError, match="no images"):
        workload.read_images(tmp_path)


@pytest.mark.parametrize(
    ("options", "wait"),
    [({"qps": 5, "max_batch": 4, "max_wait_ms": 0}, 0), ({"qps": 5, "max_batch": 4}, 2),
     ({"qps": 5}, None), ({}, None)],
)  # fmt: skip
def test_facts_state_how_long_a_batch_waits(
    options: dict[str, Any], wait: float | None, engines: Path
) -> None:
    with load_artifact(str(engines / "resnet8.onnx"), RuntimeConfig()) as session:
        assert BenchmarkConfig(**options).workload().facts(session).max_wait_ms == wait
