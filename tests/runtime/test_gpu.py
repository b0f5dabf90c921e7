"""Plans on a real GPU: built and run by each builder, compared with ONNX Runtime on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest

from rtresnet.builder import engine
from rtresnet.builder.targets import RTX_TARGETS
from rtresnet.cli.main import main
from rtresnet.core import artifacts, hardware
from rtresnet.core.errors import InputError, UnavailableError
from rtresnet.core.sidecar import Profile
from rtresnet.runtime.contexts import cache_path
from rtresnet.runtime.cuda import host_view, open_cuda
from rtresnet.runtime.loading import load
from rtresnet.runtime.session import Session
from rtresnet.runtime.trt import TrtBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hardware.gpus(), reason="no GPU"),
]

OnnxFile = Callable[..., Path]
Images = Callable[..., np.ndarray]
LARGEST = 32
# Norm of the difference over the norm of the reference: the same arithmetic, in another order.
BOUNDS = {"fp32": 1e-2, "fp16": 1e-2, "int8": 0.1}


@pytest.fixture(scope="module", params=["tensorrt", "rtx"])
def builder(request: pytest.FixtureRequest) -> str:
    """Each builder that is installed and serves the GPU."""
    name = str(request.param)
    if not hardware.installed({"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}[name]):
        pytest.skip(f"{name} is not installed")
    if name == "rtx" and hardware.gpus()[0].target not in RTX_TARGETS:
        pytest.skip(f"TensorRT-RTX has no target {hardware.gpus()[0].target}")
    return name


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["A", "B"])
def source(precision: str, request: pytest.FixtureRequest, onnx_file: OnnxFile) -> Path:
    return onnx_file("resnet8", precision, shortcut=request.param)


@pytest.fixture(scope="module")
def target(builder: str, precision: str) -> tuple[str, ...]:
    """What a plan for this GPU is built for: RTX's default leaves the oldest out."""
    here = hardware.gpus()[0].target
    if builder != "rtx":
        return ()
    if here == RTX_TARGETS[0] and precision == "fp32":
        pytest.skip(f"TensorRT-RTX takes no FP32 FC for {here}")
    return (here,)


@pytest.fixture(scope="module")
def plan(
    source: Path, builder: str, target: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("plans") / f"{source.stem}.plan"
    engine.build(
        source, out, profiles=[Profile(min=1, opt=8, max=LARGEST)], builder=builder, target=target
    )
    return out


@pytest.fixture
def session(plan: Path) -> Session:
    return load(plan, timings=True)


def test_check_of_a_plan_passes(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Alone, in batches, permuted, at the profile's ends, against its ONNX file."""
    assert main(["check", str(plan)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("ends", [["--input", "uint8-nhwc"], ["--topk", "3"]], ids=["uint8", "top"])
def test_plan_with_embedded_processing_agrees_with_onnx(
    ends: list[str], source: Path, builder: str, target: tuple[str, ...], tmp_path: Path
) -> None:
    plan = tmp_path / "ends.plan"
    aimed = ["--target", *target] if target else []
    assert (
        main(["build", str(source), *ends, "--builder", builder, *aimed, "--out", str(plan)]) == 0
    )
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    with load(plan) as session, load(source, provider="cpu") as reference:
        expected = reference.logits(reference.prepare(pixels))
        got = session(session.prepare(pixels))
    if isinstance(got, tuple):
        assert got[0].shape == got[1].shape == (9, 3) and got[0].dtype == np.int64
        assert (got[0][:, 0] == expected.argmax(1)).mean() > 0.8  # near ties may fall the other way
    else:
        assert np.linalg.norm(got - expected) < 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize("count", [1, 5, 70])
def test_plan_agrees_with_onnx_runtime(
    count: int, session: Session, source: Path, precision: str, images: Images
) -> None:
    batch = images(count)
    with session, load(source, provider="cpu") as reference:
        expected, got = reference(batch), session(batch)
    assert got.shape == expected.shape and np.isfinite(got).all()
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < BOUNDS[precision]


def test_plan_batch_equals_its_rows_alone(session: Session, precision: str, images: Images) -> None:
    batch = images(LARGEST + 3)
    with session:
        together = session(batch)
        alone = np.concatenate([session(batch[index : index + 1]) for index in range(5)])
    error = np.linalg.norm(together[:5] - alone) / np.linalg.norm(alone)
    assert error < BOUNDS[precision]


def test_plan_same_images_give_the_same_logits(session: Session, images: Images) -> None:
    batch = images(7)
    with session:
        np.testing.assert_array_equal(session(batch), session(batch))


def test_plan_timings_are_positive(session: Session, images: Images) -> None:
    with session:
        for _ in range(2):  # the first compiles kernels, which counts as computing
            session(images(8))
        timings = session.backend.timings()
    assert set(timings) == {"h2d", "compute", "d2h", "enqueue"}
    assert all(0 < value < 1000 for value in timings.values())


def test_plan_description_names_the_gpu(session: Session) -> None:
    with session:
        described = session.describe()
    assert described["device"] == hardware.gpus()[0].name
    assert str(described["provider"]).startswith("TensorRT")
    assert described["threads"] is None


def test_plan_images_of_another_shape_are_refused(session: Session, images: Images) -> None:
    with session, pytest.raises(InputError, match="needs float32"):
        session(images(2, 16))


def test_plan_closed_twice_loads_again(session: Session, plan: Path, images: Images) -> None:
    before = session(images(3))
    session.close()
    session.close()
    with load(plan) as again:
        np.testing.assert_allclose(again(images(3)), before, rtol=1e-3, atol=1e-3)


def test_load_of_other_bytes_is_refused(builder: str, tmp_path: Path) -> None:
    if builder != "rtx":
        pytest.skip("a plan without sidecar is taken for TensorRT-RTX's")
    path = tmp_path / "net.plan"
    path.write_bytes(b"vtrt" + bytes(1000))
    with pytest.raises(UnavailableError, match="does not accept"):
        load(path)


# Everything below knows the backend itself: what `rtresnet.load` has no options for.


def backend_of(plan: Path, **options: Any) -> TrtBackend:
    return TrtBackend(plan, artifacts.verify(plan), **options)


def test_plan_graphs_do_not_change_logits(plan: Path, images: Images) -> None:
    batches = [images(count, seed=count) for count in (1, 8, 70)]
    results = []
    for graphs in (False, None):
        backend = backend_of(plan, graphs=graphs)
        for _ in range(3):  # plain, captured, launched
            logits = [backend.infer(batch) for batch in batches]
        results.append(logits)
        backend.close()
    for plain, captured in zip(*results, strict=True):
        np.testing.assert_allclose(captured, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("offset", [0, 64])
def test_plan_gpu_arrays_are_read_in_place(plan: Path, images: Images, offset: int) -> None:
    backend, batch = backend_of(plan), images(70)
    expected, cuda = backend.infer(batch), backend._cuda
    with cuda.active():
        address = cuda.allocate(batch.nbytes + offset) + offset
        result = cuda.allocate(expected.nbytes)
        stream = cuda.stream()
        cuda.to_device(address, batch.ctypes.data, batch.nbytes, stream)
        cuda.synchronize(stream)
    on_device = fake_gpu.WithInterface(batch, data=(address, False))
    out = fake_gpu.WithInterface(expected, data=(result, False))
    assert backend.infer(on_device, out=out) is out
    got = np.empty_like(expected)
    with cuda.active():
        cuda.to_host(got.ctypes.data, result, got.nbytes, stream)
        cuda.synchronize(stream)
        cuda.free(address - offset)
        cuda.free(result)
        cuda.destroy_stream(stream)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    backend.close()


def test_plan_torch_tensors_are_read_in_place(plan: Path, images: Images) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    backend, batch = backend_of(plan), images(9)
    tensor = torch.zeros(batch.shape, device="cuda")
    tensor.copy_(torch.from_numpy(batch))  # still under way when infer is called
    np.testing.assert_allclose(backend.infer(tensor), backend.infer(batch), rtol=1e-3, atol=1e-3)
    out = torch.zeros(9, backend.io.outputs[0].row[0], device="cuda")
    backend.infer(tensor, out=out)
    np.testing.assert_allclose(out.cpu().numpy(), backend.infer(batch), rtol=1e-3, atol=1e-3)
    backend.close()


def test_plan_several_threads_get_their_own_logits(plan: Path, images: Images) -> None:
    backend = backend_of(plan, contexts=2)
    batches = [images(3 + index, seed=index) for index in range(8)]
    expected = [backend.infer(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, logits in zip(pool.map(backend.infer, batches * 10), expected * 10, strict=True):
            np.testing.assert_allclose(got, logits, rtol=1e-3, atol=1e-3)
    backend.close()


@pytest.fixture(scope="module")
def photo_plan(builder: str, onnx_file: OnnxFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At 224 px, so that computing a part takes longer than starting the next copy."""
    out = tmp_path_factory.mktemp("plans") / "photo.plan"
    engine.build(
        onnx_file("resnet18", "fp16", size=224), out,
        profiles=[Profile(min=1, opt=LARGEST, max=LARGEST)], builder=builder,
        target=(hardware.gpus()[0].target,) if builder == "rtx" else (),
    )  # fmt: skip
    return out


def test_timeline_large_batch_copies_overlap_computation(photo_plan: Path) -> None:
    backend, shape = backend_of(photo_plan, timings=True), (10 * LARGEST, 3, 224, 224)
    size = 4 * int(np.prod(shape))
    with backend._cuda.active():  # pinned, so that no copy on the host comes between the parts
        pinned = backend._cuda.allocate_pinned(size)
    try:
        batch = host_view(pinned, size).view(np.float32).reshape(shape)
        batch[:] = 0.5
        backend.infer(batch)
        parts = backend.timeline(batch)
    finally:
        with backend._cuda.active():
            backend._cuda.free_pinned(pinned)
    assert len(parts) == 10
    for part, later in itertools.pairwise(parts):
        assert part["h2d"][1] <= part["compute"][1] <= later["compute"][1]
    early = [later["h2d"][0] < part["compute"][1] for part, later in itertools.pairwise(parts)]
    assert any(early), "each part was copied in only after the one before had been computed"
    backend.close()


@pytest.mark.slow
def test_plan_ten_thousand_calls_leak_nothing(plan: Path, images: Images) -> None:
    backend = backend_of(plan)
    batches = [images(count) for count in (1, 8, LARGEST)]
    for _ in range(3):
        for batch in batches:
            backend.infer(batch)
    with backend._cuda.active():
        before = backend._cuda.memory()[0]
    for index in range(10_000):
        backend.infer(batches[index % 3])
    with backend._cuda.active():
        assert before - backend._cuda.memory()[0] < 1 << 20
    backend.close()


def test_plan_close_frees_its_memory(plan: Path, images: Images) -> None:
    backend_of(plan).close()
    cuda, free = open_cuda(), []
    for _ in range(5):
        backend = backend_of(plan)
        backend.infer(images(40))
        backend.close()
        with cuda.active():
            free.append(cuda.memory()[0])
    assert free[1] - free[-1] < 1 << 20


def test_plan_reads_compiled_kernels_again(plan: Path, builder: str, images: Images) -> None:
    if builder != "rtx":
        pytest.skip("only TensorRT-RTX compiles kernels on the spot")
    for _ in range(2):
        backend = backend_of(plan)
        backend.infer(images(3))
        backend.close()
    saved = cache_path(plan).read_bytes()
    backend = backend_of(plan)
    assert backend._cache is not None and backend._cache._kept == saved
    backend.close()
