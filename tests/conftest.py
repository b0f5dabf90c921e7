"""Fixtures for all tests: small images, a trained small net, and its artifacts."""

from __future__ import annotations

import os

# Threads that spin while they wait take the cores of other processes; read when OpenMP starts.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has one core, and so its libraries
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from rtresnet.cli.main import main
from rtresnet.core.hardware import Gpu

# A shell that starts the tests in the background ignores SIGINT for them and for the processes
# they start, but Ctrl-C is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW = 10  # seconds from which a test needs the marker


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the tests that took long and are not marked as slow."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    late = [r for r in reports if r.duration > SLOW and "slow" not in r.keywords]
    if late:
        terminalreporter.section(f"over {SLOW} s without the marker `slow`")
    for report in late:
        terminalreporter.line(f"{report.duration:.1f}s {report.when} {report.nodeid}")


@pytest.fixture(autouse=True)
def _gpu_alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Tests of the GPU take turns, whichever workers they run on: some look at all its memory."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    with FileLock(tmp_path_factory.getbasetemp().parent / "gpu.lock"):
        yield


def tinted_noise(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return noise with a tint (red, green, blue, grey), which a small net learns quickly."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (count, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(count) % 4
    for image, label in zip(images, labels, strict=True):
        image[..., slice(None) if label == 3 else label] += 110
    return images, labels


@pytest.fixture(scope="session")
def tints(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An npz data set of 240 images in four classes, as `--data` takes it."""
    path = tmp_path_factory.mktemp("data") / "tints.npz"
    images, labels = tinted_noise(240)
    np.savez(path, images=images, labels=labels)
    return f"npz:{path}"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tints: str) -> Path:
    """The run folder of a ResNet-8 trained on `tints`."""
    out = tmp_path_factory.mktemp("run") / "tints"
    arguments = ["--model", "resnet8", "--data", tints, "--epochs", "4", "--out", str(out)]
    assert main(["train", *arguments]) == 0
    return out


@pytest.fixture
def copied(engines: Path, tmp_path: Path) -> Path:
    """Return a copy of `engines`, which a test may change."""
    return shutil.copytree(engines, tmp_path / "engines")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory, trained: Path, tints: str) -> Path:
    """A folder with the trained net's ONNX files in three precisions, and plans if there is RTX."""
    folder = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # calib/ and engines/ are relative to where a person stands
        weights = ["--weights", str(trained / "best.pt")]
        assert main(["export", *weights, "--fp32", "--fp16", "--int8", "--calib", tints]) == 0
    return folder / "engines"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from the cache of the person who runs the tests, nor written to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RTRESNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def brief_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench` and `profile` warm up, and measure the roof, for an instant instead of seconds."""
    monkeypatch.setattr("rtresnet.bench.workload.CAP_SECONDS", 0.2)
    monkeypatch.setattr("rtresnet.bench.roofline.SECONDS", 0.01)
    monkeypatch.setattr("rtresnet.bench.roofline.SIDES", (64,))
    monkeypatch.setattr("rtresnet.bench.roofline.COPY", 1 << 20)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtresnet.core.hardware.gpus", tuple)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The GPU that this machine pretends to have."""
    gpu = Gpu(name="Test GPU", capability=(8, 9), memory=1 << 30)
    monkeypatch.setattr("rtresnet.core.hardware.gpus", lambda: (gpu,))
    return gpu


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """disk_of("64k"): a real file system of that size, where mounting is permitted."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        if shutil.which("mount") is None or os.sysconf("SC_PAGE_SIZE") != 4096:
            pytest.skip("no mount command, or pages of another size")
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def small_disk(disk_of: Callable[[str], Path]) -> Path:
    """A real file system of 64 KiB: sixteen pages of 4 KiB."""
    return disk_of("64k")


@pytest.fixture
def interrupt_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """interrupt_in(3): Ctrl-C comes while the third step from now is computed; it comes once."""

    def arrange(step: int) -> None:
        from rtresnet.training.step import Stepper

        original, done = Stepper.step, 0

        def stepping(self: object, *arguments: object) -> object:
            nonlocal done
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Stepper, "step", stepping)

    return arrange


def as_foreign(path: str | Path) -> Path:
    """Remove what an ONNX file of ours says of itself: as if another tool had written it."""
    import onnx

    path = Path(path)
    model = onnx.load(path)
    onnx.save(undescribed(model), path)
    return path


def undescribed(model: Any) -> Any:
    """Return a model without the description that every step writes into it."""
    others = [entry for entry in model.metadata_props if entry.key != "rtresnet.model"]
    del model.metadata_props[:]
    model.metadata_props.extend(others)
    return model
