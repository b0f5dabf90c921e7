from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stub_gpu

from rtresnet.core.errors import UnavailableError
from rtresnet.runtime import gpu_check
from rtresnet.workflows import doctor_gpu


class Code(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_UNKNOWN = 999


class FakeDriver:
    """The functions of `cuda.bindings.driver` that are called, on host memory.

    Args:
        broken: The function that fails.
        lossy: Whether copies to the host lose a byte.
    """

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUpointer_attribute = SimpleNamespace(CU_POINTER_ATTRIBUTE_MEMORY_TYPE=2)
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_HOST=1)

    def __init__(self, broken: str = "", lossy: bool = False) -> None:
        self.broken, self.lossy = broken, lossy
        self.live: Counter[str] = Counter()
        self.memory: dict[int, Any] = {}
        self.captured: list[Any] | None = None
        self.graph: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name == self.broken:
                return (Code.CUDA_ERROR_UNKNOWN,)
            return (Code.CUDA_SUCCESS, *self._results(name, arguments))

        return call

    def _results(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        for create, destroy in (("Create", "Destroy"), ("Alloc", "Free"), ("Push", "Pop")):
            if create in name:
                self.live[name.replace(create, "").replace("Current", "")] += 1
            if destroy in name:
                self.live[name.replace(destroy, "").replace("Current", "")] -= 1
        if name in ("cuMemAlloc", "cuMemAllocHost"):
            buffer = ctypes.create_string_buffer(arguments[0])
            self.memory[ctypes.addressof(buffer)] = buffer
            return (ctypes.addressof(buffer),)
        if name == "cuStreamBeginCapture":
            self.captured = []
            return ()
        if name == "cuStreamEndCapture":
            self.graph, self.captured = self.captured or [], None
            return ("graph",)
        if name == "cuGraphLaunch":
            for work in self.graph:
                work()
            return ()
        if name.startswith(("cuMemcpy", "cuMemset")):
            work = lambda: self._copy(name, *arguments)  # noqa: E731
            self.captured.append(work) if self.captured is not None else work()
            return ()
        values = {
            "cuMemGetInfo": (3, 4), "cuEventElapsedTime": (0.5,), "cuPointerGetAttribute": (1,),
            "cuGraphInstantiate": ("ready",), "cuStreamCreate": (11,),
        }  # fmt: skip
        made = ("Create", "Get", "Retain", "PopCurrent")
        return values.get(name) or (("handle",) if any(part in name for part in made) else ())

    def _copy(self, name: str, target: int, source: int, size: int, stream: Any) -> None:
        if name == "cuMemsetD8Async":
            ctypes.memset(target, source, size)
        else:
            ctypes.memmove(target, source, size - (self.lossy and name == "cuMemcpyDtoHAsync"))


def test_check_cuda_with_a_working_driver_is_ok_and_frees_everything() -> None:
    driver = FakeDriver()
    assert set(gpu_check.check_cuda(driver).values()) == {"ok"}
    assert not +driver.live, driver.live


@pytest.mark.parametrize(
    ("broken", "groups"),
    [
        ("cuMemAllocHost", {"copies, pinned", "capture"}),
        ("cuStreamWaitEvent", {"events"}),
        ("cuGraphInstantiate", {"capture"}),
        ("cuMemGetInfo", {"memory info"}),
    ],
)
def test_check_cuda_reports_every_group_next_to_a_broken_call(
    broken: str, groups: set[str]
) -> None:
    driver = FakeDriver(broken)
    checks = gpu_check.check_cuda(driver)
    assert {name for name, state in checks.items() if state != "ok"} == groups
    assert all(broken in checks[name] and "999" in checks[name] for name in groups)
    assert not +driver.live, driver.live


def test_check_cuda_finds_a_copy_that_loses_a_byte() -> None:
    checks = gpu_check.check_cuda(FakeDriver(lossy=True))
    wrong = {name for name, state in checks.items() if state != "ok"}
    assert wrong == {"copies, pageable", "copies, pinned", "capture"}


def test_check_cuda_without_a_context_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match="cuInit"):
        gpu_check.check_cuda(FakeDriver("cuInit"))


def test_check_driver_without_a_driver_has_a_reason(without_gpu: None) -> None:
    report = doctor_gpu.check_driver()
    assert report.devices == () and report.reason


def test_check_cuda_with_the_real_bindings_on_a_stub_is_ok(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver")
    if shutil.which(stub_gpu.COMPILER) is None:
        pytest.skip(f"no {stub_gpu.COMPILER} to compile the stub with")
    library = stub_gpu.compile_stub(tmp_path)
    code = (
        "import json; from rtresnet.core.serialization import to_builtins; "
        "from rtresnet.workflows import doctor_gpu; "
        "print(json.dumps(to_builtins([doctor_gpu.check_driver(), doctor_gpu.check_cuda()])))"
    )
    variables = os.environ | {
        "LD_LIBRARY_PATH": str(library.parent),
        "PYTHONPATH": str(Path(gpu_check.__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report, outcome = json.loads(done.stdout)
    assert [device["name"] for device in report["devices"]] == ["Stub GPU"]
    assert set(outcome["operations"].values()) == {"ok"}
