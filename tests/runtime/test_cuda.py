from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rtresnet.core.errors import UnavailableError, UnknownNameError
from rtresnet.runtime import cuda as cuda_seam
from rtresnet.runtime.cuda import Cuda, CudaPython, PyCuda, open_cuda


def test_constants_equal_those_of_cuda_python() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    assert driver.CUstream_flags.CU_STREAM_NON_BLOCKING == cuda_seam.NON_BLOCKING
    assert driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC == cuda_seam.BLOCKING_SYNC
    assert driver.CUevent_flags.CU_EVENT_DISABLE_TIMING == cuda_seam.DISABLE_TIMING
    assert not driver.CUresult.CUDA_SUCCESS and driver.CUresult.CUDA_ERROR_NOT_READY
    seam = CudaPython.__new__(CudaPython)
    seam._use(driver)
    assert int(seam._host_memory) == 1 and int(seam._capture_mode) == 1


class Recorder:
    """cuda-python's driver without a device: every call has to fit the real signature.

    Args:
        answers: By function the values that it returns, or the code that it fails with.
    """

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers = answers
        self.driver = driver = pytest.importorskip("cuda.bindings.driver")
        self.CUresult = driver.CUresult
        self.CUstreamCaptureMode = driver.CUstreamCaptureMode
        self.CUpointer_attribute = driver.CUpointer_attribute
        self.CUmemorytype = driver.CUmemorytype

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        signature = inspect.signature(getattr(self.driver, name))

        def call(*arguments: Any) -> tuple[Any, ...]:
            signature.bind(*arguments)
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


def operations(cuda: Cuda) -> None:
    """Call every operation of the protocol but those of graphs."""
    stream, begin, end = cuda.stream(), cuda.event(True, False), cuda.event(False, True)
    device, host = cuda.allocate(64), cuda.allocate_pinned(64)
    cuda.to_device(device, host, 64, stream)
    cuda.on_device(device, device + 32, 32, stream)
    cuda.zero(device, 64, stream)
    cuda.to_host(host, device, 64, stream)
    cuda.record(begin, stream)
    cuda.wait(stream, begin)
    cuda.join(end)
    cuda.synchronize(stream)
    assert cuda.elapsed(begin, end) == 0.5 and cuda.memory() == (1, 2)
    assert cuda.is_pinned(device) is False
    cuda.free(device)
    cuda.free_pinned(host)
    cuda.destroy_event(begin)
    cuda.destroy_stream(stream)


def test_operations_of_cuda_python_fit_its_signatures() -> None:
    """On a stub of the driver, test_call_path.py also checks results and failures."""
    recorder = Recorder(
        cuStreamCreate=(1,), cuEventCreate=(2,), cuMemAlloc=(4096,), cuMemAllocHost=(8192,),
        cuEventElapsedTime=(0.5,), cuMemGetInfo=(1, 2), cuPointerGetAttribute=(2,),
        cuStreamEndCapture=(3,), cuGraphInstantiate=(4,), cuCtxPopCurrent=(5,),
    )  # fmt: skip
    cuda = on(recorder)
    with cuda.active():
        operations(cuda)
        cuda.begin_capture(1)
        graph = cuda.end_capture(1)
        cuda.launch(graph, 1)
        cuda.destroy_graph(graph)
    assert ("cuMemcpyDtoHAsync", 8192, 4096, 64, 1) in recorder.calls
    assert ("cuGraphLaunch", 4, 1) in recorder.calls


def test_active_restores_the_callers_context() -> None:
    recorder = Recorder(cuCtxPopCurrent=("primary",))
    with pytest.raises(KeyError), on(recorder).active():
        assert recorder.calls == [("cuCtxPushCurrent", "primary")]
        raise KeyError
    assert recorder.calls[1:] == [("cuCtxPopCurrent",)]


def test_active_failing_restore_does_not_hide_an_error() -> None:
    codes = pytest.importorskip("cuda.bindings.driver").CUresult
    recorder = Recorder(cuCtxPopCurrent=codes.CUDA_ERROR_LAUNCH_FAILED)
    with pytest.raises(KeyError), on(recorder).active():
        raise KeyError
    with pytest.raises(UnavailableError, match="cuCtxPopCurrent failed"), on(recorder).active():
        pass


def test_end_capture_failing_instantiation_destroys_the_graph() -> None:
    codes = pytest.importorskip("cuda.bindings.driver").CUresult
    bad = codes.CUDA_ERROR_OUT_OF_MEMORY
    recorder = Recorder(cuStreamEndCapture=("graph",), cuGraphInstantiate=bad)
    with pytest.raises(UnavailableError, match="cuGraphInstantiate failed"):
        on(recorder).end_capture(1)
    assert ("cuGraphDestroy", "graph") in recorder.calls
    recorder = Recorder(cuStreamEndCapture=("graph",), cuGraphInstantiate=("exec",))
    assert on(recorder).end_capture(1) == "exec"
    assert recorder.calls[-1] == ("cuGraphDestroy", "graph")


def test_is_pinned_follows_the_drivers_memory_type() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    kinds, attribute = driver.CUmemorytype, driver.CUpointer_attribute
    for answer, pinned in (
        ((kinds.CU_MEMORYTYPE_HOST,), True),
        ((kinds.CU_MEMORYTYPE_DEVICE,), False),
        (driver.CUresult.CUDA_ERROR_INVALID_VALUE, False),
    ):
        recorder = Recorder(cuPointerGetAttribute=answer)
        assert on(recorder).is_pinned(4096) is pinned
        query = ("cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, 4096)
        assert recorder.calls == [query]


def test_bindings_have_every_operation_of_the_protocol() -> None:
    cuda_python = on(Recorder())
    for name, function in inspect.getmembers(Cuda, inspect.isfunction):
        if name[0] != "_":
            expected = list(inspect.signature(function).parameters)
            assert list(inspect.signature(getattr(PyCuda, name)).parameters) == expected
            assert callable(getattr(cuda_python, name))  # `Recorder` checks the arguments


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
"""Names of pycuda 2026.1 from src/wrapper/wrap_cudadrv.cpp, because it has no wheels."""


class PycudaObject:
    """An object of the stand-in for pycuda, and what is used of it.

    Args:
        used: Receives the names that are read, by class.
        owner: A key of PYCUDA.
        members: What it has.
    """

    def __init__(self, used: dict[str, set[str]], owner: str, **members: Any) -> None:
        self._used, self._owner, self._members = used, owner, members

    def __getattr__(self, name: str) -> Any:
        if name not in PYCUDA[self._owner]:
            raise AttributeError(f"pycuda's {self._owner or 'driver'} has no {name}")
        self._used[self._owner].add(name)
        return self._members.get(name, lambda *arguments: None)

    def __int__(self) -> int:
        return int(self.__getattr__("__int__")())


def test_operations_of_pycuda_use_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, set[str]] = {owner: set() for owner in PYCUDA}
    new = partial(PycudaObject, used)
    context = new("Context")
    page_locked = SimpleNamespace(
        __array_interface__={"data": (np.zeros(64, np.uint8).ctypes.data, False)},
        base=new("PagelockedHostAllocation"),
    )
    driver = new(
        "",
        Error=type("Error", (Exception,), {}),
        Device=lambda number: new("Device", retain_primary_context=lambda: context),
        Stream=lambda flags: new("Stream", handle=7),
        Event=lambda flags: new("Event", time_till=lambda stop: 0.5),
        mem_get_info=lambda: (1, 2),
        mem_alloc=lambda size: new("DeviceAllocation", __int__=lambda: 4096),
        pagelocked_empty=lambda size, dtype: page_locked,
    )
    monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    cuda = PyCuda(0)
    with cuda.active():
        operations(cuda)
        cuda.record(cuda.event(False, False), 1)  # another library's stream
        monkeypatch.setattr(driver, "_members", driver._members | {"mem_get_info": None})
        with pytest.raises(TypeError):  # an operation that fails asks for pycuda's Error
            cuda.memory()
    assert used == PYCUDA


def test_names_of_pycuda_are_in_the_real_module() -> None:
    """With a driver, or with the CUDA toolkit's stub of one in LD_LIBRARY_PATH as libcuda.so.1."""
    driver = pytest.importorskip("pycuda.driver", exc_type=ImportError)
    for owner, names in PYCUDA.items():
        value = getattr(driver, owner) if owner else driver
        assert names <= set(dir(value)), owner


def test_graphs_of_pycuda_raise() -> None:
    cuda = PyCuda.__new__(PyCuda)
    assert not cuda.graphs and CudaPython.graphs
    for call in (cuda.begin_capture, cuda.end_capture, cuda.destroy_graph):
        with pytest.raises(UnavailableError, match=r"pycuda .*CUDA graphs; .*RTRESNET_CUDA"):
            call(1)
    with pytest.raises(UnavailableError, match="no CUDA graphs"):
        cuda.launch(1, 1)


def test_errors_of_pycuda_become_unavailable_errors() -> None:
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
def test_open_cuda_without_a_gpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTRESNET_CUDA", "anything")
    with pytest.raises(UnavailableError, match="no CUDA device") as caught:
        open_cuda()
    assert caught.value.exit_code == 3
    assert "--device cpu" in str(caught.value)


@pytest.mark.usefixtures("with_gpu")
def test_open_cuda_unknown_binding_suggests_the_nearest(
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
def test_open_cuda_missing_binding_names_its_package(
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
