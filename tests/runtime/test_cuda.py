from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rtresnet.core.errors import UnavailableError, UnknownNameError
from rtresnet.runtime import cuda as cuda_seam
from rtresnet.runtime.cuda import Cuda, CudaPython, PyCuda, open_cuda

CALLS = {
    "cuInit": 1,
    "cuDeviceGet": 1,
    "cuDevicePrimaryCtxRetain": 1,
    "cuCtxPushCurrent": 1,
    "cuCtxPopCurrent": 0,
    "cuMemGetInfo": 0,
    "cuStreamCreate": 1,
    "cuStreamSynchronize": 1,
    "cuStreamDestroy": 1,
    "cuEventCreate": 1,
    "cuEventRecord": 2,
    "cuStreamWaitEvent": 3,
    "cuEventSynchronize": 1,
    "cuEventElapsedTime": 2,
    "cuEventDestroy": 1,
    "cuMemAlloc": 1,
    "cuMemFree": 1,
    "cuMemAllocHost": 1,
    "cuMemFreeHost": 1,
    "cuPointerGetAttribute": 2,
    "cuMemcpyHtoDAsync": 4,
    "cuMemcpyDtoHAsync": 4,
    "cuMemcpyDtoDAsync": 4,
    "cuMemsetD8Async": 4,
    "cuStreamBeginCapture": 2,
    "cuStreamEndCapture": 1,
    "cuGraphInstantiate": 2,
    "cuGraphLaunch": 2,
    "cuGraphExecDestroy": 1,
    "cuGraphDestroy": 1,
}
"""What is called of cuda-python; that the calls succeed and fail as they should is in
test_call_path.py, on a stub of the driver."""


@pytest.mark.parametrize(("name", "arity"), CALLS.items())
def test_a_call_exists_in_cuda_python_with_the_arity_used(name: str, arity: int) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    inspect.signature(getattr(driver, name)).bind(*range(arity))


def test_the_table_of_calls_is_complete() -> None:
    names = set(re.findall(r"\bcu[A-Z]\w+", inspect.getsource(CudaPython)))
    assert names == set(CALLS)


def test_the_constants_are_those_of_cuda_python() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    assert driver.CUstream_flags.CU_STREAM_NON_BLOCKING == cuda_seam.NON_BLOCKING
    assert driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC == cuda_seam.BLOCKING_SYNC
    assert driver.CUevent_flags.CU_EVENT_DISABLE_TIMING == cuda_seam.DISABLE_TIMING
    assert not driver.CUresult.CUDA_SUCCESS and driver.CUresult.CUDA_ERROR_NOT_READY
    seam = CudaPython.__new__(CudaPython)
    seam._use(driver)
    assert int(seam._host_memory) == 1 and int(seam._capture_mode) == 1


class Recorder:
    """A driver that succeeds at everything but what it is told to fail at."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers = answers
        driver = pytest.importorskip("cuda.bindings.driver")
        self.CUresult = driver.CUresult
        self.CUstreamCaptureMode = driver.CUstreamCaptureMode
        self.CUpointer_attribute = driver.CUpointer_attribute
        self.CUmemorytype = driver.CUmemorytype

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            answer = self.answers.get(name, ())
            if isinstance(answer, self.CUresult):
                return (answer, None)
            return (self.CUresult.CUDA_SUCCESS, *answer)

        return call


def on(recorder: Recorder) -> CudaPython:
    cuda = CudaPython.__new__(CudaPython)
    cuda._use(recorder)
    cuda._context = "primary"
    return cuda


def test_the_callers_context_is_given_back() -> None:
    recorder = Recorder(cuCtxPopCurrent=("primary",))
    with pytest.raises(KeyError), on(recorder).active():
        assert recorder.calls == [("cuCtxPushCurrent", "primary")]
        raise KeyError
    assert recorder.calls[1:] == [("cuCtxPopCurrent",)]


def test_a_context_that_cannot_be_given_back_does_not_hide_a_failure() -> None:
    codes = pytest.importorskip("cuda.bindings.driver").CUresult
    recorder = Recorder(cuCtxPopCurrent=codes.CUDA_ERROR_LAUNCH_FAILED)
    with pytest.raises(KeyError), on(recorder).active():
        raise KeyError
    with pytest.raises(UnavailableError, match="cuCtxPopCurrent failed"), on(recorder).active():
        pass


def test_a_graph_that_cannot_be_instantiated_is_destroyed() -> None:
    codes = pytest.importorskip("cuda.bindings.driver").CUresult
    bad = codes.CUDA_ERROR_OUT_OF_MEMORY
    recorder = Recorder(cuStreamEndCapture=("graph",), cuGraphInstantiate=bad)
    with pytest.raises(UnavailableError, match="cuGraphInstantiate failed"):
        on(recorder).end_capture(1)
    assert ("cuGraphDestroy", "graph") in recorder.calls
    recorder = Recorder(cuStreamEndCapture=("graph",), cuGraphInstantiate=("exec",))
    assert on(recorder).end_capture(1) == "exec"
    assert recorder.calls[-1] == ("cuGraphDestroy", "graph")


def test_pinned_is_what_the_driver_says_is_host_memory() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    kinds, attribute = driver.CUmemorytype, driver.CUpointer_attribute
    for answer, pinned in (
        ((kinds.CU_MEMORYTYPE_HOST,), True),
        ((kinds.CU_MEMORYTYPE_DEVICE,), False),
        (driver.CUresult.CUDA_ERROR_INVALID_VALUE, False),
    ):
        recorder = Recorder(cuPointerGetAttribute=answer)
        assert on(recorder).is_pinned(4096) is pinned
        asked = ("cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, 4096)
        assert recorder.calls == [asked]


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
        with pytest.raises(
            UnavailableError, match="pycuda has no CUDA graphs; leave RTRESNET_CUDA"
        ):
            call(1)
    with pytest.raises(UnavailableError, match="no CUDA graphs"):
        cuda.launch(1, 1)


def test_what_pycuda_raises_is_ours_call_by_call() -> None:
    class Error(Exception):
        pass

    def lost() -> None:
        raise Error("cuStreamSynchronize failed: unspecified launch failure")

    cuda = PyCuda.__new__(PyCuda)
    cuda._driver = SimpleNamespace(Error=Error)
    cuda._streams = {1: SimpleNamespace(synchronize=lost)}
    with pytest.raises(UnavailableError, match="pycuda: cuStreamSynchronize failed") as caught:
        cuda.synchronize(1)
    assert caught.value.exit_code == 3 and isinstance(caught.value.__cause__, Error)
    with pytest.raises(KeyError):  # a mistake of ours stays one
        cuda.synchronize(2)


@pytest.mark.usefixtures("without_gpu")
def test_without_a_gpu_nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTRESNET_CUDA", "anything")
    with pytest.raises(UnavailableError, match="no CUDA device") as caught:
        open_cuda()
    assert caught.value.exit_code == 3
    assert "--device cpu" in str(caught.value)


@pytest.mark.usefixtures("with_gpu")
def test_an_unknown_binding_names_the_variable_and_the_nearest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RTRESNET_CUDA", "pycudaa")
    with pytest.raises(UnknownNameError, match=r"RTRESNET_CUDA.*did you mean 'pycuda'"):
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
    with pytest.raises(UnavailableError, match=f"pip install {package}$") as caught:
        open_cuda()
    assert caught.value.exit_code == 3
