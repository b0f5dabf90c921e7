"""The TensorRT backend without a GPU: a fake device with real memory, and the real API's names.

The fake puts work on a stream off until the stream is synchronized, which is the latest that a
device may do it: whoever reads too early reads garbage here too.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rtresnet import machine
from rtresnet.errors import EnvironmentLack, InputError
from rtresnet.machine import Gpu
from rtresnet.runtime import trt as module
from rtresnet.runtime.cuda import Cuda
from rtresnet.runtime.trt import TrtBackend

IMAGE = (3, 4, 4)
CLASSES = 5
WEIGHTS = np.random.default_rng(0).standard_normal((48, CLASSES)).astype(np.float32)
MILLISECONDS = {"to_device": 1.0, "execute": 5.0, "to_host": 2.0}


class FakeCuda:
    """The protocol of `runtime.cuda.Cuda` on host memory; fails at one chosen call.

    Attributes:
        log: Every call by name, in order.
        live: What was made and not yet given back.
        freed: What was given back, in order.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.live: list[tuple[str, Any]] = []
        self.made: list[tuple[str, Any]] = []
        self.freed: list[tuple[str, Any]] = []
        self.fail_at: tuple[str, int] | None = None
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.copied: list[tuple[str, int]] = []
        self.queue: list[Callable[[], None]] = []
        self.times: dict[int, float] = {}
        self.now = 0.0

    def _make(self, kind: str, handle: Any) -> Any:
        self.log.append(kind)
        if self.fail_at == (kind, self.log.count(kind)):
            raise EnvironmentLack(f"{kind} failed")
        self.live.append((kind, handle))
        self.made.append((kind, handle))
        return handle

    def _free(self, kind: str, handle: Any) -> None:
        self.live.remove((kind, handle))  # a ValueError where it was freed twice
        self.freed.append((kind, handle))

    def stream(self) -> int:
        return int(self._make("stream", 7))

    def destroy_stream(self, stream: int) -> None:
        self._free("stream", stream)

    def event(self) -> int:
        return int(self._make("event", 100 + self.log.count("event")))

    def destroy_event(self, event: int) -> None:
        self._free("event", event)

    def allocate(self, size: int) -> int:
        address = int(self._make("allocate", 4096 * (1 + self.log.count("allocate"))))
        self.memory[address] = np.full(size, 255, np.uint8)  # as float32: not a number
        return address

    def free(self, address: int) -> None:
        self._free("allocate", address)
        del self.memory[address]

    def allocate_pinned(self, size: int) -> np.ndarray:
        buffer = np.full(size, 255, np.uint8)
        self._make("allocate_pinned", id(buffer))
        self.pinned[id(buffer)] = buffer
        return buffer

    def free_pinned(self, buffer: np.ndarray) -> None:
        self._free("allocate_pinned", id(buffer))

    def enqueue(self, name: str, stream: int, work: Callable[[], None]) -> None:
        assert ("stream", stream) in self.live
        self.log.append(name)

        def timed() -> None:
            work()
            self.now += MILLISECONDS.get(name, 0)

        self.queue.append(timed)

    def record(self, event: int, stream: int) -> None:
        assert ("event", event) in self.live
        self.enqueue("record", stream, lambda: self.times.__setitem__(event, self.now))

    def elapsed(self, start: int, stop: int) -> float:
        if start not in self.times or stop not in self.times:
            raise EnvironmentLack("cudaEventElapsedTime failed: cudaErrorInvalidResourceHandle")
        return self.times[stop] - self.times[start]

    def to_device(self, address: int, source: np.ndarray, size: int, stream: int) -> None:
        assert id(source) in self.pinned and source.dtype == np.uint8
        assert size <= len(source) and size <= len(self.memory[address])
        self.copied.append(("to_device", size))

        def copy() -> None:
            self.memory[address][:size] = source[:size]

        self.enqueue("to_device", stream, copy)

    def to_host(self, target: np.ndarray, address: int, size: int, stream: int) -> None:
        assert id(target) in self.pinned and target.dtype == np.uint8
        assert size <= len(target) and size <= len(self.memory[address])
        self.copied.append(("to_host", size))

        def copy() -> None:
            target[:size] = self.memory[address][:size]

        self.enqueue("to_host", stream, copy)

    def synchronize(self, stream: int) -> None:
        self.log.append("synchronize")
        while self.queue:
            self.queue.pop(0)()


class FakeContext:
    """Logits are the pixels times a fixed matrix."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] | None = None

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self.engine.device.fail_at == ("set_tensor_address", 1):
            raise RuntimeError("set_tensor_address")
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.engine.get_tensor_profile_shape(name, 0)
        fits = smallest[0] <= shape[0] <= largest[0] and tuple(shape[1:]) == IMAGE
        self.shape = tuple(shape) if fits and not self.engine.refuses_shape else None
        return self.shape is not None

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.fails or self.shape is None or len(self.addresses) < 2:
            return False
        device, (count, *_) = self.engine.device, self.shape
        source = device.memory[self.addresses["images"]]
        target = device.memory[self.addresses["logits"]]

        def work() -> None:
            batch = source[: count * 192].view(np.float32).reshape(count, 48)
            self.engine.batches.append(batch.copy())
            target[: count * 4 * CLASSES] = (batch @ WEIGHTS).reshape(-1).view(np.uint8)

        device.enqueue("execute", stream, work)
        return True


class FakeEngine:
    """One input, one output (named first), one profile."""

    num_io_tensors = 2

    def __init__(self, device: FakeCuda, profile: tuple[int, int, int]) -> None:
        self.device = device
        self.profile = profile
        self.batches: list[np.ndarray] = []
        self.config: Any = None
        self.refuses_shape = self.fails = self.without_context = False

    def get_tensor_name(self, index: int) -> str:
        return ("logits", "images")[index]

    def get_tensor_mode(self, name: str) -> str:
        return {"images": "in", "logits": "out"}[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert (name, profile) == ("images", 0)
        return [(count, *IMAGE) for count in self.profile]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {"images": (-1, *IMAGE), "logits": (-1, CLASSES)}[name]

    def create_runtime_config(self) -> Any:
        self.config = SimpleNamespace(dynamic_shapes_kernel_specialization_strategy="lazy")
        return self.config

    def create_execution_context(self, config: Any) -> FakeContext | None:
        assert config is self.config
        return None if self.without_context else FakeContext(self)


class Bench:
    """The fake device, its TensorRT, and backends loaded on them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.cuda = FakeCuda()
        self.engine = FakeEngine(self.cuda, (1, 4, 8))
        self.accepts = True
        self.path = folder / "net.plan"
        self.path.write_bytes(b"plan")
        self.trt = ModuleType("tensorrt_rtx")
        logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, severity: None})

        class Runtime:
            def __init__(runtime, logger: object) -> None:
                pass

            def deserialize_cuda_engine(runtime, data: bytes) -> FakeEngine | None:
                assert data == b"plan"
                return self.engine if self.accepts else None

        self.trt.__dict__.update(
            __version__="1.7.1.116",
            Logger=logger,
            Runtime=Runtime,
            TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        )
        for name in ("tensorrt_rtx", "tensorrt"):
            monkeypatch.setitem(sys.modules, name, self.trt)
        gpu = Gpu(name="Test GPU", capability=(8, 9), memory=1 << 30)
        monkeypatch.setattr(machine, "gpus", lambda: (gpu,))
        monkeypatch.setattr(machine, "installed", lambda name: True)
        monkeypatch.setattr(module, "open_cuda", lambda: self.cuda)

    def load(self) -> TrtBackend:
        return TrtBackend(self.path, None)

    def sizes(self) -> list[int]:
        """Batches that were executed."""
        return [len(batch) for batch in self.engine.batches]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(monkeypatch, tmp_path)


def images(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, *IMAGE)).astype(np.float32)


def expected(batch: np.ndarray) -> np.ndarray:
    return np.asarray(batch.reshape(len(batch), 48) @ WEIGHTS)


@pytest.mark.parametrize(
    ("count", "executed"),
    [(1, [1]), (5, [5]), (8, [8]), (9, [8, 1]), (16, [8, 8]), (19, [8, 8, 3])],
)
def test_a_batch_above_the_largest_is_split(bench: Bench, count: int, executed: list[int]) -> None:
    backend = bench.load()
    logits = backend.infer(images(count))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected(images(count)), rtol=1e-5, atol=1e-5)
    assert bench.sizes() == executed


@pytest.mark.parametrize(
    ("count", "executed"), [(1, [4]), (3, [4]), (4, [4]), (7, [7]), (9, [8, 4])]
)
def test_a_batch_below_the_smallest_is_filled_up_and_cut(
    bench: Bench, count: int, executed: list[int]
) -> None:
    bench.engine.profile = (4, 4, 8)
    backend = bench.load()
    backend.infer(images(8, seed=1))  # leaves pixels behind
    bench.engine.batches.clear()
    logits = backend.infer(images(count))
    np.testing.assert_allclose(logits, expected(images(count)), rtol=1e-5, atol=1e-5)
    assert bench.sizes() == executed
    filled = bench.engine.batches[-1][count % 8 or 8 :]
    assert not filled.any(), "what is filled up is zeros, not yesterday's image"


def test_work_is_put_on_the_stream_in_order_and_waited_for_once(bench: Bench) -> None:
    backend = bench.load()
    bench.cuda.log.clear()
    backend.infer(images(3))
    assert bench.cuda.log == [
        "record",
        "to_device",
        "record",
        "execute",
        "record",
        "to_host",
        "record",
        "synchronize",
    ]


def test_only_the_bytes_of_the_batch_are_copied(bench: Bench) -> None:
    backend = bench.load()
    backend.infer(images(3))
    assert bench.cuda.copied == [("to_device", 3 * 192), ("to_host", 3 * 4 * CLASSES)]


def test_buffers_hold_the_largest_batch_and_are_made_once(bench: Bench) -> None:
    backend = bench.load()
    made = list(bench.cuda.made)
    assert sorted(len(memory) for memory in bench.cuda.memory.values()) == [160, 8 * 192]
    assert sorted(len(buffer) for buffer in bench.cuda.pinned.values()) == [160, 8 * 192]
    for count in (1, 8, 20):
        backend.infer(images(count))
    assert bench.cuda.made == made


def test_a_result_is_not_overwritten_by_the_next(bench: Bench) -> None:
    backend = bench.load()
    first = backend.infer(images(4))
    backend.infer(images(4, seed=1))
    np.testing.assert_allclose(first, expected(images(4)), rtol=1e-5, atol=1e-5)


def test_images_need_not_lie_in_one_piece(bench: Bench) -> None:
    backend = bench.load()
    batch = images(12)[::2]
    assert not batch.flags.c_contiguous
    np.testing.assert_allclose(backend.infer(batch), expected(batch), rtol=1e-5, atol=1e-5)
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(images(3), 1, -1)), -1, 1)
    assert not last.flags.c_contiguous
    np.testing.assert_allclose(backend.infer(last), expected(images(3)), rtol=1e-5, atol=1e-5)


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
    ],
    ids=[
        "float64", "float16", "big endian", "uint8", "grey", "small", "one image", "NHWC", "empty",
        "scalar",
    ],
)  # fmt: skip
def test_images_of_another_type_or_shape_are_refused(bench: Bench, batch: np.ndarray) -> None:
    backend = bench.load()
    bench.cuda.log.clear()
    with pytest.raises(InputError, match=r"takes float32 \[N, 3, 4, 4\]") as caught:
        backend.infer(batch)
    assert str(batch.dtype) in str(caught.value)
    assert bench.cuda.log == []


def test_closing_frees_everything_last_made_first(bench: Bench) -> None:
    backend = bench.load()
    backend.infer(images(3))
    kinds = Counter(kind for kind, _ in bench.cuda.made)
    assert kinds == {"stream": 1, "event": 4, "allocate": 2, "allocate_pinned": 2}
    backend.close()
    assert bench.cuda.live == []
    assert bench.cuda.freed[-1][0] == "stream"
    assert [kind for kind, _ in bench.cuda.freed] == [k for k, _ in reversed(bench.cuda.made)]
    backend.close()
    assert len(bench.cuda.freed) == len(bench.cuda.made)


@pytest.mark.parametrize(
    "fail_at",
    [
        ("stream", 1),
        *(("event", number) for number in (1, 2, 3, 4)),
        *(("allocate", number) for number in (1, 2)),
        *(("allocate_pinned", number) for number in (1, 2)),
        ("set_tensor_address", 1),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_what_was_made_is_freed_when_loading_fails_half_way(
    bench: Bench, fail_at: tuple[str, int]
) -> None:
    bench.cuda.fail_at = fail_at
    with pytest.raises((EnvironmentLack, RuntimeError), match=fail_at[0]):
        bench.load()
    assert bench.cuda.live == []


def test_a_plan_that_is_not_accepted_says_by_what_and_where(bench: Bench) -> None:
    bench.accepts = False
    with pytest.raises(EnvironmentLack, match=r"net\.plan.*TensorRT-RTX 1\.7\.1.*Test GPU"):
        bench.load()
    assert bench.cuda.live == []


def test_a_plan_without_a_context_is_refused(bench: Bench) -> None:
    bench.engine.without_context = True
    with pytest.raises(EnvironmentLack, match="no execution context"):
        bench.load()
    assert bench.cuda.live == []


def test_a_shape_that_the_engine_refuses_is_told(bench: Bench) -> None:
    backend = bench.load()
    bench.engine.refuses_shape = True
    with pytest.raises(InputError, match="batch of 3"):
        backend.infer(images(3))


def test_an_execution_that_fails_is_told_and_the_backend_still_closes(bench: Bench) -> None:
    backend = bench.load()
    bench.engine.fails = True
    with pytest.raises(EnvironmentLack, match="execute_async_v3 failed on Test GPU"):
        backend.infer(images(3))
    backend.close()
    assert bench.cuda.live == []


def test_timings_are_those_of_the_events(bench: Bench) -> None:
    backend = bench.load()
    backend.infer(images(3))
    assert backend.timings() == {"h2d": 1.0, "compute": 5.0, "d2h": 2.0}


def test_there_are_no_timings_before_the_first_call(bench: Bench) -> None:
    assert bench.load().timings() == {}


def test_the_backend_says_what_runs(bench: Bench) -> None:
    backend = bench.load()
    assert (backend.provider, backend.device) == ("TensorRT-RTX", "Test GPU")
    assert backend.threads is None
    assert backend.packages == ("tensorrt-rtx-cu13",)
    assert (backend.smallest, backend.largest) == (1, 8)


def test_rtx_specializes_kernels_at_once(bench: Bench) -> None:
    """Its default runs fallback kernels first, and they would be what is timed."""
    bench.load()
    assert bench.engine.config.dynamic_shapes_kernel_specialization_strategy == "eager"


def test_tensorrt_has_no_such_strategy(bench: Bench) -> None:
    del bench.trt.DynamicShapesKernelSpecializationStrategy
    bench.load()
    assert bench.engine.config.dynamic_shapes_kernel_specialization_strategy == "lazy"


def test_without_the_package_nothing_is_loaded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "installed", lambda name: False)
    with pytest.raises(EnvironmentLack, match="pip install tensorrt-rtx-cu13"):
        bench.load()
    assert bench.cuda.live == []


@pytest.mark.usefixtures("without_gpu")
def test_without_a_gpu_there_is_no_backend(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentLack, match="no CUDA device") as caught:
        TrtBackend(tmp_path / "net.plan", None)
    assert caught.value.exit_code == 3


def test_the_fake_device_has_the_operations_of_the_protocol() -> None:
    def operations(cls: type) -> dict[str, list[str]]:
        functions = inspect.getmembers(cls, inspect.isfunction)
        return {n: list(inspect.signature(f).parameters) for n, f in functions if n[0] != "_"}

    fake = operations(FakeCuda)
    fake.pop("enqueue")
    assert fake == operations(Cuda)


# What the names in runtime/trt.py stand for.
OWNERS = {
    "trt": "",
    "runtime": "Runtime",
    "self._runtime": "Runtime",
    "engine": "ICudaEngine",
    "self._engine": "ICudaEngine",
    "self._context": "IExecutionContext",
    "config": "IRuntimeConfig",
    "strategies": "DynamicShapesKernelSpecializationStrategy",
}


def used_names() -> set[str]:
    """Every attribute of a TensorRT object in runtime/trt.py, as "Class.attribute"."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        if owner in OWNERS:
            found.add(f"{OWNERS[owner]}.{node.attr}".lstrip("."))
        elif owner.startswith("trt."):
            found.add(f"{owner.removeprefix('trt.')}.{node.attr}")
    return found


def test_every_tensorrt_name_used_is_in_the_real_api() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    names = used_names()
    assert {"ICudaEngine.create_execution_context", "IExecutionContext.execute_async_v3"} <= names
    assert {"Runtime.deserialize_cuda_engine", "TensorIOMode.INPUT", "Logger.ERROR"} <= names
    assert len(names) > 18
    for name in sorted(names):
        value = trt
        for part in name.split("."):
            assert hasattr(value, part), name
            value = getattr(value, part)


def test_the_fake_engine_has_no_method_that_the_real_one_lacks() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    for fake, real in ((FakeEngine, trt.ICudaEngine), (FakeContext, trt.IExecutionContext)):
        for name, function in inspect.getmembers(fake, inspect.isfunction):
            if name.startswith("_"):
                continue
            overloads = re.findall(rf"{name}\((.*)\) ->", getattr(real, name).__doc__ or "")
            arities = {len(re.findall(r"\b\w+: ", overload)) for overload in overloads}
            assert len(inspect.signature(function).parameters) in arities, (name, overloads)
