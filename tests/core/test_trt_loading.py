from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rtresnet.builder import targets
from rtresnet.core import hardware, trt_loading
from rtresnet.core.errors import InputError, UnavailableError
from rtresnet.runtime.trt import TrtBackend

MISSING = "libnvinfer.so.11: cannot open shared object file: No such file or directory"
# As TensorRT words it on a machine whose driver is for CUDA 12.
OLD_DRIVER = (
    "createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure with error: "
    "35. Please check your CUDA installation: http://docs.nvidia.com/cuda)"
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """package("tensorrt", "raise OSError()"): a package of that name, whose import runs this."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, body: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(body)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


@pytest.mark.parametrize("kind", ["ImportError", "OSError"])
@pytest.mark.parametrize("module", sorted(trt_loading.MODULES))
def test_load_tensorrt_without_its_library_says_which(
    module: str, kind: str, package: Callable[[str, str], None]
) -> None:
    package(module, f"raise {kind}({MISSING!r})")
    with pytest.raises(UnavailableError, match=r"libnvinfer\.so\.11") as caught:
        trt_loading.load_tensorrt(module)
    assert caught.value.exit_code == 3
    distribution = hardware.DISTRIBUTIONS[module]
    assert caught.value.fix == f"pip install --force-reinstall {distribution}"


def test_load_tensorrt_not_installed_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "installed", lambda module: False)
    with pytest.raises(UnavailableError) as caught:
        trt_loading.load_tensorrt("tensorrt")
    assert caught.value.fix == "pip install tensorrt-cu13"


def test_load_tensorrt_imports_no_other_module() -> None:
    with pytest.raises(InputError, match="antigravity"):
        trt_loading.load_tensorrt("antigravity")
    assert "antigravity" not in sys.modules


def test_load_tensorrt_interrupted_during_the_import_stays_an_interrupt(
    package: Callable[[str, str], None],
) -> None:
    package("tensorrt", "raise ImportError('core') from KeyboardInterrupt()")
    with pytest.raises(ImportError):
        trt_loading.load_tensorrt("tensorrt")


@pytest.mark.usefixtures("with_gpu")
def test_builder_and_backend_without_a_library_are_a_lack_of_the_environment(
    package: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package("tensorrt", f"raise ImportError({MISSING!r})")
    package("tensorrt_rtx", f"raise ImportError({MISSING!r})")
    monkeypatch.setattr("rtresnet.runtime.trt_plan.open_cuda", lambda: None)
    for call in (
        lambda: targets.builder("tensorrt"),
        lambda: targets.builder("rtx"),
        lambda: TrtBackend(tmp_path / "net.plan", None),
    ):
        with pytest.raises(UnavailableError, match=r"libnvinfer\.so\.11") as caught:
            call()
        assert caught.value.exit_code == 3


def factory(error: Exception) -> Any:
    def fail(logger: object) -> None:
        raise error

    return SimpleNamespace(__name__="tensorrt", __version__="11.4.0", Builder=fail)


def test_create_returning_nullptr_tells_what_was_logged() -> None:
    trt = factory(TypeError("pybind11::init(): factory function returned nullptr"))
    with pytest.raises(
        UnavailableError, match=r"TensorRT 11\.4\.0 cannot create a Builder"
    ) as observed:
        trt_loading.create(trt, "Builder", None, lambda: OLD_DRIVER)
    assert observed.value.exit_code == 3
    assert OLD_DRIVER in observed.value.message
    assert observed.value.fix is not None and "r580" in observed.value.fix


def test_create_with_another_type_error_raises_it() -> None:
    with pytest.raises(TypeError, match="incompatible"):
        trt_loading.create(factory(TypeError("incompatible function arguments")), "Builder", 1, str)


@pytest.mark.usefixtures("without_gpu")
def test_tensorrt_without_a_device_is_refused_before_it_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a device some of its calls end the process."""

    def untouched(module: str) -> None:
        raise AssertionError(f"{module} was imported")

    monkeypatch.setattr(hardware, "installed", lambda module: True)
    monkeypatch.setattr(trt_loading, "load_tensorrt", untouched)
    with pytest.raises(UnavailableError, match="this machine has none"):
        targets.builder("tensorrt")
    with pytest.raises(UnavailableError, match="no CUDA device"):
        TrtBackend(Path("net.plan"), None)


@pytest.mark.parametrize(
    ("message", "too_old"),
    [
        ("cudaGetDevice failed: cudaErrorInsufficientDriver (35)", True),
        ("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version", True),
        (OLD_DRIVER, True),
        ("cudaMalloc failed: cudaErrorMemoryAllocation (2)", False),
        ("CUDA failure 350: ", False),
    ],
)
def test_driver_fix_knows_a_driver_that_is_too_old(message: str, too_old: bool) -> None:
    assert (hardware.driver_fix(message) is not None) == too_old


@pytest.mark.parametrize(("cuda", "too_old"), [((12, 4), True), ((13, 0), False), (None, False)])
def test_driver_fix_without_a_message_asks_the_driver(
    cuda: tuple[int, int] | None, too_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cuda_version", lambda: cuda)
    assert (hardware.driver_fix() is not None) == too_old
