"""Array types that a plan accepts and returns, on a fake GPU."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
from fake_gpu import (
    CLASSES,
    TOP,
    Bench,
    WithDlpack,
    WithInterface,
    close,
    expected,
    images,
)

import rtresnet
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.workflows import embedded
from rtresnet.workflows.embedded import EmbedConfig

# Arrays on the GPU.


def copies(bench: Bench) -> list[str]:
    return [name for name, _ in bench.cuda.copied]


@pytest.mark.parametrize("wrap", [WithDlpack, WithInterface])
@pytest.mark.parametrize("count", [3, 20])
def test_infer_of_gpu_images_copies_nothing(bench: Bench, wrap: Any, count: int) -> None:
    backend = bench.load(timings=True)
    _, on_device = bench.on_gpu(images(count))
    close(backend.infer(wrap(on_device)), expected(images(count)))
    # Rows 8 and 16 begin at multiples of 256 bytes.
    assert set(copies(bench)) == {"to_host"}
    timings = backend.timings()
    assert timings["h2d"] == 0 and timings["compute"] == 5 and timings["d2h"] == 2


def test_infer_with_gpu_out_copies_nothing(bench: Bench) -> None:
    backend = bench.load()
    _, on_device = bench.on_gpu(images(5))
    _, result = bench.on_gpu(np.zeros((5, CLASSES), np.float32))
    out = WithInterface(result)
    assert backend.infer(WithDlpack(on_device), out=out) is out
    close(result, expected(images(5)))
    assert copies(bench) == []


def test_infer_with_padding_leaves_other_rows_of_out(bench: Bench) -> None:
    bench.engine.profiles = [(4, 4, 8)]
    backend = bench.load()
    _, on_device = bench.on_gpu(images(4))
    _, result = bench.on_gpu(np.full((4, CLASSES), 7, np.float32))
    backend.infer(WithDlpack(on_device[:2]), out=WithDlpack(result[:2]))
    close(result[:2], expected(images(2)))
    assert (result[2:] == 7).all()
    assert not bench.engine.runs[-1][1][2:].any()


def test_infer_of_unaligned_gpu_arrays_copies_on_the_gpu(bench: Bench) -> None:
    backend = bench.load()
    _, on_device = bench.on_gpu(images(19), offset=64)
    _, result = bench.on_gpu(np.zeros((19, CLASSES), np.float32), offset=4)
    backend.infer(WithDlpack(on_device), out=WithDlpack(result))
    close(result, expected(images(19)))
    assert set(copies(bench)) == {"on_device"}


@pytest.mark.parametrize("version", [2, 3])
def test_infer_of_gpu_images_waits_for_their_stream(bench: Bench, version: int) -> None:
    backend = bench.load()
    _, on_device = bench.on_gpu(np.zeros((3, 3, 4, 4), np.float32))
    with bench.cuda.active():
        theirs = 1 if version == 2 else bench.cuda.stream()
        bench.cuda.enqueue("theirs", theirs, lambda: np.copyto(on_device, images(3)))
    output = {"version": version} | ({"stream": theirs} if version == 3 else {})
    close(backend.infer(WithInterface(on_device, **output)), expected(images(3)))


def test_infer_passes_its_stream_to_dlpack(bench: Bench) -> None:
    backend = bench.load()
    tensor = WithDlpack(bench.on_gpu(images(3))[1])
    backend.infer(tensor)
    assert tensor.streams == [backend._streams[0].compute]


def test_infer_of_host_dlpack_returns_the_same(bench: Bench) -> None:
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
        (lambda view: WithDlpack(view.astype(np.float16)), "needs float32"),
        (lambda view: WithDlpack(view.astype(np.complex64)), "DLPack code 5"),
        (lambda view: WithInterface(view, typestr="<f8"), "needs float32"),
        (lambda view: WithDlpack(view[0]), "needs float32"),
        (lambda view: WithDlpack(view, (2, 1)), "on GPU 1, but the plan is on GPU 0"),
        (lambda view: Kept(view), "requires grad"),
    ],
)
def test_infer_of_a_wrong_gpu_array_is_refused(bench: Bench, make: Any, message: str) -> None:
    backend = bench.load()
    with pytest.raises(InputError, match=message):
        backend.infer(make(bench.on_gpu(images(2))[1]))
    close(backend.infer(images(3)), expected(images(3)))


def test_infer_with_read_only_out_is_refused(bench: Bench) -> None:
    _, on_device = bench.on_gpu(np.zeros((2, CLASSES), np.float32))
    out = WithInterface(on_device, data=(on_device.ctypes.data, True))
    with pytest.raises(InputError, match="read-only"):
        bench.load().infer(images(2), out=out)


# Types of input and outputs.


def test_infer_of_pixels_returns_the_engines_logits(bench: Bench) -> None:
    bench.engine.dtype = "uint8"
    backend = bench.load()
    assert (backend.input_dtype, backend.layout, backend.size) == (np.uint8, "nhwc", 4)
    batch = images(11, dtype="uint8")
    np.testing.assert_allclose(backend.infer(batch), expected(batch), rtol=1e-4)
    assert bench.cuda.copied[0] == ("to_device", 8 * 48), "a quarter of the bytes"
    with pytest.raises(InputError, match=r"needs uint8 \[N, 4, 4, 3\]"):
        backend.infer(images(2))


@pytest.mark.parametrize("order", [["indices", "probabilities"], ["probabilities", "indices"]])
@pytest.mark.parametrize("index_dtype", ["int64", "int32"])
def test_infer_of_a_top_k_plan_returns_indices_and_probabilities(
    bench: Bench, order: list[str], index_dtype: str
) -> None:
    bench.engine.outputs, bench.engine.index_dtype = order, index_dtype
    backend = bench.load()
    required = np.argsort(-expected(images(11)), axis=1)[:, :TOP]
    indices, probabilities = backend.infer(images(11))
    assert indices.dtype == np.int64 and probabilities.dtype == np.float32
    np.testing.assert_array_equal(indices, required)
    close(probabilities, np.take_along_axis(expected(images(11)), required, 1))
    out = (np.zeros((3, TOP), np.int64), np.zeros((3, TOP), np.float32))
    assert backend.infer(images(3), out=out) is out
    np.testing.assert_array_equal(out[0], required[:3])


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
    source = embedded.write(plain, embed)[0] if embed.pixels else plain
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
            got, required = backend.infer(batch), reference(batch)
            if topk is None:
                np.testing.assert_allclose(got, required, rtol=1e-4, atol=1e-5)
                continue
            np.testing.assert_array_equal(got[0], required[0])
            np.testing.assert_allclose(got[1], required[1], rtol=1e-4, atol=1e-5)
            assert got[0].dtype == np.int64 and got[0].shape == (count, 3)
        backend.close()
    assert net.cuda.live == []


def test_infer_with_mixed_outs_writes_both(bench: Bench) -> None:
    bench.engine.outputs = ["indices", "probabilities"]
    backend = bench.load()
    bench.cuda.shuffle = random.Random(1)
    _, on_device = bench.on_gpu(np.zeros((21, TOP), np.int64), offset=8)
    backend.infer(images(21), out=(WithDlpack(on_device), np.zeros((21, TOP), np.float32)))
    np.testing.assert_array_equal(on_device, np.argsort(-expected(images(21)), axis=1)[:, :TOP])


def test_load_engine_without_images_is_refused(bench: Bench) -> None:
    bench.engine.get_tensor_shape = lambda name: (-1, 7)  # type: ignore[method-assign]
    with pytest.raises(ArtifactError, match=r"images to logits.*images \[-1, 7\]"):
        bench.load()
    assert bench.cuda.live == []


def test_load_engine_with_a_type_that_numpy_lacks_is_refused(bench: Bench) -> None:
    def nptype(dtype: str) -> Any:
        raise TypeError("Could not resolve TensorRT datatype")

    bench.trt.nptype = nptype  # type: ignore[attr-defined]
    with pytest.raises(ArtifactError, match="NumPy does not support"):
        bench.load()
    assert bench.cuda.live == []
