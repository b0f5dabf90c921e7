"""How a plan runs its batches, on a fake GPU: chunks, order, memory and CUDA graphs."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import fake_gpu
import numpy as np
import pytest
from fake_gpu import (
    CLASSES,
    Bench,
    WithDlpack,
    close,
    expected,
    images,
)

from rtresnet.core.errors import InputError, UnavailableError
from rtresnet.core.sidecar import Profile
from rtresnet.runtime import contexts, execution
from rtresnet.runtime.io_spec import split_batch

# Splitting a batch into chunks.


@pytest.mark.parametrize(
    ("count", "profiles", "parts"),
    [
        (5, ["1:8:8", "1:32:32"], [(5, 0)]),
        (12, ["1:8:32", "1:32:32"], [(12, 0)]),
        (30, ["1:8:32", "1:32:32"], [(30, 1)]),
        (2, ["4:4:8"], [(4, 0)]),
        (6, ["1:1:4", "8:8:16"], [(8, 1)]),
        (33, ["1:1:1", "1:32:32"], [(32, 1), (1, 0)]),
        (1, ["1:8:8", "1:8:32"], [(1, 0)]),
    ],
)
def test_split_batch_takes_the_profile_with_the_nearest_optimum(
    count: int, profiles: list[str], parts: list[tuple[int, int]]
) -> None:
    made = [Profile(min=a, opt=b, max=c) for a, b, c in (map(int, p.split(":")) for p in profiles)]
    assert [(part.run, part.profile) for part in split_batch(count, tuple(made))] == parts


def test_split_batch_any_count_covers_every_row_once() -> None:
    rng = random.Random(0)
    for _ in range(300):
        profiles = tuple(
            Profile(min=low, opt=rng.randint(low, high), max=high)
            for low, high in (sorted(rng.choices(range(1, 20), k=2)) for _ in range(3))
        )
        count = rng.randint(1, 60)
        parts, at = split_batch(count, profiles), 0
        for part in parts:
            profile = profiles[part.profile]
            assert part.start == at and profile.min <= part.run <= profile.max
            assert part.rows <= part.run
            # Filled up only where no profile holds as few.
            assert part.run == part.rows or not any(p.min <= part.rows <= p.max for p in profiles)
            at += part.rows
        assert at == count


@pytest.mark.parametrize(
    ("count", "executed"),
    [(1, [1]), (5, [5]), (8, [8]), (9, [8, 1]), (16, [8, 8]), (43, [8, 8, 8, 8, 8, 3])],
)
@pytest.mark.parametrize("rtx_built", [True, False])
def test_infer_above_the_largest_batch_splits(
    bench: Bench, count: int, executed: list[int], rtx_built: bool
) -> None:
    if not rtx_built:
        bench.by_hand()
    backend = bench.load()
    for _ in range(3):  # plain, captured, launched
        bench.engine.runs.clear()
        logits = backend.infer(images(count))
        assert logits.dtype == np.float32
        close(logits, expected(images(count)))
        assert bench.sizes() == executed


@pytest.mark.parametrize(
    ("count", "executed"), [(1, [4]), (3, [4]), (4, [4]), (7, [7]), (9, [8, 4])]
)
def test_infer_below_the_smallest_batch_pads(bench: Bench, count: int, executed: list[int]) -> None:
    bench.engine.profiles = [(4, 4, 8)]
    backend = bench.load()
    backend.infer(images(16, seed=1))  # leaves pixels behind
    bench.engine.runs.clear()
    close(backend.infer(images(count)), expected(images(count)))
    assert bench.sizes() == executed
    filled = bench.engine.runs[-1][1][count % 8 or 8 :]
    assert not filled.any(), "what is filled up is zeros, not yesterday's image"


def test_infer_with_several_profiles_shares_one_stream(bench: Bench) -> None:
    bench.engine.profiles = [(1, 1, 1), (1, 4, 4), (2, 8, 8)]
    backend = bench.load()
    for count in (1, 3, 8, 1, 10):
        close(backend.infer(images(count)), expected(images(count)))
    ran = [(profile, len(batch)) for profile, batch in bench.engine.runs]
    assert ran == [(0, 1), (1, 3), (2, 8), (0, 1), (2, 8), (0, 2)] or ran[:4] == [
        (0, 1), (1, 3), (2, 8), (0, 1),
    ]  # fmt: skip
    assert (backend.smallest, backend.largest) == (1, 8)


# Order of the work.


def calls_of(bench: Bench, *batches: np.ndarray) -> Counter[str]:
    """Load a plan, run the batches once, and count the driver calls of running them again."""
    backend = bench.load()
    for batch in batches:
        backend.infer(batch)
    bench.cuda.log.clear()
    for batch in batches:
        close(backend.infer(batch), expected(batch))
    return Counter(bench.cuda.log)


def test_infer_of_one_chunk_waits_once_and_records_no_events(bench: Bench) -> None:
    calls = calls_of(bench, images(3))
    assert (calls["execute"], calls["synchronize"], calls["join"]) == (1, 1, 0)
    assert not calls["record"] and not calls["is_pinned"] and not calls["elapsed"]


def test_infer_for_tensorrt_launches_one_graph_and_waits_once(bench: Bench) -> None:
    bench.by_hand()
    calls = calls_of(bench, *(images(count) for count in (1, 2, 4, 8)))
    assert (calls["launch"], calls["synchronize"]) == (4, 4)
    assert not calls["execute"] and not calls["to_device"] and not calls["to_host"]


def test_infer_with_blocking_waits_for_an_event_that_sleeps(bench: Bench) -> None:
    backend = bench.load(blocking=True)
    backend.infer(images(3))  # creates a context, which synchronizes
    bench.cuda.log.clear()
    bench.cuda.sleepers.clear()
    close(backend.infer(images(3)), expected(images(3)))
    close(backend.infer(images(20)), expected(images(20)))
    assert "synchronize" not in bench.cuda.log
    assert len(bench.cuda.sleepers) == 1 + 3


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("rtx_built", [True, False])
def test_infer_any_order_of_the_device_returns_the_same(
    bench: Bench, seed: int, rtx_built: bool
) -> None:
    if not rtx_built:
        bench.by_hand()
    bench.engine.profiles = [(2, 4, 8), (1, 1, 2)]
    backend = bench.load()
    bench.cuda.shuffle = random.Random(seed)
    for count in (43, 5, 1, 16, 9, 43):
        batch = images(count, seed=count)
        close(backend.infer(batch), expected(batch))
    _, on_device = bench.on_gpu(images(21))
    _, out = bench.on_gpu(np.zeros((21, CLASSES), np.float32))
    backend.infer(WithDlpack(on_device), out=WithDlpack(out))
    close(out, expected(images(21)))
    backend.close()
    assert bench.cuda.live == [entry for entry in bench.cuda.live if entry[0] == "allocate"]


def test_timeline_of_several_chunks_overlaps_copies(bench: Bench) -> None:
    parts = bench.load(timings=True).timeline(images(40))
    assert len(parts) == 5
    for part, later in itertools.pairwise(parts):
        assert part["h2d"][1] <= part["compute"][0] and part["compute"][1] <= part["d2h"][0]
        # One part is computed after the other, without a gap once they are under way.
        assert later["compute"][0] >= part["compute"][1]
        assert later["h2d"][0] < part["compute"][1], "copied in while the one before is computed"
    for part, later in itertools.pairwise(parts[:-1]):
        assert part["d2h"][1] > later["compute"][0], "copied out while the next one is computed"
    whole = parts[-1]["d2h"][1] - parts[0]["h2d"][0]
    assert whole < 0.75 * 5 * (4 + 5 + 2), "in turn it would be 55 ms"


def test_timeline_of_a_batch_that_fits_has_one_chunk(bench: Bench) -> None:
    assert len(bench.load(timings=True).timeline(images(8))) == 1


# Memory.


def test_infer_of_a_small_batch_copies_only_its_bytes(bench: Bench) -> None:
    backend = bench.load()
    backend.infer(images(3))
    assert bench.cuda.copied == [("to_device", 3 * 192), ("to_host", 3 * 4 * CLASSES)]


@pytest.mark.parametrize("rtx_built", [True, False])
def test_infer_after_warm_up_allocates_nothing(bench: Bench, rtx_built: bool) -> None:
    if not rtx_built:
        bench.by_hand()
    backend = bench.load(contexts=2)
    sizes = (1, 8, 20, 3)
    for _ in range(5):
        for count in sizes:
            backend.infer(images(count))
    made, contexts = bench.cuda.made.copy(), bench.engine.contexts
    for count in sizes * 20:
        backend.infer(images(count))
    assert bench.cuda.made == made and bench.engine.contexts == contexts


def test_infer_twice_keeps_the_first_result(bench: Bench) -> None:
    backend = bench.load()
    first = backend.infer(images(4))
    backend.infer(images(4, seed=1))
    close(first, expected(images(4)))


def test_infer_with_out_writes_into_it(bench: Bench) -> None:
    backend = bench.load()
    out = np.full((11, CLASSES), np.nan, np.float32)
    assert backend.infer(images(11), out=out) is out
    close(out, expected(images(11)))


@pytest.mark.parametrize(
    "out",
    [
        np.empty((3, CLASSES), np.float64),
        np.empty((2, CLASSES), np.float32),
        np.empty(3, np.float32),
        [[0.0] * CLASSES] * 3,
        (np.empty((3, CLASSES), np.float32),) * 2,
        np.broadcast_to(np.float32(0), (3, CLASSES)),
    ],
    ids=["float64", "rows", "rank", "list", "two", "read-only"],
)
def test_infer_with_a_wrong_out_is_refused(bench: Bench, out: Any) -> None:
    with pytest.raises(InputError, match="out "):
        bench.load().infer(images(3), out=out)


def test_infer_of_strided_images_returns_the_same(bench: Bench) -> None:
    backend = bench.load()
    batch = images(24)[::2]
    assert not batch.flags.c_contiguous
    close(backend.infer(batch), expected(batch))
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(images(3), 1, -1)), -1, 1)
    assert not last.flags.c_contiguous
    close(backend.infer(last), expected(images(3)))


@pytest.mark.parametrize("rtx_built", [True, False])
@pytest.mark.parametrize("count", [3, 8, 12])
def test_infer_of_pinned_images_copies_nothing_on_the_host(
    bench: Bench, count: int, rtx_built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rtx_built:
        bench.by_hand()
    backend = bench.load()
    monkeypatch.setattr(execution, "PINNED_FROM", 0)
    with bench.cuda.active():
        address = bench.cuda.allocate_pinned(count * 192)
    pinned = bench.cuda.host(address, count * 192).view(np.float32).reshape(count, 3, 4, 4)
    pinned[:] = images(count)
    before = [buffers.host_in.copy() for buffers in backend._streams[0].buffers]
    for _ in range(3):  # plain, captured, launched
        close(backend.infer(pinned), expected(images(count)))
    after = [buffers.host_in for buffers in backend._streams[0].buffers]
    np.testing.assert_array_equal(after, before)


def test_infer_of_small_images_does_not_query_the_driver(bench: Bench) -> None:
    """Copying them is cheaper than asking the driver whether they are pinned."""
    backend = bench.load()
    backend.infer(images(8))
    assert "is_pinned" not in bench.cuda.log


@pytest.mark.parametrize(
    "batch",
    [
        images(2).astype(np.float64),
        images(2).astype(np.float16),
        images(2).astype(">f4"),
        (images(2) * 100).astype(np.uint8),
        images(2)[:, :1],
        images(2)[:, :, :3],
        images(2)[0],
        images(2).transpose(0, 2, 3, 1),
        images(0),
        np.float32(1),
        "images",
    ],
    ids=[
        "float64", "float16", "big endian", "uint8", "grey", "small", "one image", "NHWC", "empty",
        "scalar", "text",
    ],
)  # fmt: skip
def test_infer_of_another_type_or_shape_is_refused(bench: Bench, batch: Any) -> None:
    backend = bench.load()
    bench.cuda.log.clear()
    with pytest.raises(InputError, match=r"needs float32 \[N, 3, 4, 4\]"):
        backend.infer(batch)
    assert bench.cuda.log == []


# CUDA graphs.


def test_graphs_of_tensorrt_rtx_are_captured_by_itself(bench: Bench) -> None:
    backend = bench.load()
    for _ in range(3):
        backend.infer(images(3))
    strategies = [config.cuda_graph_strategy for config in bench.engine.made_by]
    # One context for changing addresses, and one for each of 1, 2, 4, 8 and 3 images.
    assert strategies == ["default"] + ["whole"] * 5
    assert "begin_capture" not in bench.cuda.log and backend.graphs == "built in"
    bench.engine.made_by.clear()
    assert bench.load(graphs=False).graphs == "none"
    assert [config.cuda_graph_strategy for config in bench.engine.made_by] == ["default"]


def test_graphs_alternating_batch_sizes_keep_their_contexts(bench: Bench) -> None:
    """A context of TensorRT-RTX has one graph, which another shape or address would replace."""
    backend = bench.load()
    bench.engine.calls.clear()
    for count in (1, 8, 2, 4) * 5:
        close(backend.infer(images(count)), expected(images(count)))
    assert bench.engine.calls == {"execute_async_v3": 20}


def test_graphs_do_not_contain_the_callers_addresses(bench: Bench) -> None:
    backend = bench.load()
    for _ in range(2):
        _, on_device = bench.on_gpu(images(3))
        close(backend.infer(WithDlpack(on_device)), expected(images(3)))
    external, *owned = bench.engine.made_by
    assert external.cuda_graph_strategy == "default" and len(owned) == 4
    for config in owned:
        assert config is owned[0] and config.cuda_graph_strategy == "whole"
    for config in (owned[0], external):
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert owned[0].cache is external.cache is not None


@pytest.mark.parametrize("rtx_built", [True, False])
def test_graphs_context_not_capturable_runs_without_and_warns(
    bench: Bench, rtx_built: bool
) -> None:
    if not rtx_built:
        bench.by_hand()
    bench.engine.capturable = False
    with pytest.warns(RuntimeWarning, match="cannot capture a batch of 1"):
        backend = bench.load()
    assert backend.graphs == "none"
    for _ in range(3):
        close(backend.infer(images(8)), expected(images(8)))
    assert not bench.cuda.made["end_capture"]
    backend.close()
    with pytest.raises(UnavailableError, match="a batch of 1; build the plan") as caught:
        bench.load(graphs=True)
    assert caught.value.exit_code == 3 and bench.cuda.live == []


def test_graphs_for_tensorrt_are_captured_at_the_second_call(bench: Bench) -> None:
    bench.by_hand()
    backend = bench.load()
    assert backend.graphs == "by hand"
    done = []
    for count in (3, 3, 3, 5, 3, 5, 5, 8):
        bench.cuda.log.clear()
        close(backend.infer(images(count)), expected(images(count)))
        done.append([name for name in ("begin_capture", "launch") if name in bench.cuda.log])
    both = ["begin_capture", "launch"]
    assert done == [[], both, ["launch"], [], ["launch"], both, ["launch"], ["launch"]]


def test_graphs_pad_batches_to_few_sizes(bench: Bench) -> None:
    bench.by_hand()
    bench.engine.profiles = [(1, 16, 48)]
    backend = bench.load()
    bench.engine.runs.clear()
    for count in (9, 11, 17, 31, 33, 48):
        close(backend.infer(images(count)), expected(images(count)))
    assert bench.sizes() == [10, 12, 20, 32, 33, 48]
    bench.engine.runs.clear()
    plain = bench.load(graphs=False)
    plain.infer(images(17))
    assert bench.sizes() == [17], "without graphs there is no reason to pad"


def test_graphs_unusual_batch_sizes_have_none(bench: Bench) -> None:
    bench.by_hand()
    bench.engine.profiles = [(1, 16, 48)]
    backend = bench.load()
    made = bench.cuda.made["end_capture"]
    assert made == len(execution.WARMED)
    _, on_device = bench.on_gpu(images(3))
    for _ in range(3):
        backend.infer(WithDlpack(on_device))
        close(backend.infer(images(33)), expected(images(33)))  # launching costs it little
    assert bench.cuda.made["end_capture"] == made
    for _ in range(3):
        backend.infer(images(48))
    assert bench.cuda.made["end_capture"] == made + 1


def test_graphs_least_recently_used_makes_room(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.by_hand()
    monkeypatch.setattr(contexts, "GRAPH_CONTEXTS", 4)
    backend = bench.load()  # 1, 2, 4, 8
    for count in (1, 3, 3, 2, 2, 1, 8):
        close(backend.infer(images(count)), expected(images(count)))
    cached = [run for _, run, _ in backend._streams[0].graphs._contexts]
    assert cached == [3, 2, 1, 8]
    assert len([entry for entry in bench.cuda.live if entry[0] == "end_capture"]) == 4
    backend.close()
    assert bench.cuda.live == []


def test_contexts_without_runtime_config_are_created_directly(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT before 10.11, as JetPack 6 has it."""
    bench.by_hand()
    monkeypatch.delattr(fake_gpu.FakeEngine, "create_runtime_config")
    backend = bench.load()
    for _ in range(3):
        close(backend.infer(images(20)), expected(images(20)))
    assert bench.engine.made_by == ["user"] * len(bench.engine.made_by)
    backend.close()
    assert bench.cuda.live == []


def test_graphs_false_captures_none(bench: Bench) -> None:
    bench.by_hand()
    backend = bench.load(graphs=False)
    for _ in range(3):
        backend.infer(images(3))
    assert "begin_capture" not in bench.cuda.log and backend.graphs == "none"


def test_graphs_binding_without_them_runs_without_or_raises(bench: Bench) -> None:
    bench.by_hand()
    bench.cuda.graphs = False
    backend = bench.load()
    for _ in range(3):
        backend.infer(images(3))
    assert backend.graphs == "none" and "begin_capture" not in bench.cuda.log
    backend.close()
    with pytest.raises(UnavailableError, match="CUDA graphs were requested"):
        bench.load(graphs=True)
    assert bench.cuda.live == []


def test_graphs_failed_capture_runs_without_and_warns(bench: Bench) -> None:
    bench.by_hand()
    bench.cuda.fail_capture = True
    with pytest.warns(RuntimeWarning, match="no CUDA graphs: cudaStreamEndCapture failed"):
        backend = bench.load()
    for _ in range(3):
        close(backend.infer(images(3)), expected(images(3)))
    assert backend.graphs == "none"
    backend.close()
    assert bench.cuda.live == []


def test_graphs_true_failed_capture_raises(bench: Bench) -> None:
    bench.by_hand()
    backend = bench.load(graphs=True)
    backend.infer(images(3))
    bench.fail("execute_async_v3")
    with pytest.raises(UnavailableError, match="execute_async_v3 does not like it"):
        backend.infer(images(3))
    for _ in range(2):
        close(backend.infer(images(3)), expected(images(3)))
    backend.close()
    bench.cuda.fail_capture = True
    with pytest.raises(UnavailableError, match="cudaStreamEndCapture failed"):
        bench.load(graphs=True)
    assert bench.cuda.live == []
