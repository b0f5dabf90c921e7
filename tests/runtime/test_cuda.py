from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import numpy as np
import pytest

from rtresnet import machine
from rtresnet.errors import EnvironmentLack, UnknownName
from rtresnet.runtime.cuda import CudaPython, open_cuda

CALLS = {
    "cudaSetDevice": 1,
    "cudaStreamCreate": 0,
    "cudaStreamSynchronize": 1,
    "cudaStreamDestroy": 1,
    "cudaEventCreate": 0,
    "cudaEventRecord": 2,
    "cudaEventElapsedTime": 2,
    "cudaEventDestroy": 1,
    "cudaMalloc": 1,
    "cudaFree": 1,
    "cudaMallocHost": 1,
    "cudaFreeHost": 1,
    "cudaMemcpyAsync": 5,
}
BUFFER = np.zeros(8, np.uint8)
OPERATIONS: dict[str, Callable[[CudaPython], object]] = {
    "cudaStreamCreate": lambda cuda: cuda.stream(),
    "cudaStreamSynchronize": lambda cuda: cuda.synchronize(1),
    "cudaStreamDestroy": lambda cuda: cuda.destroy_stream(1),
    "cudaEventCreate": lambda cuda: cuda.event(),
    "cudaEventRecord": lambda cuda: cuda.record(1, 1),
    "cudaEventElapsedTime": lambda cuda: cuda.elapsed(1, 2),
    "cudaEventDestroy": lambda cuda: cuda.destroy_event(1),
    "cudaMalloc": lambda cuda: cuda.allocate(8),
    "cudaFree": lambda cuda: cuda.free(1),
    "cudaMallocHost": lambda cuda: cuda.allocate_pinned(8),
    "cudaFreeHost": lambda cuda: cuda.free_pinned(BUFFER),
    "cudaMemcpyAsync": lambda cuda: cuda.to_device(1, BUFFER, 8, 1),
}


@pytest.mark.parametrize(("name", "arity"), CALLS.items())
def test_a_call_exists_in_cuda_python_with_the_arity_used(name: str, arity: int) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    inspect.signature(getattr(runtime, name)).bind(*range(arity))


def test_the_table_of_calls_is_complete() -> None:
    source = inspect.getsource(CudaPython)
    assert {part.split('"')[0] for part in source.split('_call("')[1:]} == set(CALLS)
    assert set(OPERATIONS) == set(CALLS) - {"cudaSetDevice"}


def test_the_constants_exist_in_cuda_python() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    assert int(runtime.cudaError_t.cudaSuccess) == 0
    assert runtime.cudaMemcpyKind.cudaMemcpyHostToDevice == 1
    assert runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost == 2


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
def test_copying_back_and_opening_fail_in_the_same_way() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    with pytest.raises(EnvironmentLack, match="cudaSetDevice failed"):
        CudaPython(0)
    cuda = CudaPython.__new__(CudaPython)
    cuda._rt = runtime
    with pytest.raises(EnvironmentLack, match="cudaMemcpyAsync failed"):
        cuda.to_host(BUFFER, 1, 8, 1)


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
