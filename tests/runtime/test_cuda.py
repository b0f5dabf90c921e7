from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rtresnet import machine
from rtresnet.errors import EnvironmentLack, UnknownName
from rtresnet.runtime.cuda import Cuda, CudaPython, PyCuda, open_cuda

CALLS = {
    "cudaGetDevice": 0,
    "cudaSetDevice": 1,
    "cudaMemGetInfo": 0,
    "cudaStreamCreateWithFlags": 1,
    "cudaStreamSynchronize": 1,
    "cudaStreamDestroy": 1,
    "cudaEventCreate": 0,
    "cudaEventRecord": 2,
    "cudaStreamWaitEvent": 3,
    "cudaEventSynchronize": 1,
    "cudaEventElapsedTime": 2,
    "cudaEventDestroy": 1,
    "cudaMalloc": 1,
    "cudaFree": 1,
    "cudaMallocHost": 1,
    "cudaFreeHost": 1,
    "cudaPointerGetAttributes": 1,
    "cudaMemcpyAsync": 5,
    "cudaMemsetAsync": 4,
    "cudaStreamBeginCapture": 2,
    "cudaStreamEndCapture": 1,
    "cudaGraphInstantiate": 2,
    "cudaGraphLaunch": 2,
    "cudaGraphExecDestroy": 1,
    "cudaGraphDestroy": 1,
}
BUFFER = np.zeros(8, np.uint8)
OPERATIONS: dict[str, Callable[[CudaPython], object]] = {
    "cudaGetDevice": lambda cuda: cuda.active().__enter__(),
    "cudaMemGetInfo": lambda cuda: cuda.memory(),
    "cudaStreamCreateWithFlags": lambda cuda: cuda.stream(),
    "cudaStreamSynchronize": lambda cuda: cuda.synchronize(1),
    "cudaStreamDestroy": lambda cuda: cuda.destroy_stream(1),
    "cudaEventCreate": lambda cuda: cuda.event(),
    "cudaEventRecord": lambda cuda: cuda.record(1, 1),
    "cudaStreamWaitEvent": lambda cuda: cuda.wait(1, 1),
    "cudaEventSynchronize": lambda cuda: cuda.join(1),
    "cudaEventElapsedTime": lambda cuda: cuda.elapsed(1, 2),
    "cudaEventDestroy": lambda cuda: cuda.destroy_event(1),
    "cudaMalloc": lambda cuda: cuda.allocate(8),
    "cudaFree": lambda cuda: cuda.free(1),
    "cudaMallocHost": lambda cuda: cuda.allocate_pinned(8),
    "cudaFreeHost": lambda cuda: cuda.free_pinned(BUFFER),
    "cudaPointerGetAttributes": lambda cuda: cuda.is_pinned(BUFFER),
    "cudaMemsetAsync": lambda cuda: cuda.zero(1, 8, 1),
    "cudaStreamBeginCapture": lambda cuda: cuda.begin_capture(1),
    "cudaStreamEndCapture": lambda cuda: cuda.end_capture(1),
    "cudaGraphLaunch": lambda cuda: cuda.launch(1, 1),
    "cudaGraphExecDestroy": lambda cuda: cuda.destroy_graph(1),
}
COPIES: tuple[Callable[[CudaPython], object], ...] = (
    lambda cuda: cuda.to_device(1, BUFFER, 8, 1),
    lambda cuda: cuda.to_host(BUFFER, 1, 8, 1),
    lambda cuda: cuda.on_device(1, 2, 8, 1),
)
# Reached only where another call succeeded before.
INNER = {"cudaSetDevice", "cudaMemcpyAsync", "cudaGraphInstantiate", "cudaGraphDestroy"}


@pytest.mark.parametrize(("name", "arity"), CALLS.items())
def test_a_call_exists_in_cuda_python_with_the_arity_used(name: str, arity: int) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    inspect.signature(getattr(runtime, name)).bind(*range(arity))


def test_the_table_of_calls_is_complete() -> None:
    source = inspect.getsource(CudaPython)
    assert {part.split('"')[0] for part in source.split('_call("')[1:]} == set(CALLS)
    assert set(OPERATIONS) == set(CALLS) - INNER


def test_the_constants_exist_in_cuda_python() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    assert int(runtime.cudaError_t.cudaSuccess) == 0
    assert runtime.cudaMemcpyKind.cudaMemcpyHostToDevice == 1
    assert runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost == 2
    assert runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice == 3
    assert runtime.cudaStreamNonBlocking == 1
    assert runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal == 1
    assert runtime.cudaMemoryType.cudaMemoryTypeHost == 1
    assert runtime.cudaError_t.cudaErrorNotReady == 600
    runtime.cudaGetLastError()


@pytest.mark.skipif(bool(machine.gpus()), reason="there is a GPU, so the calls succeed or crash")
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_of_the_driver_names_the_call_and_its_code(name: str) -> None:
    """The real binding, called as in production: a wrong number or type would be a TypeError."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    cuda = CudaPython.__new__(CudaPython)
    cuda._rt = runtime
    with pytest.raises(EnvironmentLack, match=rf"{name} failed: cudaError\w+ \(\d+\)"):
        OPERATIONS[name](cuda)


@pytest.mark.skipif(bool(machine.gpus()), reason="there is a GPU")
def test_copying_and_opening_fail_in_the_same_way() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    with pytest.raises(EnvironmentLack, match="cudaGetDevice failed"):
        CudaPython(0)
    cuda = CudaPython.__new__(CudaPython)
    cuda._rt = runtime
    for copy in COPIES:
        with pytest.raises(EnvironmentLack, match="cudaMemcpyAsync failed"):
            copy(cuda)


class Recorder:
    """A runtime that succeeds at everything but what it is told to fail at."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers = answers
        runtime = pytest.importorskip("cuda.bindings.runtime")
        self.cudaError_t = runtime.cudaError_t
        self.cudaStreamCaptureMode = runtime.cudaStreamCaptureMode
        self.cudaMemoryType = runtime.cudaMemoryType

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            answer = self.answers.get(name, ())
            if isinstance(answer, self.cudaError_t):
                return (answer, None)
            return (self.cudaError_t.cudaSuccess, *answer)

        return call


def on(recorder: Recorder, device: int = 0) -> CudaPython:
    cuda = CudaPython.__new__(CudaPython)
    cuda._rt, cuda._device = recorder, device
    return cuda


def test_the_callers_device_is_given_back() -> None:
    recorder = Recorder(cudaGetDevice=(2,))
    with on(recorder).active():
        assert recorder.calls == [("cudaGetDevice",), ("cudaSetDevice", 0)]
    assert recorder.calls[2:] == [("cudaSetDevice", 2)]
    recorder = Recorder(cudaGetDevice=(0,))
    with pytest.raises(KeyError), on(recorder).active():
        raise KeyError
    # Set where it is the same as well: a thread new to CUDA has no context before.
    assert recorder.calls == [("cudaGetDevice",), ("cudaSetDevice", 0)]


def test_a_graph_that_cannot_be_instantiated_is_destroyed() -> None:
    codes = pytest.importorskip("cuda.bindings.runtime").cudaError_t
    bad = codes.cudaErrorMemoryAllocation
    recorder = Recorder(cudaStreamEndCapture=("graph",), cudaGraphInstantiate=bad)
    with pytest.raises(EnvironmentLack, match="cudaGraphInstantiate failed"):
        on(recorder).end_capture(1)
    assert ("cudaGraphDestroy", "graph") in recorder.calls
    recorder = Recorder(cudaStreamEndCapture=("graph",), cudaGraphInstantiate=("exec",))
    assert on(recorder).end_capture(1) == "exec"
    assert recorder.calls[-1] == ("cudaGraphDestroy", "graph")


def test_an_error_is_not_left_for_another_library_to_find() -> None:
    codes = pytest.importorskip("cuda.bindings.runtime").cudaError_t
    recorder = Recorder(cudaMalloc=codes.cudaErrorMemoryAllocation)
    with pytest.raises(
        EnvironmentLack, match=r"cudaMalloc failed: cudaErrorMemoryAllocation \(2\)"
    ):
        on(recorder).allocate(8)
    assert recorder.calls[-1] == ("cudaGetLastError",)


def test_pinned_is_what_the_driver_says_is_host_memory() -> None:
    kinds = pytest.importorskip("cuda.bindings.runtime").cudaMemoryType
    for kind, pinned in (
        (kinds.cudaMemoryTypeHost, True),
        (kinds.cudaMemoryTypeUnregistered, False),
    ):
        recorder = Recorder(cudaPointerGetAttributes=(SimpleNamespace(type=kind),))
        assert on(recorder).is_pinned(BUFFER) is pinned
        assert recorder.calls == [("cudaPointerGetAttributes", BUFFER.ctypes.data)]


def test_both_bindings_have_every_operation() -> None:
    for binding in (CudaPython, PyCuda):
        for name, function in inspect.getmembers(Cuda, inspect.isfunction):
            if name[0] != "_":
                wanted = list(inspect.signature(function).parameters)
                assert list(inspect.signature(getattr(binding, name)).parameters) == wanted


PYCUDA = {
    "": {
        "init", "Error", "Device", "Stream", "Event", "mem_get_info", "mem_alloc",
        "pagelocked_empty", "memcpy_htod_async", "memcpy_dtoh_async", "memcpy_dtod_async",
        "memset_d8_async",
    },
    "Device": {"retain_primary_context"},
    "Context": {"push", "pop", "synchronize"},
    "Stream": {"handle", "synchronize", "wait_for_event"},
    "Event": {"record", "synchronize", "time_till"},
    "DeviceAllocation": {"free", "__int__"},
    "PagelockedHostAllocation": {"free"},
}  # fmt: skip
"""Read off pycuda 2026.1, src/wrapper/wrap_cudadrv.cpp: it has no wheels to ask."""
PYCUDA_OBJECTS = {
    "driver": "", "self._driver": "", "driver.Device(device)": "Device", "self._context": "Context",
    "self._streams[stream]": "Stream", "stream": "Stream", "event": "Event", "start": "Event",
    "self._memory.pop(address)": "DeviceAllocation", "allocation": "PagelockedHostAllocation",
}  # fmt: skip


def test_pycuda_is_asked_for_what_it_has() -> None:
    used: dict[str, set[str]] = {owner: set() for owner in PYCUDA}
    for node in ast.walk(ast.parse(inspect.getsource(PyCuda))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in PYCUDA_OBJECTS:
            used[PYCUDA_OBJECTS[ast.unparse(node.value)]].add(node.attr)
    used[""].add("Error")  # what every operation is translated from
    used["DeviceAllocation"].add("__int__")
    assert used == PYCUDA


def test_what_pycuda_has_is_in_the_real_one() -> None:
    """With a driver, or with the CUDA toolkit's stub of one in LD_LIBRARY_PATH as libcuda.so.1."""
    driver = pytest.importorskip("pycuda.driver", exc_type=ImportError)
    for owner, names in PYCUDA.items():
        value = getattr(driver, owner) if owner else driver
        assert names <= set(dir(value)), owner


def test_pycuda_has_no_graphs_and_says_so() -> None:
    cuda = PyCuda.__new__(PyCuda)
    assert not cuda.graphs and CudaPython.graphs
    for call in (cuda.begin_capture, cuda.end_capture, cuda.destroy_graph):
        with pytest.raises(EnvironmentLack, match="pycuda has no CUDA graphs; leave RTRESNET_CUDA"):
            call(1)
    with pytest.raises(EnvironmentLack, match="no CUDA graphs"):
        cuda.launch(1, 1)


def test_what_pycuda_raises_is_ours_call_by_call() -> None:
    class Error(Exception):
        pass

    def lost() -> None:
        raise Error("cuStreamSynchronize failed: unspecified launch failure")

    cuda = PyCuda.__new__(PyCuda)
    cuda._driver = SimpleNamespace(Error=Error)
    cuda._streams = {1: SimpleNamespace(synchronize=lost)}
    with pytest.raises(EnvironmentLack, match="pycuda: cuStreamSynchronize failed") as caught:
        cuda.synchronize(1)
    assert caught.value.exit_code == 3 and isinstance(caught.value.__cause__, Error)
    with pytest.raises(KeyError):  # a mistake of ours stays one
        cuda.synchronize(2)


@pytest.mark.usefixtures("without_gpu")
def test_without_a_gpu_nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTRESNET_CUDA", "anything")
    with pytest.raises(EnvironmentLack, match="no CUDA device") as caught:
        open_cuda()
    assert caught.value.exit_code == 3
    assert "--device cpu" in str(caught.value)


@pytest.mark.usefixtures("with_gpu")
def test_an_unknown_binding_names_the_variable_and_the_nearest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RTRESNET_CUDA", "pycudaa")
    with pytest.raises(UnknownName, match=r"RTRESNET_CUDA.*did you mean 'pycuda'"):
        open_cuda()


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize(
    ("choice", "module", "package"),
    [("pycuda", "pycuda", "pycuda"), (None, "cuda.bindings", "cuda-python")],
)
def test_a_binding_that_is_not_installed_is_named(
    choice: str | None, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if choice is None:
        monkeypatch.delenv("RTRESNET_CUDA", raising=False)
    else:
        monkeypatch.setenv("RTRESNET_CUDA", choice)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentLack, match=f"pip install {package}$") as caught:
        open_cuda()
    assert caught.value.exit_code == 3
