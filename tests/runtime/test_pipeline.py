"""Batches in flight and pinned memory, on a fake GPU."""

from __future__ import annotations

import gc
import itertools
import random
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from fake_gpu import (
    Bench,
    close,
    expected,
    images,
)

import rtresnet
from rtresnet.core.errors import InputError, UnavailableError
from rtresnet.runtime import cuda, execution
from rtresnet.runtime.trt import TrtBackend

LONG = 30  # seconds after which a test has failed


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rtx_built", [True, False])
@pytest.mark.parametrize("contexts", [1, 2])
def test_pipeline_any_order_of_the_device_returns_results_in_order(
    bench: Bench, seed: int, rtx_built: bool, contexts: int
) -> None:
    if not rtx_built:
        bench.by_hand()
    backend = bench.load(contexts=contexts)
    bench.cuda.shuffle = random.Random(seed)
    counts = [5, 8, 8, 8, 3, 20, 1, 43, 8, 8]
    batches = [images(count, seed=index) for index, count in enumerate(counts)]
    done = 0
    with backend.pipeline() as pipeline:
        assert pipeline.depth == backend.in_flight == 2 * contexts
        for index, batch in enumerate(batches):
            pipeline.put(batch)
            if index >= pipeline.depth - 1:
                close(pipeline.get(), expected(batches[done]))
                done += 1
        while done < len(batches):
            close(pipeline.get(), expected(batches[done]))
            done += 1
        with pytest.raises(InputError, match="in flight; call put"):
            pipeline.get()
    close(backend.infer(images(3)), expected(images(3)))
    backend.close()
    assert bench.cuda.live == []


def test_pipeline_of_tensorrt_launches_graphs_and_makes_nothing_once_warm(bench: Bench) -> None:
    bench.by_hand()
    backend = bench.load()
    with backend.pipeline() as pipeline:
        for _ in range(6):
            pipeline.put(images(8))
        bench.cuda.log.clear()
        made = bench.cuda.made.copy()
        for _ in range(4):
            pipeline.put(images(8))
            pipeline.get()
        assert bench.cuda.made == made
        assert Counter(bench.cuda.log)["launch"] == 4 and "synchronize" not in bench.cuda.log


def test_pipeline_copies_run_while_the_batch_before_is_computed(bench: Bench) -> None:
    backend = bench.load(timings=True)
    with backend.pipeline() as pipeline:
        pipeline.put(images(8))
        bench.cuda.timeline.clear()
        for _ in range(8):
            pipeline.put(images(8))
            pipeline.get()
            assert pipeline.timings().keys() >= {"h2d", "compute", "d2h", "enqueue"}
    ends = [end for name, _, end in bench.cuda.timeline if name == "execute"]
    steps = [later - end for end, later in itertools.pairwise(ends)]
    assert max(steps[2:]) < 11, "in turn a batch would take 4 + 5 + 2 ms"


def test_pipeline_left_early_drops_what_is_in_flight(bench: Bench) -> None:
    backend = bench.load()
    with backend.pipeline() as pipeline:
        pipeline.put(images(8))
        pipeline.put(images(4))
    assert bench.cuda.is_idle()
    close(backend.infer(images(8, seed=2)), expected(images(8, seed=2)))


def test_pipeline_failed_call_loses_what_is_in_flight_and_nothing_else(bench: Bench) -> None:
    backend = bench.load()
    with backend.pipeline() as pipeline:
        pipeline.put(images(8))
        with pytest.raises(InputError, match="needs float32"):
            pipeline.put(images(8)[0])
        close(pipeline.get(), expected(images(8)))
        pipeline.put(images(8))
        bench.fail("execute_async_v3")
        with pytest.raises(UnavailableError, match="execute_async_v3"):
            pipeline.put(images(4))
        with pytest.raises(InputError, match="in flight; call put"):
            pipeline.get()
        pipeline.put(images(3))
        close(pipeline.get(), expected(images(3)))
    backend.close()
    with pytest.raises(InputError, match="closed"), backend.pipeline():
        pass
    assert bench.cuda.live == []


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 3, 4), "float32"), (7, np.uint8), ((0, 4), "u1"), ((), "f8")]
)
def test_pinned_array_frees_its_memory_with_its_last_view(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, shape: Any, dtype: Any
) -> None:
    monkeypatch.setattr(cuda, "open_cuda", lambda: bench.cuda)
    array = rtresnet.pinned(shape, dtype)
    assert array.shape == np.empty(shape).shape and array.dtype == np.dtype(dtype)
    assert array.flags.writeable and array.flags.c_contiguous
    with bench.cuda.active():
        assert bench.cuda.is_pinned(array.ctypes.data)
    view = array.reshape(-1)[1:]
    del array
    assert [kind for kind, _ in bench.cuda.live] == ["allocate_pinned"]
    del view
    assert bench.cuda.live == []


@pytest.mark.parametrize(("shape", "dtype"), [(-1, "u1"), ((2, -3), "u1"), (3, "tensor"), (3, "O")])
def test_pinned_array_that_numpy_does_not_have_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, shape: Any, dtype: Any
) -> None:
    monkeypatch.setattr(cuda, "open_cuda", lambda: bench.cuda)
    with pytest.raises(InputError, match="pinned: shape"):
        rtresnet.pinned(shape, dtype)
    assert bench.cuda.live == []


def test_pinned_without_a_gpu_exits_3_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.hardware, "gpus", lambda: ())
    with pytest.raises(UnavailableError) as caught:
        rtresnet.pinned((2, 3), np.uint8)
    assert caught.value.exit_code == 3 and caught.value.fix


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("rtx_built", [True, False])
def test_batcher_of_a_plan_gathers_into_pinned_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, contexts: int, rtx_built: bool
) -> None:
    if not rtx_built:
        bench.by_hand()
    monkeypatch.setattr(execution, "PINNED_FROM", 0)
    with rtresnet.load(bench.path, contexts=contexts) as session:
        backend = session.backend
        assert isinstance(backend, TrtBackend)
        staging = [buffers.host_in for stream in backend._streams for buffers in stream.buffers]
        for memory in staging:
            memory[:] = 7
        before = len([entry for entry in bench.cuda.live if entry[0] == "allocate_pinned"])
        batch = images(40)
        with rtresnet.Batcher(session, max_batch=8, max_wait_ms=1e9) as batcher:
            rooms = len([entry for entry in bench.cuda.live if entry[0] == "allocate_pinned"])
            assert rooms - before == contexts + 1  # one is gathered ahead
            futures = [batcher.submit(image) for image in batch]
            close(np.stack([future.result(LONG) for future in futures]), expected(batch))
        assert all((memory == 7).all() for memory in staging), "copied once more on the host"
        del batcher, futures
    gc.collect()
    assert bench.cuda.live == []


def test_batcher_of_a_plan_computes_as_many_batches_at_once_as_contexts(bench: Bench) -> None:
    with rtresnet.load(bench.path, contexts=2) as session:
        together = threading.Barrier(2)
        bench.cuda.on_join = lambda: together.wait(LONG)
        with rtresnet.Batcher(session, max_batch=8, max_wait_ms=1e9) as batcher:
            futures = [batcher.submit(image) for image in images(16)]
            close(np.stack([future.result(LONG) for future in futures]), expected(images(16)))
        assert not together.broken
