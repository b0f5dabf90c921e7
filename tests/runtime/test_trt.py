"""The TensorRT backend without a GPU: on a fake device, and by the real API's names."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import itertools
import random
import shutil
import threading
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_gpu
import numpy as np
import pytest
from fake_gpu import (
    CLASSES,
    TOP,
    Bench,
    Diagnostics,
    Validity,
    WithDlpack,
    WithInterface,
    expected,
    images,
)

import rtresnet
from rtresnet.core import hardware
from rtresnet.core.errors import ArtifactError, InputError, UnavailableError, UnknownNameError
from rtresnet.core.sidecar import Plan, Profile
from rtresnet.runtime import contexts, cuda, execution
from rtresnet.runtime.contexts import cache_path
from rtresnet.runtime.cuda import Cuda
from rtresnet.runtime.error_log import ErrorLog, logger
from rtresnet.runtime.io_spec import split_batch
from rtresnet.runtime.trt import TrtBackend
from rtresnet.workflows import embed_io
from rtresnet.workflows.embed_io import EmbedConfig

LONG = 30  # seconds after which a test has failed


def close(got: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


# How a call is cut.


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
def test_the_best_profile_runs_a_part(
    count: int, profiles: list[str], parts: list[tuple[int, int]]
) -> None:
    made = [Profile(min=a, opt=b, max=c) for a, b, c in (map(int, p.split(":")) for p in profiles)]
    assert [(part.run, part.profile) for part in split_batch(count, tuple(made))] == parts


def test_every_cut_covers_every_row_once_and_fits() -> None:
    rng = random.Random(0)
    for _ in range(300):
        profiles = tuple(
            Profile(min=low, opt=rng.randint(low, high), max=high)
            for low, high in (sorted(rng.choices(range(1, 20), k=2)) for _ in range(3))
        )
        count = rng.randint(1, 60)
        parts, at = split_batch(count, profiles), 0
        for part in parts:
            held = profiles[part.profile]
            assert part.start == at and held.min <= part.run <= held.max and part.rows <= part.run
            # Filled up only where no profile holds as few.
            assert part.run == part.rows or not any(p.min <= part.rows <= p.max for p in profiles)
            at += part.rows
        assert at == count


@pytest.mark.parametrize(
    ("count", "executed"),
    [(1, [1]), (5, [5]), (8, [8]), (9, [8, 1]), (16, [8, 8]), (43, [8, 8, 8, 8, 8, 3])],
)
@pytest.mark.parametrize("rtx_built", [True, False])
def test_a_batch_above_the_largest_is_split(
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
def test_a_batch_below_the_smallest_is_filled_up_and_cut(
    bench: Bench, count: int, executed: list[int]
) -> None:
    bench.engine.profiles = [(4, 4, 8)]
    backend = bench.load()
    backend.infer(images(16, seed=1))  # leaves pixels behind
    bench.engine.runs.clear()
    close(backend.infer(images(count)), expected(images(count)))
    assert bench.sizes() == executed
    filled = bench.engine.runs[-1][1][count % 8 or 8 :]
    assert not filled.any(), "what is filled up is zeros, not yesterday's image"


def test_several_profiles_share_one_lane(bench: Bench) -> None:
    bench.engine.profiles = [(1, 1, 1), (1, 4, 4), (2, 8, 8)]
    backend = bench.load()
    for count in (1, 3, 8, 1, 10):
        close(backend.infer(images(count)), expected(images(count)))
    ran = [(profile, len(batch)) for profile, batch in bench.engine.runs]
    assert ran == [(0, 1), (1, 3), (2, 8), (0, 1), (2, 8), (0, 2)] or ran[:4] == [
        (0, 1), (1, 3), (2, 8), (0, 1),
    ]  # fmt: skip
    assert (backend.smallest, backend.largest) == (1, 8)


# Order.


def calls_of(bench: Bench, *batches: np.ndarray) -> Counter[str]:
    """Loads a plan, runs the batches once, and counts the driver calls of running them again."""
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
def test_no_order_that_a_device_may_choose_changes_a_result(
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
    _, there = bench.on_gpu(images(21))
    _, out = bench.on_gpu(np.zeros((21, CLASSES), np.float32))
    backend.infer(WithDlpack(there), out=WithDlpack(out))
    close(out, expected(images(21)))
    backend.close()
    assert bench.cuda.live == [entry for entry in bench.cuda.live if entry[0] == "allocate"]


def test_copies_run_while_another_part_is_computed(bench: Bench) -> None:
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


def test_a_part_is_not_split_off_where_one_will_do(bench: Bench) -> None:
    assert len(bench.load(timings=True).timeline(images(8))) == 1


# Memory.


def test_only_the_bytes_of_the_batch_are_copied(bench: Bench) -> None:
    backend = bench.load()
    backend.infer(images(3))
    assert bench.cuda.copied == [("to_device", 3 * 192), ("to_host", 3 * 4 * CLASSES)]


@pytest.mark.parametrize("rtx_built", [True, False])
def test_nothing_is_made_by_a_call_after_warm_up(bench: Bench, rtx_built: bool) -> None:
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


def test_a_result_is_not_overwritten_by_the_next(bench: Bench) -> None:
    backend = bench.load()
    first = backend.infer(images(4))
    backend.infer(images(4, seed=1))
    close(first, expected(images(4)))


def test_a_result_goes_where_it_is_asked_for(bench: Bench) -> None:
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
def test_an_out_that_does_not_fit_is_refused(bench: Bench, out: Any) -> None:
    with pytest.raises(InputError, match="out "):
        bench.load().infer(images(3), out=out)


def test_images_need_not_lie_in_one_piece(bench: Bench) -> None:
    backend = bench.load()
    batch = images(24)[::2]
    assert not batch.flags.c_contiguous
    close(backend.infer(batch), expected(batch))
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(images(3), 1, -1)), -1, 1)
    assert not last.flags.c_contiguous
    close(backend.infer(last), expected(images(3)))


@pytest.mark.parametrize("rtx_built", [True, False])
@pytest.mark.parametrize("count", [3, 8, 12])
def test_pinned_images_are_copied_from_where_they_are(
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


def test_small_images_are_not_asked_about(bench: Bench) -> None:
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
def test_images_of_another_type_or_shape_are_refused(bench: Bench, batch: Any) -> None:
    backend = bench.load()
    bench.cuda.log.clear()
    with pytest.raises(InputError, match=r"takes float32 \[N, 3, 4, 4\]"):
        backend.infer(batch)
    assert bench.cuda.log == []


# Arrays on the GPU.


def copies(bench: Bench) -> list[str]:
    return [name for name, _ in bench.cuda.copied]


@pytest.mark.parametrize("wrap", [WithDlpack, WithInterface])
@pytest.mark.parametrize("count", [3, 20])
def test_images_on_the_gpu_are_computed_from_where_they_lie(
    bench: Bench, wrap: Any, count: int
) -> None:
    backend = bench.load(timings=True)
    _, there = bench.on_gpu(images(count))
    close(backend.infer(wrap(there)), expected(images(count)))
    # Rows 8 and 16 begin at multiples of 256 bytes.
    assert set(copies(bench)) == {"to_host"}
    timings = backend.timings()
    assert timings["h2d"] == 0 and timings["compute"] == 5 and timings["d2h"] == 2


def test_a_result_is_written_where_it_lies_on_the_gpu(bench: Bench) -> None:
    backend = bench.load()
    _, there = bench.on_gpu(images(5))
    _, result = bench.on_gpu(np.zeros((5, CLASSES), np.float32))
    out = WithInterface(result)
    assert backend.infer(WithDlpack(there), out=out) is out
    close(result, expected(images(5)))
    assert copies(bench) == []


def test_rows_of_others_are_left_alone_where_a_batch_is_filled_up(bench: Bench) -> None:
    bench.engine.profiles = [(4, 4, 8)]
    backend = bench.load()
    _, there = bench.on_gpu(images(4))
    _, result = bench.on_gpu(np.full((4, CLASSES), 7, np.float32))
    backend.infer(WithDlpack(there[:2]), out=WithDlpack(result[:2]))
    close(result[:2], expected(images(2)))
    assert (result[2:] == 7).all()
    assert not bench.engine.runs[-1][1][2:].any()


def test_an_address_that_tensorrt_does_not_take_is_copied_on_the_gpu(bench: Bench) -> None:
    backend = bench.load()
    _, there = bench.on_gpu(images(19), offset=64)
    _, result = bench.on_gpu(np.zeros((19, CLASSES), np.float32), offset=4)
    backend.infer(WithDlpack(there), out=WithDlpack(result))
    close(result, expected(images(19)))
    assert set(copies(bench)) == {"on_device"}


@pytest.mark.parametrize("version", [2, 3])
def test_what_is_still_being_written_is_waited_for(bench: Bench, version: int) -> None:
    backend = bench.load()
    _, there = bench.on_gpu(np.zeros((3, 3, 4, 4), np.float32))
    with bench.cuda.active():
        theirs = 1 if version == 2 else bench.cuda.stream()
        bench.cuda.enqueue("theirs", theirs, lambda: np.copyto(there, images(3)))
    said = {"version": version} | ({"stream": theirs} if version == 3 else {})
    close(backend.infer(WithInterface(there, **said)), expected(images(3)))


def test_dlpack_is_told_the_stream_that_will_read(bench: Bench) -> None:
    backend = bench.load()
    tensor = WithDlpack(bench.on_gpu(images(3))[1])
    backend.infer(tensor)
    assert tensor.streams == [backend._streams[0].compute]


def test_dlpack_on_the_host_is_an_array_like_any(bench: Bench) -> None:
    torch = pytest.importorskip("torch")
    close(bench.load().infer(torch.from_numpy(images(3))), expected(images(3)))


class Kept(WithDlpack):
    def __dlpack__(self, *, stream: int) -> Any:
        raise BufferError("requires grad")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda view: WithDlpack(view[:, :, ::2]), "not contiguous"),
        (lambda view: WithInterface(view, strides=(4, 4, 4, 4)), "not contiguous"),
        (lambda view: WithDlpack(view.astype(np.float16)), "takes float32"),
        (lambda view: WithDlpack(view.astype(np.complex64)), "DLPack code 5"),
        (lambda view: WithInterface(view, typestr="<f8"), "takes float32"),
        (lambda view: WithDlpack(view[0]), "takes float32"),
        (lambda view: WithDlpack(view, (2, 1)), "on GPU 1, the plan on GPU 0"),
        (lambda view: Kept(view), "requires grad"),
    ],
)
def test_an_array_on_the_gpu_that_does_not_fit_is_refused(
    bench: Bench, make: Any, message: str
) -> None:
    backend = bench.load()
    with pytest.raises(InputError, match=message):
        backend.infer(make(bench.on_gpu(images(2))[1]))
    close(backend.infer(images(3)), expected(images(3)))


def test_a_result_that_may_not_be_written_is_refused(bench: Bench) -> None:
    _, there = bench.on_gpu(np.zeros((2, CLASSES), np.float32))
    out = WithInterface(there, data=(there.ctypes.data, True))
    with pytest.raises(InputError, match="read-only"):
        bench.load().infer(images(2), out=out)


# Other ends.


def test_pixels_as_they_are(bench: Bench) -> None:
    bench.engine.dtype = "uint8"
    backend = bench.load()
    assert (backend.input_dtype, backend.layout, backend.size) == (np.uint8, "nhwc", 4)
    batch = images(11, dtype="uint8")
    np.testing.assert_allclose(backend.infer(batch), expected(batch), rtol=1e-4)
    assert bench.cuda.copied[0] == ("to_device", 8 * 48), "a quarter of the bytes"
    with pytest.raises(InputError, match=r"takes uint8 \[N, 4, 4, 3\]"):
        backend.infer(images(2))


@pytest.mark.parametrize("order", [["indices", "probabilities"], ["probabilities", "indices"]])
@pytest.mark.parametrize("index_dtype", ["int64", "int32"])
def test_a_top_k_plan_gives_indices_and_probabilities(
    bench: Bench, order: list[str], index_dtype: str
) -> None:
    bench.engine.outputs, bench.engine.index_dtype = order, index_dtype
    backend = bench.load()
    wanted = np.argsort(-expected(images(11)), axis=1)[:, :TOP]
    indices, probabilities = backend.infer(images(11))
    assert indices.dtype == np.int64 and probabilities.dtype == np.float32
    np.testing.assert_array_equal(indices, wanted)
    close(probabilities, np.take_along_axis(expected(images(11)), wanted, 1))
    out = (np.zeros((3, TOP), np.int64), np.zeros((3, TOP), np.float32))
    assert backend.infer(images(3), out=out) is out
    np.testing.assert_array_equal(out[0], wanted[:3])


@pytest.mark.parametrize("rtx_built", [True, False])
@pytest.mark.parametrize(
    ("takes", "topk"), [("float32-nchw", None), ("uint8-nhwc", None), ("uint8-nhwc", 3)]
)
def test_infer_with_a_real_net_returns_what_onnx_runtime_returns(
    onnx_file: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    takes: str,
    topk: int | None,
    rtx_built: bool,
) -> None:
    """Real numbers through pixels, top-K and odd splits, in any order a device may choose."""
    plain = tmp_path / "net.onnx"
    for suffix in ("", ".json"):
        shutil.copy(f"{onnx_file('resnet8', 'fp32')}{suffix}", f"{plain}{suffix}")
    embed = EmbedConfig(input=takes, topk=topk)  # type: ignore[arg-type]
    source = embed_io.write(plain, embed)[0] if embed.pixels else plain
    net = Bench(monkeypatch, tmp_path, engine=fake_gpu.OnnxEngine(fake_gpu.FakeCuda(), source))
    if not rtx_built:
        net.by_hand()
    net.engine.profiles = [(2, 4, 7), (1, 1, 1)]
    net.cuda.shuffle = random.Random(0)
    rng = np.random.default_rng(0)
    with rtresnet.load(source, provider="cpu") as reference:
        backend = net.load()
        for count in (1, 7, 8, 17, 3, 17, 3):
            pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            batch = reference.prepare(pixels)
            got, wanted = backend.infer(batch), reference(batch)
            if topk is None:
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
                continue
            np.testing.assert_array_equal(got[0], wanted[0])
            np.testing.assert_allclose(got[1], wanted[1], rtol=1e-4, atol=1e-5)
            assert got[0].dtype == np.int64 and got[0].shape == (count, 3)
        backend.close()
    assert net.cuda.live == []


def test_one_output_on_the_gpu_and_one_on_the_host(bench: Bench) -> None:
    bench.engine.outputs = ["indices", "probabilities"]
    backend = bench.load()
    bench.cuda.shuffle = random.Random(1)
    _, there = bench.on_gpu(np.zeros((21, TOP), np.int64), offset=8)
    backend.infer(images(21), out=(WithDlpack(there), np.zeros((21, TOP), np.float32)))
    np.testing.assert_array_equal(there, np.argsort(-expected(images(21)), axis=1)[:, :TOP])


def test_an_engine_that_is_not_a_nets_is_refused(bench: Bench) -> None:
    bench.engine.get_tensor_shape = lambda name: (-1, 7)  # type: ignore[method-assign]
    with pytest.raises(ArtifactError, match=r"not a net.*images \[-1, 7\]"):
        bench.load()
    assert bench.cuda.live == []


def test_an_end_of_a_type_that_numpy_lacks_is_refused(bench: Bench) -> None:
    def nptype(dtype: str) -> Any:
        raise TypeError("Could not resolve TensorRT datatype")

    bench.trt.nptype = nptype  # type: ignore[attr-defined]
    with pytest.raises(ArtifactError, match="a type that NumPy lacks"):
        bench.load()
    assert bench.cuda.live == []


# CUDA graphs.


def test_tensorrt_rtx_captures_by_itself(bench: Bench) -> None:
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


def test_alternating_batch_sizes_each_keep_their_context(bench: Bench) -> None:
    """A context of TensorRT-RTX has one graph, which another shape or address would replace."""
    backend = bench.load()
    bench.engine.calls.clear()
    for count in (1, 8, 2, 4) * 5:
        close(backend.infer(images(count)), expected(images(count)))
    assert bench.engine.calls == {"execute_async_v3": 20}


def test_addresses_of_the_callers_own_are_in_no_graph(bench: Bench) -> None:
    backend = bench.load()
    for _ in range(2):
        _, there = bench.on_gpu(images(3))
        close(backend.infer(WithDlpack(there)), expected(images(3)))
    external, *owned = bench.engine.made_by
    assert external.cuda_graph_strategy == "default" and len(owned) == 4
    for config in owned:
        assert config is owned[0] and config.cuda_graph_strategy == "whole"
    for config in (owned[0], external):
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert owned[0].cache is external.cache is not None


@pytest.mark.parametrize("rtx_built", [True, False])
def test_a_context_that_cannot_be_captured_runs_without_graphs_and_says_so(
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


def test_for_tensorrt_a_shape_is_captured_at_its_second_call(bench: Bench) -> None:
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


def test_batches_are_padded_to_few_sizes_where_each_keeps_a_graph(bench: Bench) -> None:
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


def test_graphs_are_for_batches_of_fixed_addresses_and_of_usual_sizes(bench: Bench) -> None:
    bench.by_hand()
    bench.engine.profiles = [(1, 16, 48)]
    backend = bench.load()
    made = bench.cuda.made["end_capture"]
    assert made == len(execution.WARMED)
    _, there = bench.on_gpu(images(3))
    for _ in range(3):
        backend.infer(WithDlpack(there))
        close(backend.infer(images(33)), expected(images(33)))  # launching costs it little
    assert bench.cuda.made["end_capture"] == made
    for _ in range(3):
        backend.infer(images(48))
    assert bench.cuda.made["end_capture"] == made + 1


def test_the_graph_that_was_used_longest_ago_makes_room(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.by_hand()
    monkeypatch.setattr(contexts, "GRAPH_CONTEXTS", 4)
    backend = bench.load()  # 1, 2, 4, 8
    for count in (1, 3, 3, 2, 2, 1, 8):
        close(backend.infer(images(count)), expected(images(count)))
    kept = [run for _, run, _ in backend._streams[0].graphs._contexts]
    assert kept == [3, 2, 1, 8]
    assert len([entry for entry in bench.cuda.live if entry[0] == "end_capture"]) == 4
    backend.close()
    assert bench.cuda.live == []


def test_a_binding_without_runtime_config_creates_contexts_directly(
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


def test_without_graphs_none_are_captured(bench: Bench) -> None:
    bench.by_hand()
    backend = bench.load(graphs=False)
    for _ in range(3):
        backend.infer(images(3))
    assert "begin_capture" not in bench.cuda.log and backend.graphs == "none"


def test_a_binding_without_graphs_runs_without_or_says_so(bench: Bench) -> None:
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


def test_what_cannot_be_captured_runs_without_and_says_so(bench: Bench) -> None:
    bench.by_hand()
    bench.cuda.fail_capture = True
    with pytest.warns(RuntimeWarning, match="no CUDA graphs: cudaStreamEndCapture failed"):
        backend = bench.load()
    for _ in range(3):
        close(backend.infer(images(3)), expected(images(3)))
    assert backend.graphs == "none"
    backend.close()
    assert bench.cuda.live == []


def test_what_cannot_be_captured_is_an_error_where_graphs_were_asked_for(bench: Bench) -> None:
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


# Batches in flight, and pinned memory.


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
        with pytest.raises(InputError, match="no batch is in flight; call put"):
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
        with pytest.raises(InputError, match="takes float32"):
            pipeline.put(images(8)[0])
        close(pipeline.get(), expected(images(8)))
        pipeline.put(images(8))
        bench.fail("execute_async_v3")
        with pytest.raises(UnavailableError, match="execute_async_v3"):
            pipeline.put(images(4))
        with pytest.raises(InputError, match="no batch is in flight; call put"):
            pipeline.get()
        pipeline.put(images(3))
        close(pipeline.get(), expected(images(3)))
    backend.close()
    with pytest.raises(InputError, match="after close"), backend.pipeline():
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


# Several at once.


def test_as_many_calls_as_contexts_run_at_once(bench: Bench) -> None:
    backend = bench.load(contexts=3)
    together = threading.Barrier(3)
    bench.cuda.on_join = lambda: together.wait(LONG)
    results: dict[int, np.ndarray] = {}

    def call(seed: int) -> None:
        results[seed] = backend.infer(images(4, seed))

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not together.broken
    for seed in range(3):
        close(results[seed], expected(images(4, seed)))


def test_load_takes_the_number_of_contexts(bench: Bench) -> None:
    made = []
    for count in (1, 3):
        before = bench.engine.contexts
        with rtresnet.load(bench.path, contexts=count):
            made.append(bench.engine.contexts - before)
    assert made[1] == 3 * made[0] > 0


@pytest.mark.parametrize(("graphs", "expected"), [(None, "by hand"), (False, "none")])
def test_load_takes_whether_there_are_graphs(
    bench: Bench, graphs: bool | None, expected: str
) -> None:
    bench.by_hand()
    with rtresnet.load(bench.path, graphs=graphs) as session:
        assert getattr(session.backend, "graphs") == expected  # noqa: B009  # not every backend's


def test_load_takes_when_kernels_are_compiled(bench: Bench) -> None:
    for kernels in ("eager", "lazy"):
        bench.engine.made_by.clear()
        with rtresnet.load(bench.path, kernels=kernels) as session:
            session(images(3))
            _, there = bench.on_gpu(images(3))
            session(WithDlpack(there))  # type: ignore[arg-type]  # what plans take too
        strategies = [c.dynamic_shapes_kernel_specialization_strategy for c in bench.engine.made_by]
        assert set(strategies) == {kernels}
    with pytest.raises(UnknownNameError, match="unknown kernels"):
        rtresnet.load(bench.path, kernels="never")


@pytest.mark.parametrize("contexts", [1, 3])
def test_many_threads_get_their_own_results(bench: Bench, contexts: int) -> None:
    bench.by_hand()
    backend = bench.load(contexts=contexts)
    wrong: list[int] = []

    def call(number: int) -> None:
        for index in range(10):
            batch = images(1 + (number + index) % 12, seed=number * 100 + index)
            got = backend.infer(batch)
            backend.timings()
            if not np.allclose(got, expected(batch), rtol=1e-4, atol=1e-4):
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    backend.close()
    assert bench.cuda.live == []


def test_closing_waits_for_a_call_and_refuses_the_next(bench: Bench) -> None:
    backend = bench.load()
    inside, go = threading.Event(), threading.Event()
    bench.cuda.on_join = lambda: (inside.set(), go.wait(LONG))
    got: list[np.ndarray] = []
    caller = threading.Thread(target=lambda: got.append(backend.infer(images(3))))
    caller.start()
    assert inside.wait(LONG)
    closer = threading.Thread(target=backend.close)
    closer.start()
    go.set()
    for thread in (caller, closer):
        thread.join(LONG)
    close(got[0], expected(images(3)))
    assert bench.cuda.live == []
    for _ in range(2):
        with pytest.raises(InputError, match="infer after close"):
            backend.infer(images(3))
    assert backend.timings() == {}


def test_no_context_makes_no_sense(bench: Bench) -> None:
    with pytest.raises(InputError, match="at least 1"):
        bench.load(contexts=0)


# Failures, and what is left of them.


@pytest.mark.parametrize("rtx_built", [True, False])
def test_closing_frees_everything(bench: Bench, rtx_built: bool) -> None:
    if not rtx_built:
        bench.by_hand()
    backend = bench.load(contexts=2)
    for count in (3, 20, 3, 20):
        backend.infer(images(count))
    bench.cuda.log.clear()
    for kept in (bench.engine.configs, bench.engine.made_by):
        kept.clear()
    backend.close()
    assert bench.cuda.live == []
    kinds = [entry.removeprefix("destroy ") for entry in bench.cuda.log]
    first, last = kinds.index("context"), len(kinds) - 1 - kinds[::-1].index("context")
    for needed in ("allocate", "stream"):  # contexts go before what they use
        assert needed not in kinds[: first + 1] and needed in kinds[last:]
    if rtx_built:  # whose cache belongs to the runtime, and is used by the contexts
        assert last < kinds.index("cache") < kinds.index("runtime")
    backend.close()
    assert len(bench.cuda.log) == len(kinds)


def test_what_was_made_is_freed_whichever_call_of_loading_fails(bench: Bench) -> None:
    for number in itertools.count(1):
        bench.cuda.log.clear()
        bench.cuda.fail_at = number
        try:
            backend = bench.load(contexts=2)
        except UnavailableError as error:
            assert "cudaErrorUnknown" in str(error)
            assert bench.cuda.live == [], f"call {number}"
        else:
            reached = len(bench.cuda.log) >= number  # a context is made, and that does not fail
            backend.close()
            if not reached:
                break
    assert number > 50
    assert bench.cuda.live == []


@pytest.mark.parametrize("rtx_built", [True, False])
def test_whichever_call_of_infer_fails_the_next_one_is_right(bench: Bench, rtx_built: bool) -> None:
    if not rtx_built:
        bench.by_hand()
    failed = 0
    for number in itertools.count(1):
        bench.cuda.fail_at = None
        backend = bench.load()
        backend.infer(images(20))  # the second one captures
        bench.cuda.log.clear()
        bench.cuda.fail_at = number
        before = failed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a capture that fails is told, and done without
            try:
                backend.infer(images(20, seed=number))
            except UnavailableError as error:
                assert "cudaErrorUnknown" in str(error)
                failed += 1
                assert bench.cuda.is_idle(), f"call {number}: something may still write"
            reached = len(bench.cuda.log) >= number
            bench.cuda.fail_at = None
            close(backend.infer(images(20)), expected(images(20)))
        backend.close()
        assert bench.cuda.live == [], f"call {number}"
        if not reached:
            break
        assert failed == before + 1 or not rtx_built
    assert failed > 20


CALLS = [
    "create_runtime_config", "create_runtime_cache", "set_runtime_cache",
    "create_execution_context", "set_optimization_profile_async",
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_call_of_loading_that_fails_tells_what_was_logged(bench: Bench, call: str) -> None:
    bench.engine.fail_at = (call, 1)
    said = rf"net\.plan: {call}.* failed on Test GPU: Error Code 3: {call} does not like it"
    with pytest.raises(UnavailableError, match=said if "cache" not in call else call):
        bench.load()
    assert bench.cuda.live == []


@pytest.mark.parametrize("call", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
@pytest.mark.parametrize("rtx_built", [True, False])
def test_a_call_of_infer_that_fails_tells_what_was_logged(
    bench: Bench, call: str, rtx_built: bool
) -> None:
    if not rtx_built:
        bench.by_hand()
    backend = bench.load()
    bench.fail(call)
    said = rf"{call}.* failed on Test GPU: Error Code 3: {call} does not like it$"
    with pytest.raises(UnavailableError, match=said):
        backend.infer(images(20))
    for _ in range(3):
        close(backend.infer(images(20)), expected(images(20)))
    backend.close()
    assert bench.cuda.live == []


class Interrupted(Exception):
    """Stands for the KeyboardInterrupt of a Ctrl-C, wherever it comes."""


@pytest.mark.parametrize("waiting", ["close", "timings"])
def test_a_wait_for_running_calls_that_is_interrupted_loses_nothing(
    bench: Bench, waiting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = bench.load(contexts=2)
    backend.infer(images(3))
    free, calls = backend._free, itertools.count()

    def interrupted() -> Any:
        if next(calls) == 1:
            raise Interrupted
        return free.get()

    monkeypatch.setattr(backend, "_free", SimpleNamespace(get=interrupted, put=free.put))
    with pytest.raises(Interrupted):
        getattr(backend, waiting)()
    monkeypatch.undo()
    assert backend._free.qsize() == 2
    close(backend.infer(images(3)), expected(images(3)))
    backend.close()
    assert bench.cuda.live == []


def test_a_device_that_is_lost_leaves_nothing_behind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = bench.load()
    backend.infer(images(3))

    def lost() -> Any:
        raise UnavailableError("cudaSetDevice failed: cudaErrorLaunchFailure (719)")

    monkeypatch.setattr(bench.cuda, "active", lost)
    # The fake holds that each call is made while the device is active; a lost one never is.
    monkeypatch.setattr(bench.cuda, "_call", lambda name: None)
    with pytest.raises(UnavailableError, match="cudaErrorLaunchFailure"):
        backend.close()
    assert bench.cuda.live == []
    backend.close()


def test_timings_are_of_no_call_after_one_that_failed(bench: Bench) -> None:
    backend = bench.load(timings=True)
    backend.infer(images(3))
    assert backend.timings()
    bench.fail("execute_async_v3")
    with pytest.raises(UnavailableError):
        backend.infer(images(3))
    assert backend.timings() == {}


def test_timings_that_were_not_asked_for_are_empty(bench: Bench) -> None:
    backend = bench.load()
    for count in (3, 20):
        backend.infer(images(count))
        assert backend.timings() == {}
    with pytest.raises(InputError, match="timings=True"):
        backend.timeline(images(3))


def test_what_was_logged_before_is_not_told_of_a_later_failure(bench: Bench) -> None:
    backend = bench.load()
    bench.engine.log("Error Code 9: long ago")
    bench.fail("execute_async_v3")
    with pytest.raises(UnavailableError) as caught:
        backend.infer(images(3))
    assert "does not like it" in str(caught.value) and "long ago" not in str(caught.value)


def test_a_thread_is_told_of_its_own_errors_first() -> None:
    said = ErrorLog()
    thread = threading.Thread(target=lambda: said.add("theirs"))
    thread.start()
    thread.join()
    said.add("ours")
    assert said.take() == "ours"
    assert said.take() == "theirs"  # better than nothing
    said.add("ours again")
    said.clear()
    assert said.take() == "theirs"
    assert ErrorLog().take() == "TensorRT gave no reason"


def test_a_shape_that_was_refused_is_not_taken_for_the_one_before(bench: Bench) -> None:
    backend = bench.load(graphs=False)
    backend.infer(images(8))
    bench.fail("set_input_shape")
    with pytest.raises(UnavailableError, match="set_input_shape"):
        backend.infer(images(3))
    close(backend.infer(images(8)), expected(images(8)))


def test_a_plan_that_is_not_accepted_says_by_what_where_and_why(bench: Bench) -> None:
    bench.accepts = False
    said = r"net\.plan.*TensorRT-RTX 1\.7\.1.*Test GPU.*magic tag does not match.*rtresnet build"
    with pytest.raises(UnavailableError, match=said):
        bench.load()
    assert bench.cuda.live == []


def test_a_header_that_will_not_run_here_says_why(bench: Bench) -> None:
    bench.validity = (Validity.INVALID, Diagnostics.VERSION_MISMATCH | Diagnostics.UNSUPPORTED_CC)
    with pytest.raises(UnavailableError, match="version mismatch, unsupported cc; build it"):
        bench.load()
    bench.validity = (Validity.INVALID, 0)
    bench.validity_error = "Error Code 1: Cuda Driver (out of memory)"
    with pytest.raises(UnavailableError, match=r"on Test GPU: Error Code 1: Cuda Driver"):
        bench.load()
    bench.validity_error = None
    with pytest.raises(UnavailableError, match="gave no reason"):
        bench.load()
    assert bench.cuda.live == []


def test_driver_that_is_too_old_is_named_by_what_refuses_the_plan(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX then tells that the header is invalid and not why; both log error 35."""
    monkeypatch.setattr(hardware, "cuda_version", lambda: (12, 4))
    bench.validity = (Validity.INVALID, 0)
    with pytest.raises(UnavailableError) as caught:
        bench.load()
    assert caught.value.fix is not None and "r580" in caught.value.fix
    bench.validity, bench.accepts = (Validity.VALID, 0), False
    bench.refusal = "CUDA initialization failure with error: 35"
    with pytest.raises(UnavailableError, match="error: 35") as caught:
        bench.load()
    assert caught.value.fix is not None and "r580" in caught.value.fix


def test_runtime_that_does_not_start_is_a_lack_of_the_environment(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(logger: Any) -> None:
        logger.log(bench.trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(bench.trt, "Runtime", fail)
    with pytest.raises(UnavailableError, match=r"cannot create a Runtime.*error: 35") as caught:
        bench.load()
    assert caught.value.exit_code == 3
    assert bench.cuda.live == []


def test_a_plan_that_will_be_slow_is_told(bench: Bench) -> None:
    bench.validity = (Validity.SUBOPTIMAL, Diagnostics.UNSUPPORTED_CC)
    with pytest.warns(RuntimeWarning, match=r"slower than it could \(unsupported cc\)"):
        bench.load()


def test_memory_is_held_against_what_is_free(bench: Bench) -> None:
    bench.cuda.room = 199
    with pytest.raises(
        UnavailableError, match=r"its weights need 0 MB.*are free; use fewer contexts"
    ):
        bench.load()
    one = 2 * 8 * (192 + 4 * CLASSES) + 512
    bench.cuda.room = one
    bench.load().close()
    with pytest.raises(
        UnavailableError, match="2 x activations and buffers for batches of up to 8"
    ):
        bench.load(contexts=2)
    assert bench.cuda.live == []


def test_timings_are_those_of_the_events(bench: Bench) -> None:
    backend = bench.load(timings=True)
    assert backend.timings() == {}
    backend.infer(images(3))
    timings = backend.timings()
    assert timings.pop("enqueue") > 0
    assert timings == {"h2d": 4.0, "compute": 5.0, "d2h": 2.0}


def test_the_backend_says_what_runs(bench: Bench) -> None:
    backend = bench.load()
    assert (backend.provider, backend.device) == ("TensorRT-RTX", "Test GPU")
    assert backend.threads is None
    assert backend.versions == {"tensorrt-rtx-cu13": "1.7.1.116"}
    assert (backend.smallest, backend.largest) == (1, 8)
    assert (backend.input_dtype, backend.layout, backend.size) == (np.float32, "nchw", 4)


def test_backend_of_a_tensorrt_plan_reports_the_version_of_the_module(bench: Bench) -> None:
    """The distribution may be called tensorrt, tensorrt-cu12, tensorrt-cu13 or libnvinfer."""
    bench.by_hand()
    plan = Plan(
        builder="tensorrt", version="1.7.1.116", targets=("sm_89",),
        profiles=(Profile(min=1, opt=4, max=8),), seconds=1.0,
    )  # fmt: skip
    sidecar: Any = SimpleNamespace(plan=plan, made_by={})
    backend = TrtBackend(bench.path, sidecar)
    assert (backend.provider, backend.versions) == ("TensorRT", {"tensorrt": "1.7.1.116"})


def test_layers_are_timed_on_every_context_but_not_in_graphs(bench: Bench) -> None:
    with pytest.raises(InputError, match="graphs=False"):
        bench.load().watch(object())
    bench.engine.profiles = [(1, 1, 1), (1, 4, 8)]
    made = bench.engine.contexts
    backend, profiler = bench.load(graphs=False, contexts=2), object()
    backend.watch(profiler)
    backend.infer(images(20))
    bound = [bound for stream in backend._streams for bound in stream._plain]
    assert [entry.context.profiler for entry in bound] == [profiler] * 4
    assert bench.engine.contexts - made == 4


# The kernels that TensorRT-RTX compiles.


def test_rtx_specializes_kernels_at_once(bench: Bench) -> None:
    """Its default runs fallback kernels first, and they would be what is timed."""
    bench.load()
    for config in bench.engine.made_by:
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"


def test_compiled_kernels_are_kept_beside_the_plan(bench: Bench) -> None:
    kept = cache_path(bench.path)
    bench.load(graphs=False).close()
    assert not kept.exists(), "nothing ran"
    for count, wanted in ((3, b"kernels3"), (5, b"kernels35"), (3, b"kernels35")):
        backend = bench.load(graphs=False)
        backend.infer(images(count))
        backend.close()
        assert kept.read_bytes() == wanted
    bench.load().close()
    assert kept.read_bytes() == wanted, "what was prepared at load is in it"
    assert sorted(path.name for path in kept.parent.iterdir()) == ["net.plan", "net.plan.cache"]


def test_kernels_that_nothing_was_added_to_are_not_written_again(bench: Bench) -> None:
    kept = cache_path(bench.path)
    kept.write_bytes(b"kernels3")
    before = kept.stat().st_mtime_ns
    backend = bench.load()
    backend.infer(images(3))
    backend.close()
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("blob", [b"", b"of another GPU"])
def test_kernels_of_another_gpu_are_replaced(bench: Bench, blob: bytes) -> None:
    cache_path(bench.path).write_bytes(blob)
    backend = bench.load(graphs=False)
    backend.infer(images(3))
    bench.fail("execute_async_v3")
    with pytest.raises(UnavailableError) as caught:
        backend.infer(images(3))
    assert "another GPU" not in str(caught.value)
    backend.close()
    assert cache_path(bench.path).read_bytes() == b"kernels3"


def test_a_folder_that_cannot_be_written_is_a_warning(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    backend = bench.load()
    backend.infer(images(3))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(RuntimeWarning, match=r"net\.plan\.cache: the compiled kernels are not kept"):
        backend.close()
    assert bench.cuda.live == [] and not cache_path(bench.path).exists()


def test_a_cache_that_is_not_wanted_is_not_made(bench: Bench) -> None:
    with rtresnet.load(bench.path, cache=False) as session:
        session(images(3))
    assert bench.engine.made_by[0].cache is None and not cache_path(bench.path).exists()


def test_tensorrt_has_no_kernels_to_keep(bench: Bench) -> None:
    bench.by_hand()
    backend = bench.load()
    backend.infer(images(3))
    backend.close()
    assert (
        bench.engine.made_by[0].dynamic_shapes_kernel_specialization_strategy == "its own default"
    )
    assert not cache_path(bench.path).exists()


# Without.


def test_without_the_package_nothing_is_loaded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtresnet.core.hardware.installed", lambda name: False)
    with pytest.raises(UnavailableError, match="pip install tensorrt-rtx-cu13"):
        bench.load()
    assert bench.cuda.live == []


@pytest.mark.usefixtures("without_gpu")
def test_without_a_gpu_there_is_no_backend(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no CUDA device") as caught:
        TrtBackend(tmp_path / "net.plan", None)
    assert caught.value.exit_code == 3


def test_a_backend_keeps_nothing_alive_after_close(bench: Bench) -> None:
    backend = bench.load()
    backend.infer(images(3))
    backend.close()
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is fake_gpu.FakeContext]


# The real API.


def test_the_fake_device_has_the_operations_of_the_protocol() -> None:
    def operations(cls: type) -> dict[str, list[str]]:
        functions = inspect.getmembers(cls, inspect.isfunction)
        return {n: list(inspect.signature(f).parameters) for n, f in functions if n[0] != "_"}

    fake = operations(fake_gpu.FakeCuda)
    for helper in ("enqueue", "at", "host", "is_idle"):
        fake.pop(helper)
    assert fake == operations(Cuda)


def test_the_real_runtime_tells_of_a_header_without_a_gpu() -> None:
    """What `compatibility.check_header` calls; `open_cuda` has found a device before that."""
    real = pytest.importorskip("tensorrt_rtx")
    said = ErrorLog()
    runtime = real.Runtime(logger(real, said))
    assert runtime.engine_header_size == 64
    validity, bits = runtime.get_engine_validity(b"vtrt" + bytes(60))
    assert validity == real.EngineValidity.INVALID and isinstance(int(bits), int)
    assert runtime.deserialize_cuda_engine(b"vtrt" + bytes(600)) is None
    assert "gave no reason" not in said.take()  # what TensorRT logs is kept


def test_the_types_an_engine_may_have_are_those_of_numpy() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    found = {name: np.dtype(real.nptype(getattr(real.DataType, name))).name
             for name in ("FLOAT", "HALF", "UINT8", "INT32", "INT64")}  # fmt: skip
    assert list(found.values()) == ["float32", "float16", "uint8", "int32", "int64"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("runtime_gpu", folder / "runtime_gpu.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("rtx_built", [True, False])
def test_the_benchmark_for_a_gpu_runs_on_the_fake_one(
    bench: Bench, script: Any, dtype: str, rtx_built: bool
) -> None:
    if not rtx_built:
        bench.by_hand()
    bench.engine.dtype = dtype
    found = script.measure(bench.path, 8, 0.01, 30)
    assert set(found["rates"]) == {
        "bare engine", "infer, on the GPU", "infer, numpy", "infer, numpy, no graphs",
    }  # fmt: skip
    assert all(entry["images_per_second"] > 0 for entry in found["rates"].values())
    assert found["overlap"]["overlapped"] > 0.5 and found["leaked_bytes"] == 0
    assert bench.cuda.live == []


def test_overlap_is_the_share_of_copies_under_computation(script: Any) -> None:
    one = {"h2d": (0.0, 2.0), "compute": (2.0, 6.0), "d2h": (6.0, 7.0)}
    two = {"h2d": (3.0, 5.0), "compute": (6.0, 9.0), "d2h": (9.0, 10.0)}
    assert script.overlap([one, two]) == {"copy_ms": 6.0, "overlapped": 0.5}
    assert script.overlap([one])["overlapped"] == 0
