"""Install the wheel without extras, and resolve its extras for other machines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import rtresnet
from rtresnet.cli.commands import SUMMARIES

tomllib = pytest.importorskip("tomllib")  # Python 3.10 has none
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LEFT_OUT = (
    ".git",
    ".venv*",
    ".*_cache",
    "*.egg-info",
    "__pycache__",
    "/build",
    "dist",
    "site",
    "runs",
)
pytestmark = pytest.mark.slow

# Prints nothing and fails on a difference: the bare environment has no pytest.
SERVE = """
import importlib.util, sys
import numpy as np
import rtresnet
for name in ("torch", "onnx", "matplotlib", "sklearn", "safetensors"):
    assert importlib.util.find_spec(name) is None, name
images = np.load(sys.argv[1])
for path in sys.argv[2:]:
    with rtresnet.load(path, provider="cpu") as session:
        np.save(path + ".npy", session(session.prepare(images)))
        print(session.info.cpu_note)
"""


def run(
    *command: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command outside the checkout, without its PYTHONPATH."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), cwd="/", env=clean | (env or {}), capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for kind in ("wheel", "sdist"):
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory, distributions: Path) -> Path:
    """The scripts folder of an environment with the base package and onnxruntime."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    wheel = next(distributions.glob("*.whl"))
    done = run(
        folder / "bin/python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt",
        wheel, "onnxruntime",
    )  # fmt: skip
    if "Could not find a version" in done.stderr or "Max retries" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def test_wheel_has_the_version_the_license_and_all_data_files(distributions: Path) -> None:
    wheel = next(distributions.glob("*.whl"))
    assert wheel.name == f"rtresnet-{rtresnet.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        head = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in head
    assert any(name.endswith("licenses/LICENSE") for name in names)
    data = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "rtresnet").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert data <= names


def test_sdist_has_every_test_file(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert tests | {"Makefile", "constraints.txt", "README.md", "LICENSE"} <= names


def test_base_install_serves_fp32_and_int8_with_onnxruntime_alone(
    bare: Path, engines: Path, tints: str, tmp_path: Path
) -> None:
    images = np.load(tints.removeprefix("npz:"))["images"][:32]
    np.save(tmp_path / "images.npy", images)
    expected, paths = [], []
    for path in sorted(engines.glob("*.onnx")):
        for name in (path.name, f"{path.name}.json"):
            shutil.copy(path.with_name(name), tmp_path / name)
        paths.append(tmp_path / path.name)
        with rtresnet.load(path, provider="cpu") as session:
            expected.append(session(session.prepare(images)))
    assert any("int8" in path.name for path in paths) and len(paths) >= 3
    done = run(bare / "python", "-c", SERVE, tmp_path / "images.npy", *paths)
    assert done.returncode == 0, done.stderr
    for path, logits, note in zip(paths, expected, done.stdout.splitlines(), strict=True):
        served = np.load(f"{path}.npy")
        error = np.linalg.norm(served - logits) / np.linalg.norm(logits)
        assert error < (0.05 if "int8" in path.name else 1e-5), path.name
        assert np.array_equal(served.argmax(1), logits.argmax(1))
        assert ("rtresnet[export]" in note) == ("int8" in path.name)


def test_base_install_evaluates_and_predicts(
    bare: Path, engines: Path, tints: str, tmp_path: Path
) -> None:
    from PIL import Image

    image = tmp_path / "image.png"
    Image.fromarray(np.load(tints.removeprefix("npz:"))["images"][0]).save(image)
    for path in engines.glob("*.onnx"):
        for command in (["eval", path, "--data", tints], ["predict", path, image]):
            done = run(bare / "rtresnet", *command)
            assert done.returncode == 0, done.stderr


def test_base_install_shows_help_of_every_command(bare: Path) -> None:
    for command in SUMMARIES:
        done = run(bare / "rtresnet", command, "--help")
        assert done.returncode == 0 and "Usage" in done.stdout, (command, done.stderr)


@pytest.mark.parametrize(("arguments", "extra"), [
    (["train"], "train"),
    (["export", "--weights", "untrained", "--model", "resnet8"], "train"),
    (["lint", "{fp32}"], "export"),
    (["quantize", "{fp32}", "--fp16"], "export"),
])  # fmt: skip
def test_base_install_missing_package_names_the_extra(
    bare: Path, engines: Path, arguments: list[str], extra: str
) -> None:
    fp32 = next(path for path in engines.glob("*.onnx") if "-" not in path.name)
    done = run(bare / "rtresnet", *(part.format(fp32=fp32) for part in arguments))
    assert done.returncode == 3, done.stderr
    assert f"pip install 'rtresnet[{extra}]'" in done.stderr


MANYLINUX = ("2014", *(f"_2_{minor}" for minor in (17, 24, 26, 27, 28, 31, 34, 35)))
MACHINES = {
    "linux-x86_64": ("linux", "x86_64", [f"manylinux{tag}_x86_64" for tag in MANYLINUX]),
    "linux-aarch64": ("linux", "aarch64", [f"manylinux{tag}_aarch64" for tag in MANYLINUX]),
    "macos-arm64": ("darwin", "arm64", [f"macosx_{major}_0_arm64" for major in range(11, 16)]),
}


def requirements(extra: str, environment: dict[str, str]) -> list[str]:
    """Return an extra's requirements on another machine; pip takes the markers of its own."""
    entries = map(Requirement, PROJECT["optional-dependencies"][extra])
    return [
        str(entry).partition(";")[0]
        for entry in entries
        if entry.marker is None or entry.marker.evaluate(environment)
    ]


@pytest.mark.parametrize("python", ["3.10", "3.13"])
@pytest.mark.parametrize("machine", MACHINES)
def test_base_and_cpu_extra_have_wheels_for_machine(
    bare: Path, tmp_path: Path, machine: str, python: str
) -> None:
    system, processor, tags = MACHINES[machine]
    environment = {"sys_platform": system, "platform_machine": processor, "python_version": python}
    needed = [*PROJECT["dependencies"], *requirements("cpu", environment)]
    assert ("onnxruntime-ep-openvino>=1.8" in needed) == (machine == "linux-x86_64")
    done = run(
        bare / "python", "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed",
        "--only-binary=:all:", "--target", tmp_path, "--python-version", python,
        *(f"--platform={tag}" for tag in tags), *needed,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
