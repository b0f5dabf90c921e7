"""A fake GPU and TensorRT with real memory. Loaded by conftest as `fake_gpu`.

Work on a stream is put off until something waits for it, which is the latest that a device may do
it; with a seed, some of it is done earlier, in any order that streams and events permit. Whoever
reads too early, or writes where something is still being read, gets garbage here too. Each piece of
work takes its time on a clock of its own: `timeline` has when it began and ended.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from rtresnet.core import hardware
from rtresnet.core.errors import UnavailableError
from rtresnet.core.hardware import Gpu
from rtresnet.runtime import trt_plan as module
from rtresnet.runtime.trt import TrtBackend

CLASSES, TOP = 5, 2
ROWS = {"float32": (3, 4, 4), "uint8": (4, 4, 3)}
WEIGHTS = np.random.default_rng(0).standard_normal((48, CLASSES)).astype(np.float32)
MILLISECONDS = {"to_device": 4.0, "execute": 5.0, "to_host": 2.0, "on_device": 1.0}
MAKES = ("stream", "event", "allocate", "allocate_pinned", "end_capture")


class Op:
    """One piece of work on a stream."""

    def __init__(self, name: str, stream: int, work: Callable[[], None], after: Op | None) -> None:
        self.name, self.stream, self.work, self.after = name, stream, work, after
        self.done, self.issued, self.end = False, 0.0, 0.0


class FakeCuda:
    """The protocol of `runtime.cuda.Cuda` on host memory.

    Attributes:
        log: Every call by name, in order.
        sleepers: Events that a caller slept for.
        live: What was made and not yet given back, by kind.
        fail_at: Number of the call, counted from 1, that fails.
        timeline: (name, begin, end) of work that was done.
    """

    def __init__(self, graphs: bool = True) -> None:
        self.graphs = graphs
        self.log: list[str] = []
        self.live: list[tuple[str, Any]] = []
        self.made: Counter[str] = Counter()
        self.fail_at: int | None = None
        self.fail_capture = False
        self.room = 1 << 20
        self.timeline: list[tuple[str, float, float]] = []
        self.copied: list[tuple[str, int]] = []
        self.on_join: Callable[[], object] = lambda: None
        self.shuffle: random.Random | None = None
        self._arena = np.full((1 << 21) + 256, 255, np.uint8)  # as float32: not a number
        self._base = -(-self._arena.ctypes.data // 256) * 256
        self._top, self._sizes = self._base, {0: 0}
        self._pinned: dict[int, np.ndarray] = {}
        self._untimed: set[Any] = set()
        self._blocking: set[Any] = set()
        self.sleepers: list[Any] = []
        self._streams: dict[int, deque[Op]] = {1: deque()}  # the default one, as CUDA numbers it
        self._clock: dict[int, float] = {1: 0.0}
        self._host, self._next = 0.0, 100
        self._records: dict[Any, Op] = {}
        self._capturing: dict[int, list[tuple[str, Callable[[], None]]]] = {}
        self._inside = threading.local()

    def _call(self, name: str) -> None:
        assert getattr(self._inside, "depth", 0), f"{name} where the device is not active"
        self.log.append(name)
        if self.fail_at is not None and len(self.log) == self.fail_at:
            raise UnavailableError(f"{name} failed: cudaErrorUnknown (999)")
        while self.shuffle and self.shuffle.random() < 0.6:
            ready = [s for s, ops in self._streams.items() if ops and self._is_ready(ops[0])]
            if not ready:
                break
            self._do(self.shuffle.choice(ready))

    def _make(self, kind: str) -> int:
        self._call(kind)
        # Other threads may make things meanwhile: captures are thread-local.
        assert not getattr(self._inside, "captures", 0), f"{kind} during a capture"
        self._next += 1
        self.live.append((kind, self._next))
        self.made[kind] += 1
        return self._next

    def _destroy(self, kind: str, handle: Any) -> None:
        self.log.append(f"destroy {kind}")
        self.live.remove((kind, handle))  # a ValueError where it was destroyed twice

    @staticmethod
    def _is_ready(op: Op) -> bool:
        return op.after is None or op.after.done

    def _do(self, stream: int) -> None:
        op = self._streams[stream].popleft()
        begin = max(op.issued, self._clock[stream], op.after.end if op.after else 0.0)
        op.work()
        op.done, op.end = True, begin + MILLISECONDS.get(op.name, 0.0)
        self._clock[stream] = op.end
        if op.name in MILLISECONDS:
            self.timeline.append((op.name, begin, op.end))

    def _until(self, op: Op) -> None:
        while not op.done:
            head = self._streams[op.stream][0]
            if head.after is not None:
                self._until(head.after)
            self._do(op.stream)
        self._host = max(self._host, op.end)

    def _put(self, name: str, stream: int, work: Callable[[], None], after: Op | None = None) -> Op:
        assert stream in self._streams, f"{name} on a stream that is not there"
        op = Op(name, stream, work, after)
        op.issued = self._host
        if stream in self._capturing:
            self._capturing[stream].append((name, work))
        else:
            self._streams[stream].append(op)
        return op

    def enqueue(self, name: str, stream: int, work: Callable[[], None]) -> None:
        """Enqueue a call for the engine."""
        self._call(name)
        self._put(name, stream, work)

    def at(self, address: int, size: int) -> np.ndarray:
        """Return bytes of device memory that is allocated."""
        allocated = any(a <= address and address + size <= a + n for a, n in self._sizes.items())
        assert allocated, "memory that was not allocated, or was given back"
        start = address - self._arena.ctypes.data
        return self._arena[start : start + size]

    def is_idle(self) -> bool:
        """Whether nothing is left to be done."""
        return not any(self._streams.values())

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self._inside.depth = getattr(self._inside, "depth", 0) + 1
        try:
            yield
        finally:
            self._inside.depth -= 1

    def memory(self) -> tuple[int, int]:
        self._call("memory")
        return self.room, 1 << 20

    def stream(self) -> int:
        stream = self._make("stream")
        self._streams[stream], self._clock[stream] = deque(), 0.0
        return stream

    def host(self, address: int, size: int) -> np.ndarray:
        """Return bytes of pinned memory."""
        for start, buffer in self._pinned.items():
            if start <= address and address + size <= start + len(buffer):
                return buffer[address - start :][:size]
        raise AssertionError("host memory that is not pinned, or was given back")

    def synchronize(self, stream: int) -> None:
        self.on_join()
        with LOCK:
            self._call("synchronize")
            while self._streams[stream]:
                self._until(self._streams[stream][-1])

    def destroy_stream(self, stream: int) -> None:
        self._destroy("stream", stream)
        del self._streams[stream]

    def event(self, timing: bool, blocking: bool) -> Any:
        event = self._make("event")
        if not timing:
            self._untimed.add(event)
        if blocking:
            self._blocking.add(event)
        return event

    def record(self, event: Any, stream: int) -> None:
        self._call("record")
        assert ("event", event) in self.live
        self._records[event] = self._put("record", stream, lambda: None)

    def wait(self, stream: int, event: Any) -> None:
        self._call("wait")
        self._put("wait", stream, lambda: None, self._records[event])

    def join(self, event: Any) -> None:
        self.on_join()
        with LOCK:
            self._call("join")
            if event in self._blocking:
                self.sleepers.append(event)
            self._until(self._records[event])

    def elapsed(self, start: Any, stop: Any) -> float:
        self._call("elapsed")
        for event in (start, stop):
            assert event not in self._untimed, "an event that was made without timing"
            if not self._records[event].done:
                raise UnavailableError("cudaEventElapsedTime failed: cudaErrorNotReady (600)")
        return self._records[stop].end - self._records[start].end

    def destroy_event(self, event: Any) -> None:
        self._destroy("event", event)

    def allocate(self, size: int) -> int:
        self._make("allocate")
        self.live.pop()
        address, self._top = self._top, self._top + -(-size // 256) * 256  # never used again
        self._sizes[address] = size
        self.live.append(("allocate", address))
        return address

    def free(self, address: int) -> None:
        self._destroy("allocate", address)
        del self._sizes[address]

    def allocate_pinned(self, size: int) -> int:
        self._make("allocate_pinned")
        self.live.pop()
        buffer = np.full(size, 255, np.uint8)
        address = buffer.ctypes.data
        self._pinned[address] = buffer
        self.live.append(("allocate_pinned", address))
        return address

    def free_pinned(self, address: int) -> None:
        self._destroy("allocate_pinned", address)
        del self._pinned[address]

    def is_pinned(self, address: int) -> bool:
        self._call("is_pinned")
        return any(a <= address < a + len(buffer) for a, buffer in self._pinned.items())

    def to_device(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("to_device")
        self.copied.append(("to_device", size))
        images = self.host(source, size)
        self._put("to_device", stream, lambda: np.copyto(self.at(target, size), images))

    def to_host(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("to_host")
        self.copied.append(("to_host", size))
        result = self.host(target, size)
        self._put("to_host", stream, lambda: np.copyto(result, self.at(source, size)))

    def on_device(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("on_device")
        self.copied.append(("on_device", size))
        work = lambda: np.copyto(self.at(target, size), self.at(source, size))  # noqa: E731
        self._put("on_device", stream, work)

    def zero(self, address: int, size: int, stream: int) -> None:
        self._call("zero")
        self._put("zero", stream, lambda: self.at(address, size).fill(0))

    def begin_capture(self, stream: int) -> None:
        self._call("begin_capture")
        self._capturing[stream] = []
        self._inside.captures = 1

    def end_capture(self, stream: int) -> Any:
        work = self._capturing.pop(stream)
        self._inside.captures = 0
        graph = self._make("end_capture")
        if self.fail_capture:
            self.live.pop()
            raise UnavailableError("cudaStreamEndCapture failed: cudaErrorStreamCaptureInvalidated")
        self._records[graph] = work  # type: ignore[assignment]
        return graph

    def launch(self, graph: Any, stream: int) -> None:
        self._call("launch")
        assert ("end_capture", graph) in self.live
        for name, work in self._records[graph]:  # type: ignore[attr-defined]
            self._put(name, stream, work)

    def destroy_graph(self, graph: Any) -> None:
        self._destroy("end_capture", graph)
        del self._records[graph]


def _locked(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(self: FakeCuda, *arguments: Any) -> Any:
        with LOCK:
            return function(self, *arguments)

    return call


LOCK = threading.RLock()
OPERATIONS = {n: f for n, f in vars(FakeCuda).items() if isinstance(f, types.FunctionType)}
for _name in {n for n in OPERATIONS if n[0] != "_"} - {"active", "join", "synchronize"}:
    setattr(FakeCuda, _name, _locked(OPERATIONS[_name]))


class FakeContext:
    """Logits are the pixels times a fixed matrix; of a top-K engine, their order."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile, self.shape = -1, (0,)
        self.addresses: dict[str, int] = {}
        self.scratch = 0
        self.profiler: Any = None
        self.has_run = False
        engine.device.log.append("context")
        engine.device.live.append(("context", id(self)))

    def __del__(self) -> None:
        self.engine.device._destroy("context", id(self))

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.scratch = memory

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return bool(self.engine.answer("set_optimization_profile_async", True))

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        assert all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        self.shape = shape
        return bool(self.engine.answer("set_input_shape", True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 256 == 0, "TensorRT wants aligned addresses"
        self.addresses[name] = memory
        return bool(self.engine.answer("set_tensor_address", True))

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, count, addresses = self.engine, self.shape[0], dict(self.addresses)
        if not engine.answer("execute_async_v3", True):
            return False
        self.has_run = True
        assert self.scratch and len(addresses) == engine.num_io_tensors
        dtype, device = np.dtype(engine.dtype), engine.device

        def work() -> None:
            device.at(self.scratch, engine.device_memory_size_v2)
            row = engine.row
            pixels = device.at(addresses["images"], count * int(np.prod(row)) * dtype.itemsize)
            batch = pixels.view(dtype).reshape(count, -1).copy()
            engine.runs.append((self.profile, batch))
            for name, values in zip(engine.outputs, engine.compute(batch), strict=True):
                device.at(addresses[name], values.nbytes)[:] = values.reshape(-1).view(np.uint8)

        device.enqueue("execute", stream_handle, work)
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        assert self.has_run, "what the first run does cannot be captured"
        return self.engine.capturable


class FakeEngine:
    """One input and one output, or two; the outputs are named first.

    Attributes:
        fail_at: (name of a call, how often it succeeds before): it then logs and returns nothing.
        runs: (profile, batch) of every execution that was done.
    """

    device_memory_size_v2 = 512
    context = FakeContext

    def __init__(self, device: Any) -> None:
        self.device = device
        self.dtype, self.outputs = "float32", ["logits"]
        self.index_dtype = "int64"
        self.profiles = [(1, 4, 8)]
        self.runs: list[tuple[int, np.ndarray]] = []
        self.fail_at: tuple[str, int] | None = None
        self.calls: Counter[str] = Counter()
        self.log: Callable[[str], None] = lambda message: None
        self.configs: list[Any] = []
        self.made_by: list[Any] = []  # of every context, its config
        self.contexts = 0
        self.capturable = True

    def answer(self, name: str, value: Any) -> Any:
        self.calls[name] += 1
        if self.fail_at is not None and self.fail_at == (name, self.calls[name]):
            self.log(f"Error Code 3: {name} does not like it")
            return False if value is True else None
        return value

    def compute(self, batch: np.ndarray) -> list[np.ndarray]:
        logits = batch.astype(np.float32) @ WEIGHTS
        if len(self.outputs) == 1:
            return [logits]
        order = np.argsort(-logits, axis=1)[:, :TOP]
        best = {"indices": order.astype(self.index_dtype)}
        best["probabilities"] = np.take_along_axis(logits, order, 1)
        return [best[name] for name in self.outputs]

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of one image."""
        return ROWS[self.dtype]

    def output_row(self, name: str) -> int:
        return CLASSES if name == "logits" else TOP

    @property
    def num_io_tensors(self) -> int:
        return 1 + len(self.outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return [*self.outputs, "images"][index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "images" else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return {"images": self.dtype, "indices": self.index_dtype}.get(name, "float32")

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert name == "images"
        return [(count, *self.row) for count in self.profiles[profile_index]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name == "images":
            return (-1, *self.row)
        return (-1, self.output_row(name))

    def create_runtime_config(self) -> Any:
        self.configs.append(FakeConfig(self))
        return self.answer("create_runtime_config", self.configs[-1])

    def create_execution_context(self, runtime_config: Any) -> FakeContext | None:
        if hasattr(self, "create_runtime_config"):
            assert runtime_config.engine is self and runtime_config.strategy == "user"
        else:
            assert runtime_config == "user"
        if self.answer("create_execution_context", True) is False:
            return None
        self.contexts += 1
        self.made_by.append(runtime_config)
        return self.context(self)


class OnnxEngine(FakeEngine):
    """An ONNX file, computed by ONNX Runtime."""

    def __init__(self, device: Any, path: Path) -> None:
        import onnxruntime

        super().__init__(device)
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (images,) = self.session.get_inputs()
        self.name, self.shape = images.name, tuple(images.shape[1:])
        self.dtype = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}[images.type]
        self.widths = {output.name: output.shape[1] for output in self.session.get_outputs()}
        self.outputs = list(self.widths)

    @property
    def row(self) -> tuple[int, ...]:
        return self.shape

    def output_row(self, name: str) -> int:
        return int(self.widths[name])

    def compute(self, batch: np.ndarray) -> list[np.ndarray]:
        images = batch.reshape(len(batch), *self.shape)
        return list(self.session.run(self.outputs, {self.name: images}))


class FakeConfig:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.strategy = self._graphs = "default"
        self.dynamic_shapes_kernel_specialization_strategy = "its own default"
        self.cache: Any = None

    @property
    def cuda_graph_strategy(self) -> str:
        """What is refused is dropped without a word, as by the real binding."""
        return self._graphs

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, strategy: str) -> None:
        if self.engine.answer("cuda_graph_strategy", True):
            self._graphs = strategy

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        return self.engine.answer("create_runtime_cache", FakeCache(self.engine))

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return bool(self.engine.answer("set_runtime_cache", True))


class FakeCache:
    """Takes blobs that begin with its magic; grows by what was run."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.blob = engine, b"kernels"

    def __del__(self) -> None:
        self.engine.device.log.append("destroy cache")

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels"):
            self.engine.log("Error Code 4: this cache is of another GPU")
            return False
        self.blob = blob
        return True

    def serialize(self) -> Any:
        shapes = {str(len(batch)).encode() for _, batch in self.engine.runs}
        return memoryview(self.blob + b"".join(sorted(s for s in shapes if s not in self.blob)))


class Validity(IntEnum):
    VALID, SUBOPTIMAL, INVALID = 0, 1, 2


class Diagnostics(IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC, MALFORMED_ENGINE = 1, 2, 32


class Bench:
    """The fake device, its TensorRT, and backends loaded on them.

    Args:
        engine: A FakeEngine to deserialize, whatever the plan holds.
        cuda: Device that backends open; by default the engine's.
    """

    def __init__(
        self, monkeypatch: Any, folder: Path, engine: Any = None, cuda: Any = None
    ) -> None:
        self.engine = engine or FakeEngine(FakeCuda())
        self.cuda = cuda or self.engine.device
        self.accepts, self.validity = True, (Validity.VALID, 0)
        self.validity_error: str | None = None  # logged when the header is checked
        self.refusal = "Error Code 1: magic tag does not match"
        self.path = folder / "net.plan"
        self.path.write_bytes(b"plan" * 50)
        self.trt = ModuleType("tensorrt_rtx")
        bench = self

        class ILogger:
            ERROR = SimpleNamespace(value=1)

        class Runtime:
            engine_header_size = 64

            def __del__(self) -> None:
                bench.engine.device.log.append("destroy runtime")

            def __init__(self, logger: Any) -> None:
                bench.engine.log = lambda message: logger.log(ILogger.ERROR, message)

            def get_engine_validity(self, buffer: bytes) -> tuple[Any, int]:
                assert len(buffer) == 64
                if bench.validity_error is not None:
                    bench.engine.log(bench.validity_error)
                return bench.validity

            def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeEngine | None:
                if not bench.accepts:
                    bench.engine.log(bench.refusal)
                return bench.engine if bench.accepts else None

        self.runtime = Runtime
        self.trt.__dict__.update(
            __version__="1.7.1.116", ILogger=ILogger, Runtime=Runtime, IRuntimeCache=FakeCache,
            TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"), nptype=np.dtype,
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(
                EAGER="eager", LAZY="lazy"
            ),
            CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
            EngineValidity=Validity, EngineInvalidityDiagnostics=Diagnostics,
        )  # fmt: skip
        for name in ("tensorrt_rtx", "tensorrt"):
            monkeypatch.setitem(__import__("sys").modules, name, self.trt)
        gpu = Gpu(name="Test GPU", capability=(8, 9), memory=1 << 30)
        monkeypatch.setattr(hardware, "gpus", lambda: (gpu,))
        monkeypatch.setattr(hardware, "installed", lambda name: True)
        monkeypatch.setattr(module, "open_cuda", lambda: self.cuda)

    def by_hand(self) -> None:
        """Become `tensorrt`: no kernel cache, no graphs of its own, no validity."""
        del self.trt.IRuntimeCache
        del self.runtime.get_engine_validity  # type: ignore[attr-defined]

    def load(self, **options: Any) -> TrtBackend:
        """Load the plan, and forget what preparing batch sizes has run and copied."""
        backend = TrtBackend(self.path, None, **options)
        self.engine.runs.clear()
        if isinstance(self.cuda, FakeCuda):
            self.cuda.copied.clear()
        return backend

    def fail(self, call: str, later: int = 1) -> None:
        """Make the next call of this name fail, or a later one."""
        self.engine.fail_at = (call, self.engine.calls[call] + later)

    def sizes(self) -> list[int]:
        """Return batches that were executed."""
        return [len(batch) for _, batch in self.engine.runs]

    def on_gpu(self, array: np.ndarray, offset: int = 0) -> tuple[int, np.ndarray]:
        """Copy to device memory; return the copy and a view of it."""
        with self.cuda.active():
            start = self.cuda.allocate(array.nbytes + offset) + offset
        view = self.cuda.at(start, array.nbytes).view(array.dtype).reshape(array.shape)
        view[:] = array
        return start, view


class WithDlpack:
    """As a tensor of torch's: the capsule is a real one, of numpy."""

    def __init__(self, view: np.ndarray, device: tuple[int, int] = (2, 0)) -> None:
        self.view, self.device, self.streams = view, device, list[int]()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int) -> Any:
        self.streams.append(stream)
        return self.view.__dlpack__()


class WithInterface:
    """As an array of Numba's."""

    def __init__(self, view: np.ndarray, **changes: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": view.shape, "typestr": view.dtype.str, "version": 3,
            "data": (view.ctypes.data, False), "strides": None, "stream": None,
        } | changes  # fmt: skip


def images(count: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "uint8":
        return rng.integers(0, 256, (count, *ROWS[dtype]), dtype=np.uint8)
    return rng.standard_normal((count, *ROWS[dtype])).astype(np.float32)


def expected(batch: np.ndarray) -> np.ndarray:
    return np.asarray(batch.reshape(len(batch), 48).astype(np.float32) @ WEIGHTS)


def close(got: Any, reference: np.ndarray) -> None:
    """Assert that results are those expected, up to rounding."""
    np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-5)
