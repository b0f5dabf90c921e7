"""The TensorRT backend on a fake GPU: concurrent calls, failures, kernels, and what it reports."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import itertools
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_gpu
import numpy as np
import pytest
from fake_gpu import (
    CLASSES,
    Bench,
    Diagnostics,
    Validity,
    WithDlpack,
    close,
    expected,
    images,
)

import rtresnet
from rtresnet.core import hardware
from rtresnet.core.errors import InputError, UnavailableError, UnknownNameError
from rtresnet.core.sidecar import Plan, Profile
from rtresnet.runtime.contexts import cache_path
from rtresnet.runtime.cuda import Cuda
from rtresnet.runtime.trt import TrtBackend
from rtresnet.runtime.trt_plan import ErrorLog, logger

LONG = 30  # seconds after which a test has failed


# Concurrent calls.


def test_infer_several_contexts_run_at_once(bench: Bench) -> None:
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


def test_load_contexts_creates_that_many(bench: Bench) -> None:
    made = []
    for count in (1, 3):
        before = bench.engine.contexts
        with rtresnet.load(bench.path, contexts=count):
            made.append(bench.engine.contexts - before)
    assert made[1] == 3 * made[0] > 0


@pytest.mark.parametrize(("graphs", "expected"), [(None, "by hand"), (False, "none")])
def test_load_graphs_selects_them(bench: Bench, graphs: bool | None, expected: str) -> None:
    bench.by_hand()
    with rtresnet.load(bench.path, graphs=graphs) as session:
        assert getattr(session.backend, "graphs") == expected  # noqa: B009  # not every backend's


def test_load_kernels_selects_the_strategy(bench: Bench) -> None:
    for kernels in ("eager", "lazy"):
        bench.engine.made_by.clear()
        with rtresnet.load(bench.path, kernels=kernels) as session:
            session(images(3))
            _, on_device = bench.on_gpu(images(3))
            session(WithDlpack(on_device))  # type: ignore[arg-type]  # what plans take too
        strategies = [c.dynamic_shapes_kernel_specialization_strategy for c in bench.engine.made_by]
        assert set(strategies) == {kernels}
    with pytest.raises(UnknownNameError, match="unknown kernels"):
        rtresnet.load(bench.path, kernels="never")


@pytest.mark.parametrize("contexts", [1, 3])
def test_infer_many_threads_get_their_own_results(bench: Bench, contexts: int) -> None:
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


def test_close_waits_for_a_call_and_refuses_the_next(bench: Bench) -> None:
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
        with pytest.raises(InputError, match=r"infer: .* closed"):
            backend.infer(images(3))
    assert backend.timings() == {}


def test_load_without_contexts_is_refused(bench: Bench) -> None:
    with pytest.raises(InputError, match="at least 1"):
        bench.load(contexts=0)


# Failures and clean-up.


@pytest.mark.parametrize("rtx_built", [True, False])
def test_close_frees_everything_in_order(bench: Bench, rtx_built: bool) -> None:
    if not rtx_built:
        bench.by_hand()
    backend = bench.load(contexts=2)
    for count in (3, 20, 3, 20):
        backend.infer(images(count))
    bench.cuda.log.clear()
    for record in (bench.engine.configs, bench.engine.made_by):
        record.clear()
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


def test_load_any_failing_call_frees_everything(bench: Bench) -> None:
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
def test_infer_any_failing_call_leaves_the_next_right(bench: Bench, rtx_built: bool) -> None:
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
def test_load_failing_tensorrt_call_raises_the_log(bench: Bench, call: str) -> None:
    bench.engine.fail_at = (call, 1)
    message = rf"net\.plan: {call}.* failed on Test GPU: Error Code 3: {call} does not like it"
    with pytest.raises(UnavailableError, match=message if "cache" not in call else call):
        bench.load()
    assert bench.cuda.live == []


@pytest.mark.parametrize("call", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
@pytest.mark.parametrize("rtx_built", [True, False])
def test_infer_failing_tensorrt_call_raises_the_log(
    bench: Bench, call: str, rtx_built: bool
) -> None:
    if not rtx_built:
        bench.by_hand()
    backend = bench.load()
    bench.fail(call)
    message = rf"{call}.* failed on Test GPU: Error Code 3: {call} does not like it$"
    with pytest.raises(UnavailableError, match=message):
        backend.infer(images(20))
    for _ in range(3):
        close(backend.infer(images(20)), expected(images(20)))
    backend.close()
    assert bench.cuda.live == []


class Interrupted(Exception):
    """Stands for the KeyboardInterrupt of a Ctrl-C, wherever it comes."""


@pytest.mark.parametrize("waiting", ["close", "timings"])
def test_close_interrupted_wait_loses_no_stream(
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


def test_close_of_a_lost_device_frees_everything(
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


def test_timings_after_a_failed_call_are_empty(bench: Bench) -> None:
    backend = bench.load(timings=True)
    backend.infer(images(3))
    assert backend.timings()
    bench.fail("execute_async_v3")
    with pytest.raises(UnavailableError):
        backend.infer(images(3))
    assert backend.timings() == {}


def test_timings_without_the_option_are_empty(bench: Bench) -> None:
    backend = bench.load()
    for count in (3, 20):
        backend.infer(images(count))
        assert backend.timings() == {}
    with pytest.raises(InputError, match="timings=True"):
        backend.timeline(images(3))


def test_infer_failure_does_not_report_older_errors(bench: Bench) -> None:
    backend = bench.load()
    bench.engine.log("Error Code 9: long ago")
    bench.fail("execute_async_v3")
    with pytest.raises(UnavailableError) as caught:
        backend.infer(images(3))
    assert "does not like it" in str(caught.value) and "long ago" not in str(caught.value)


def test_error_log_returns_the_threads_own_errors_first() -> None:
    log = ErrorLog()
    thread = threading.Thread(target=lambda: log.add("theirs"))
    thread.start()
    thread.join()
    log.add("ours")
    assert log.take() == "ours"
    assert log.take() == "theirs"  # better than nothing
    log.add("ours again")
    log.clear()
    assert log.take() == "theirs"
    assert ErrorLog().take() == "TensorRT gave no reason"


def test_infer_after_a_refused_shape_sets_it_again(bench: Bench) -> None:
    backend = bench.load(graphs=False)
    backend.infer(images(8))
    bench.fail("set_input_shape")
    with pytest.raises(UnavailableError, match="set_input_shape"):
        backend.infer(images(3))
    close(backend.infer(images(8)), expected(images(8)))


def test_load_plan_not_accepted_raises_the_reason(bench: Bench) -> None:
    bench.accepts = False
    message = r"net\.plan.*TensorRT-RTX 1\.7\.1.*Test GPU.*magic tag does not match.*rtresnet build"
    with pytest.raises(UnavailableError, match=message):
        bench.load()
    assert bench.cuda.live == []


def test_load_header_not_accepted_raises_the_reason(bench: Bench) -> None:
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


def test_load_with_an_old_driver_names_the_driver(
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


def test_load_runtime_not_starting_exits_3(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(logger: Any) -> None:
        logger.log(bench.trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(bench.trt, "Runtime", fail)
    with pytest.raises(UnavailableError, match=r"cannot create a Runtime.*error: 35") as caught:
        bench.load()
    assert caught.value.exit_code == 3
    assert bench.cuda.live == []


def test_load_slow_plan_warns(bench: Bench) -> None:
    bench.validity = (Validity.SUBOPTIMAL, Diagnostics.UNSUPPORTED_CC)
    with pytest.warns(RuntimeWarning, match=r"slower .*\(unsupported cc\)"):
        bench.load()


def test_load_without_enough_memory_raises(bench: Bench) -> None:
    bench.cuda.room = 199
    with pytest.raises(UnavailableError, match=r"weights need 0 MB.*fewer contexts"):
        bench.load()
    one = 2 * 8 * (192 + 4 * CLASSES) + 512
    bench.cuda.room = one
    bench.load().close()
    with pytest.raises(UnavailableError, match=r"2 x activations .*up to 8"):
        bench.load(contexts=2)
    assert bench.cuda.live == []


def test_timings_with_the_option_are_those_of_the_events(bench: Bench) -> None:
    backend = bench.load(timings=True)
    assert backend.timings() == {}
    backend.infer(images(3))
    timings = backend.timings()
    assert timings.pop("enqueue") > 0
    assert timings == {"h2d": 4.0, "compute": 5.0, "d2h": 2.0}


def test_backend_attributes_describe_what_runs(bench: Bench) -> None:
    backend = bench.load()
    assert (backend.provider, backend.device) == ("TensorRT-RTX", "Test GPU")
    assert backend.threads is None
    assert backend.versions == {"tensorrt-rtx-cu13": "1.7.1.116"}
    assert (backend.smallest, backend.largest) == (1, 8)
    assert (backend.input_dtype, backend.layout, backend.size) == (np.float32, "nchw", 4)


def test_backend_of_tensorrt_reports_the_modules_version(bench: Bench) -> None:
    """The distribution may be called tensorrt, tensorrt-cu12, tensorrt-cu13 or libnvinfer."""
    bench.by_hand()
    plan = Plan(
        builder="tensorrt", version="1.7.1.116", targets=("sm_89",),
        profiles=(Profile(min=1, opt=4, max=8),), seconds=1.0,
    )  # fmt: skip
    sidecar: Any = SimpleNamespace(plan=plan, made_by={})
    backend = TrtBackend(bench.path, sidecar)
    assert (backend.provider, backend.versions) == ("TensorRT", {"tensorrt": "1.7.1.116"})


def test_watch_times_layers_of_every_context_without_graphs(bench: Bench) -> None:
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


# Compiled kernels of TensorRT-RTX.


def test_kernels_by_default_are_compiled_eagerly(bench: Bench) -> None:
    """Its default runs fallback kernels first, and they would be what is timed."""
    bench.load()
    for config in bench.engine.made_by:
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"


def test_kernel_cache_is_saved_next_to_the_plan(bench: Bench) -> None:
    saved = cache_path(bench.path)
    bench.load(graphs=False).close()
    assert not saved.exists(), "nothing ran"
    for count, required in ((3, b"kernels3"), (5, b"kernels35"), (3, b"kernels35")):
        backend = bench.load(graphs=False)
        backend.infer(images(count))
        backend.close()
        assert saved.read_bytes() == required
    bench.load().close()
    assert saved.read_bytes() == required, "what was prepared at load is in it"
    assert sorted(path.name for path in saved.parent.iterdir()) == ["net.plan", "net.plan.cache"]


def test_kernel_cache_unchanged_is_not_written(bench: Bench) -> None:
    saved = cache_path(bench.path)
    saved.write_bytes(b"kernels3")
    before = saved.stat().st_mtime_ns
    backend = bench.load()
    backend.infer(images(3))
    backend.close()
    assert saved.stat().st_mtime_ns == before


@pytest.mark.parametrize("blob", [b"", b"of another GPU"])
def test_kernel_cache_of_another_gpu_is_replaced(bench: Bench, blob: bytes) -> None:
    cache_path(bench.path).write_bytes(blob)
    backend = bench.load(graphs=False)
    backend.infer(images(3))
    bench.fail("execute_async_v3")
    with pytest.raises(UnavailableError) as caught:
        backend.infer(images(3))
    assert "another GPU" not in str(caught.value)
    backend.close()
    assert cache_path(bench.path).read_bytes() == b"kernels3"


def test_kernel_cache_unwritable_folder_warns(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    backend = bench.load()
    backend.infer(images(3))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(RuntimeWarning, match=r"net\.plan\.cache: .*kernels"):
        backend.close()
    assert bench.cuda.live == [] and not cache_path(bench.path).exists()


def test_kernel_cache_false_creates_none(bench: Bench) -> None:
    with rtresnet.load(bench.path, cache=False) as session:
        session(images(3))
    assert bench.engine.made_by[0].cache is None and not cache_path(bench.path).exists()


def test_kernel_cache_of_tensorrt_does_not_exist(bench: Bench) -> None:
    bench.by_hand()
    backend = bench.load()
    backend.infer(images(3))
    backend.close()
    assert (
        bench.engine.made_by[0].dynamic_shapes_kernel_specialization_strategy == "its own default"
    )
    assert not cache_path(bench.path).exists()


# Missing packages and devices.


def test_load_without_the_package_raises(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtresnet.core.hardware.installed", lambda name: False)
    with pytest.raises(UnavailableError, match="pip install tensorrt-rtx-cu13"):
        bench.load()
    assert bench.cuda.live == []


@pytest.mark.usefixtures("without_gpu")
def test_backend_without_a_gpu_raises(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no CUDA device") as caught:
        TrtBackend(tmp_path / "net.plan", None)
    assert caught.value.exit_code == 3


def test_close_keeps_no_context_alive(bench: Bench) -> None:
    backend = bench.load()
    backend.infer(images(3))
    backend.close()
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is fake_gpu.FakeContext]


# The real API.


def test_fake_device_has_the_operations_of_the_protocol() -> None:
    def operations(cls: type) -> dict[str, list[str]]:
        functions = inspect.getmembers(cls, inspect.isfunction)
        return {n: list(inspect.signature(f).parameters) for n, f in functions if n[0] != "_"}

    fake = operations(fake_gpu.FakeCuda)
    for helper in ("enqueue", "at", "host", "is_idle"):
        fake.pop(helper)
    assert fake == operations(Cuda)


def test_real_runtime_without_a_gpu_checks_a_header() -> None:
    """What `compatibility.check_header` calls; `open_cuda` has found a device before that."""
    real = pytest.importorskip("tensorrt_rtx")
    log = ErrorLog()
    runtime = real.Runtime(logger(real, log))
    assert runtime.engine_header_size == 64
    validity, bits = runtime.get_engine_validity(b"vtrt" + bytes(60))
    assert validity == real.EngineValidity.INVALID and isinstance(int(bits), int)
    assert runtime.deserialize_cuda_engine(b"vtrt" + bytes(600)) is None
    assert "gave no reason" not in log.take()  # what TensorRT logs is kept


def test_real_nptype_returns_numpy_types() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    results = {name: np.dtype(real.nptype(getattr(real.DataType, name))).name
             for name in ("FLOAT", "HALF", "UINT8", "INT32", "INT64")}  # fmt: skip
    assert list(results.values()) == ["float32", "float16", "uint8", "int32", "int64"]


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
def test_benchmark_runtime_gpu_runs_on_the_fake_gpu(
    bench: Bench, script: Any, dtype: str, rtx_built: bool
) -> None:
    if not rtx_built:
        bench.by_hand()
    bench.engine.dtype = dtype
    measured = script.measure(bench.path, 8, 0.01, 30)
    assert set(measured["rates"]) == {
        "bare engine", "infer, on the GPU", "infer, numpy", "infer, numpy, no graphs",
    }  # fmt: skip
    assert all(entry["images_per_second"] > 0 for entry in measured["rates"].values())
    assert measured["overlap"]["overlapped"] > 0.5 and measured["leaked_bytes"] == 0
    assert bench.cuda.live == []


def test_benchmark_overlap_is_the_share_of_overlapped_copies(script: Any) -> None:
    one = {"h2d": (0.0, 2.0), "compute": (2.0, 6.0), "d2h": (6.0, 7.0)}
    two = {"h2d": (3.0, 5.0), "compute": (6.0, 9.0), "d2h": (9.0, 10.0)}
    assert script.overlap([one, two]) == {"copy_ms": 6.0, "overlapped": 0.5}
    assert script.overlap([one])["overlapped"] == 0


def test_timings_during_close_read_no_destroyed_event(bench: Bench) -> None:
    backend = bench.load(timings=True)
    backend.infer(images(2))
    assert backend.timings()
    stream = backend._free.get()  # a call that is running
    closing = threading.Thread(target=backend.close)
    closing.start()
    while not backend._closing.locked():
        time.sleep(0.001)
    results: list[object] = []

    def read() -> None:
        try:
            results.append(backend.timings())
        except Exception as error:
            results.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    reading.join(0.1)  # it waits for the lock that close has
    backend._free.put(stream)
    for thread in (closing, reading):
        thread.join(LONG)
    assert results == [{}]
    assert backend.timings() == {}
