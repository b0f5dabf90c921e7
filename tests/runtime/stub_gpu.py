"""The real `cuda.bindings.driver` on a stub of libcuda, with the fake TensorRT's real numbers.

Runs in a process of its own, because the bindings keep the first libcuda that they find:
`run(library, "FUNCTION", ...)` calls a function of this file there and returns its result. Loaded
by conftest as `stub_gpu`; `benchmarks/callpath.py` uses it as well.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fake_gpu import (
    CLASSES,
    Bench,
    FakeContext,
    FakeEngine,
    WithInterface,
    expected,
    images,
)

from rtresnet.core.errors import RtresnetError
from rtresnet.runtime.batcher import Batcher, short_switch_interval
from rtresnet.runtime.cuda import CudaPython, host_view, open_cuda, pinned
from rtresnet.runtime.session import Session

FOLDER = Path(__file__).parent
COMPILER = "gcc"


def compile_stub(folder: Path) -> Path:
    """Compile `stub_libcuda.c` to folder/libcuda.so.1."""
    library = folder / "libcuda.so.1"
    subprocess.run(
        [COMPILER, "-O1", "-shared", "-fPIC", "-o", library, FOLDER / "stub_libcuda.c"], check=True
    )
    return library


def run(library: Path, function: str, *arguments: Any) -> Any:
    """Call a function of this file in a process whose libcuda is the stub."""
    root = FOLDER.parents[1]
    done = subprocess.run(
        [sys.executable, __file__, function, json.dumps(arguments)],
        env=os.environ
        | {
            "LD_LIBRARY_PATH": str(library.parent),
            "PYTHONPATH": os.pathsep.join([str(root), str(FOLDER)]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Stub:
    """A backend with a fake TensorRT on the real bindings; `driver` has the functions stub_*.

    Args:
        builder: "tensorrt", whose graphs the runtime captures, or "tensorrt_rtx".
        idle: Whether the engine computes nothing, for timing what is around it.
    """

    def __init__(self, builder: str, *, idle: bool = False) -> None:
        import pytest
        from cuda.bindings import driver as bindings

        self.driver = ctypes.CDLL("libcuda.so.1")
        self.bindings = bindings
        cuda = open_cuda()
        assert isinstance(cuda, CudaPython)
        self.cuda: Any = cuda
        self.device = HostDevice(self.driver)
        engine = (IdleEngine if idle else FakeEngine)(self.device)
        folder = Path(tempfile.mkdtemp())
        self.bench = Bench(pytest.MonkeyPatch(), folder, engine=engine, cuda=cuda)
        if builder == "tensorrt":
            self.bench.by_hand()

    def load(self, **options: Any) -> Any:
        return self.bench.load(**options)


class HostDevice:
    """Where the fake engine computes: a host function on the stream, in memory of the stub."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.driver = driver
        self.log: list[str] = []
        self.live: list[tuple[str, Any]] = []
        self._callbacks: list[Any] = []  # a captured graph calls them again

    def _destroy(self, kind: str, handle: Any) -> None:
        self.live.remove((kind, handle))

    def forget(self) -> None:
        """Drop the functions of graphs that are gone, and what they refer to."""
        self._callbacks.clear()

    def at(self, address: int, size: int) -> np.ndarray:
        return host_view(address, size)

    def enqueue(self, name: str, stream: int, work: Callable[[], None]) -> None:
        callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda data: work())
        self._callbacks.append(callback)
        # Not by the bindings: they free what they pass to the function when it was called once.
        code = self.driver.cuLaunchHostFunc(ctypes.c_void_p(stream), callback, None)
        assert code == 0, code


class IdleContext(FakeContext):
    """Computes nothing, in no time."""

    def execute_async_v3(self, stream_handle: int) -> bool:
        self.has_run = True
        return True


class IdleEngine(FakeEngine):
    """An engine of such contexts.

    Attributes:
        side: Side of an image, in pixels.
    """

    context = IdleContext
    side = 4

    @property
    def row(self) -> tuple[int, ...]:
        return (self.side, self.side, 3) if self.dtype == "uint8" else (3, self.side, self.side)


def results(builder: str, graphs: bool | None) -> dict[str, Any]:
    """Run batches of every kind of size three times, compare with NumPy, and return leaks."""
    stub = Stub(builder)
    before = stub.driver.stub_live()
    wrong = []
    for options in ({}, {"timings": True}, {"blocking": True, "contexts": 2}):
        backend = stub.load(graphs=graphs, **options)
        for count in (1, 2, 3, 8, 9, 43) * 3:
            batch = images(count, seed=count)
            if not np.allclose(backend.infer(batch), expected(batch), rtol=1e-5, atol=1e-5):
                wrong.append([options, count])
        if "timings" in options:
            timings = backend.timings()
        with stub.cuda.active():
            address = stub.cuda.allocate(9 * 4 * CLASSES)
        view = stub.device.at(address, 9 * 4 * CLASSES)
        out = view.view(np.float32).reshape(9, CLASSES)
        with backend.pipeline() as pipeline:
            for count in (8, 3, 8, 8):
                pipeline.put(images(count))
            for count in (8, 3, 8, 8):
                if not np.allclose(pipeline.get(), expected(images(count)), 1e-5, 1e-5):
                    wrong.append([options, "in flight"])
        backend.infer(images(9), out=WithInterface(out))
        if not np.allclose(out, expected(images(9)), rtol=1e-5, atol=1e-5):
            wrong.append([options, "on the GPU"])
        with stub.cuda.active():
            stub.cuda.free(address)
        captured = backend.graphs
        backend.close()
        stub.device.forget()
    return {
        "wrong": wrong, "left": stub.driver.stub_live() - before, "depth": stub.driver.stub_depth(),
        "timings": timings, "graphs": captured, "contexts": len(stub.device.live),
    }  # fmt: skip


def operations() -> dict[str, Any]:
    """Call every CUDA operation once; return what each returned or raised."""
    stub = Stub("tensorrt")
    cuda, driver = stub.cuda, stub.driver
    result: dict[str, Any] = {}
    with cuda.active():
        stream, device, other = cuda.stream(), cuda.allocate(64), cuda.allocate(64)
        pinned = cuda.allocate_pinned(64)
        host = stub.device.at(pinned, 64)
        start, stop = cuda.event(True, False), cuda.event(False, True)
        result["types"] = [type(value).__name__ for value in (stream, device, pinned)]
        result["memory"] = cuda.memory()
        host[:] = np.arange(64)
        cuda.to_device(device, pinned, 64, stream)
        cuda.on_device(other, device, 64, stream)
        cuda.zero(other, 8, stream)
        host[:] = 255
        cuda.to_host(pinned, other, 64, stream)
        cuda.record(start, stream)
        cuda.record(stop, stream)
        cuda.wait(stream, start)
        cuda.join(stop)
        cuda.synchronize(stream)
        result["copied"] = host.tolist()
        result["elapsed"] = cuda.elapsed(start, stop)
        result["pinned"] = [cuda.is_pinned(pinned + 1), cuda.is_pinned(np.zeros(8).ctypes.data)]
        cuda.begin_capture(stream)
        cuda.to_host(pinned, device, 64, stream)
        graph = cuda.end_capture(stream)
        host[:] = 255
        cuda.launch(graph, stream)
        result["launched"] = host.tolist()
        calls: dict[str, Callable[[], object]] = {
            "cuMemGetInfo_v2": cuda.memory,
            "cuStreamCreate": cuda.stream,
            "cuStreamSynchronize": lambda: cuda.synchronize(stream),
            "cuEventCreate": lambda: cuda.event(True, True),
            "cuEventRecord": lambda: cuda.record(start, stream),
            "cuStreamWaitEvent": lambda: cuda.wait(stream, start),
            "cuEventSynchronize": lambda: cuda.join(start),
            "cuEventElapsedTime_v2": lambda: cuda.elapsed(start, stop),
            "cuMemAlloc_v2": lambda: cuda.allocate(8),
            "cuMemAllocHost_v2": lambda: cuda.allocate_pinned(8),
            "cuMemcpyHtoDAsync_v2": lambda: cuda.to_device(device, pinned, 8, stream),
            "cuMemcpyDtoHAsync_v2": lambda: cuda.to_host(pinned, device, 8, stream),
            "cuMemcpyDtoDAsync_v2": lambda: cuda.on_device(device, other, 8, stream),
            "cuMemsetD8Async": lambda: cuda.zero(device, 8, stream),
            "cuStreamBeginCapture_v2": lambda: cuda.begin_capture(stream),
            "cuGraphLaunch": lambda: cuda.launch(graph, stream),
            "cuGraphExecDestroy": lambda: cuda.destroy_graph(graph),
            "cuStreamDestroy_v2": lambda: cuda.destroy_stream(stream),
            "cuEventDestroy_v2": lambda: cuda.destroy_event(start),
            "cuMemFree_v2": lambda: cuda.free(device),
            "cuMemFreeHost": lambda: cuda.free_pinned(pinned),
            "cuCtxPushCurrent_v2": lambda: cuda.active().__enter__(),
        }
        result["failed"] = {name: failure(driver, name, call) for name, call in calls.items()}
        for name in ("cuStreamEndCapture", "cuGraphInstantiateWithFlags"):
            cuda.begin_capture(stream)
            result["failed"][name] = failure(driver, name, lambda: cuda.end_capture(stream))
        cuda.destroy_graph(graph)
        for event in (start, stop):
            cuda.destroy_event(event)
        for address in (device, other):
            cuda.free(address)
        cuda.free_pinned(pinned)
        cuda.destroy_stream(stream)
    result["outside"] = failure(driver, "", lambda: cuda.allocate(8))
    result["left"], result["depth"] = driver.stub_live(), driver.stub_depth()
    return result


def failure(driver: Any, name: str, call: Callable[[], object]) -> list[Any]:
    """Return exception class, message and exit code of a call in which a CUDA function fails."""
    driver.stub_fail(name.encode())
    try:
        call()
    except RtresnetError as error:
        return [type(error).__name__, str(error), error.exit_code]
    return ["nothing", "", 0]


def waiting(blocking: bool) -> dict[str, Any]:
    """Return the progress of another Python thread while `infer` waits 300 ms for a device."""
    stub = Stub("tensorrt")
    backend = stub.load(blocking=blocking)
    stub.driver.stub_wait_us(300_000)
    steps, ended = 0, threading.Event()

    def count() -> None:
        nonlocal steps
        while not ended.is_set():
            steps += 1

    counter = threading.Thread(target=count)
    counter.start()
    backend.infer(images(2))
    ended.set()
    counter.join()
    return {"steps": steps}


def pinned_memory() -> dict[str, Any]:
    """Return what `rtresnet.pinned` allocates, and what it did not free."""
    stub = Stub("tensorrt")
    before = stub.driver.stub_live()
    array = pinned((2, 3, 4, 4), np.float32)
    array[:] = images(2)
    with stub.cuda.active():
        is_pinned = stub.cuda.is_pinned(array.ctypes.data)
    during = stub.driver.stub_live() - before
    tail = array[1:]
    del array
    unchanged = bool((tail == images(2)[1:]).all()) and stub.driver.stub_live() - before == 1
    del tail
    left = stub.driver.stub_live() - before
    failed = failure(stub.driver, "cuMemAllocHost_v2", lambda: pinned(8, np.uint8))
    return {
        "pinned": is_pinned,
        "during": during,
        "kept": unchanged,
        "left": left,
        "failed": failed,
    }


def gathering(seconds: float, side: int = 224, wait_us: int = 5000) -> dict[str, Any]:
    """Measure `Batcher` with batches of 32 images on a device of `wait_us` per batch.

    For float32 and uint8: a session that gets any array, as before `Batcher` knew of pinned memory;
    a plan with one context; a plan with two. Median images/s over rounds of 20 batches, and the
    share of the time in which the device computed.
    """
    count, batches = 32, 20
    stub = Stub("tensorrt", idle=True)
    engine = stub.bench.engine
    engine.side, engine.profiles = side, [(1, count, count)]
    variants: dict[tuple[str, str], tuple[Batcher, np.ndarray]] = {}
    for dtype in ("float32", "uint8"):
        engine.dtype = dtype
        image = np.zeros(engine.row, dtype)
        for name, contexts in (("staged", 1), ("pinned", 1), ("pinned, 2 contexts", 2)):
            session = Session(stub.bench.path, None, stub.load(contexts=contexts))
            call = session.backend.infer if name == "staged" else session
            variants[dtype, name] = Batcher(call, count, 1e9), image
    stub.driver.stub_wait_us(wait_us)
    rates: dict[tuple[str, str], list[float]] = {way: [] for way in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates["uint8", "staged"]) < 3:
        for way, (batcher, image) in variants.items():
            begin = time.perf_counter()
            for future in [batcher.submit(image) for _ in range(batches * count)]:
                future.result()
            rates[way].append(batches * count / (time.perf_counter() - begin))
    for batcher, _ in variants.values():
        batcher.close()
    # Without the first round, which the operating system's page faults are in.
    medians = {way: statistics.median(entry[1:]) for way, entry in rates.items()}
    return {
        "rows": [
            {
                "dtype": dtype, "way": name, "images_per_second": rate,
                "device_busy": rate / count * wait_us / 1e6,
            }
            for (dtype, name), rate in medians.items()
        ],
        "rounds": len(rates["uint8", "staged"]) - 1, "wait_us": wait_us, "side": side,
    }  # fmt: skip


def gil(calls: int, wait_us: int = 500) -> dict[str, dict[str, float]]:
    """Return milliseconds of `infer` on a device of `wait_us`, alone and next to a busy thread."""
    stub = Stub("tensorrt", idle=True)
    backend = stub.load()
    stub.driver.stub_wait_us(wait_us)
    ended = threading.Event()

    def measured() -> dict[str, float]:
        took = []
        for _ in range(calls):
            begin = time.perf_counter()
            backend.infer(batch)
            took.append(1e3 * (time.perf_counter() - begin))
        return {"median_ms": statistics.median(took), "p99_ms": sorted(took)[int(0.99 * calls)]}

    def compute() -> None:
        while not ended.is_set():
            pass

    batch = images(1)
    result = {"alone": measured()}
    thread = threading.Thread(target=compute)
    thread.start()
    try:
        result["next to a thread"] = measured()
        with short_switch_interval():
            result["next to a thread, 1e-4"] = measured()
    finally:
        ended.set()
        thread.join()
    return result


def call_cost(builder: str, seconds: float) -> dict[str, Any]:
    """Return microseconds of `infer` and of the same work without a runtime, alternately.

    The work: copy into pinned memory, copy in, graph launch, copy out, wait, copy out of pinned
    memory, each return code checked. One image of 192 bytes, five classes, an engine that computes
    nothing. In turn in rounds of 200 calls; minimum and median over the rounds.
    """
    stub = Stub(builder, idle=True)
    backend = stub.load()
    batch = images(1)
    assert backend.graphs == {"tensorrt": "by hand", "tensorrt_rtx": "built in"}[builder]
    calls = {"infer": backend.infer, "lean": lean_sequence(stub)}
    rounds: dict[str, list[float]] = {"infer": [], "lean": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds["lean"]) < 20:
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(200):
                call(batch)
            rounds[name].append((time.perf_counter() - begin) / 200 * 1e6)
    before = stub.driver.stub_calls()
    backend.infer(batch)
    result: dict[str, Any] = {"driver_calls": stub.driver.stub_calls() - before}
    for name, durations in rounds.items():
        result[name] = {
            "min_us": min(durations),
            "median_us": sorted(durations)[len(durations) // 2],
        }
    result["ratio"] = result["infer"]["min_us"] / result["lean"]["min_us"]
    result["rounds"] = len(rounds["lean"])
    return result


def lean_sequence(stub: Stub) -> Callable[[Any], Any]:
    """Return the calls that one inference cannot do without, written out."""
    cuda, driver = stub.cuda, stub.bindings
    cuda.active().__enter__()  # current in this thread, for good
    stream = cuda.stream()
    host_in, host_out = cuda.allocate_pinned(192), cuda.allocate_pinned(4 * CLASSES)
    device_in, device_out = cuda.allocate(192), cuda.allocate(4 * CLASSES)
    at = stub.device.at
    staged = at(host_in, 192).view(np.float32).reshape(1, 3, 4, 4)
    result = at(host_out, 4 * CLASSES).view(np.float32).reshape(1, CLASSES)
    cuda.begin_capture(stream)
    graph = cuda.end_capture(stream)
    copy_in, copy_out = driver.cuMemcpyHtoDAsync, driver.cuMemcpyDtoHAsync
    launch, synchronize = driver.cuGraphLaunch, driver.cuStreamSynchronize

    def call(images: Any) -> Any:
        staged[:] = images
        (code,) = copy_in(device_in, host_in, 192, stream)
        if code:
            raise RuntimeError(code)
        (code,) = launch(graph, stream)
        if code:
            raise RuntimeError(code)
        (code,) = copy_out(host_out, device_out, 4 * CLASSES, stream)
        if code:
            raise RuntimeError(code)
        (code,) = synchronize(stream)
        if code:
            raise RuntimeError(code)
        return result.copy()

    return call


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
