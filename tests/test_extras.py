"""Extras install only packages from PyPI, and all that their commands need."""

from __future__ import annotations

from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.10 has none
ROOT = Path(__file__).parent.parent


def packages(extra: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {line.partition(">")[0] for line in project["optional-dependencies"][extra]}


def test_extra_gpu_brings_the_cuda_libraries_and_no_tensorrt() -> None:
    assert packages("gpu") == {"onnxruntime-gpu[cuda,cudnn]", "cuda-python", "nvidia-ml-py"}


def test_only_extra_trt_needs_the_package_index_of_nvidia() -> None:
    assert "tensorrt-cu13" in packages("trt")


@pytest.mark.parametrize("extra", ["rtx", "trt", "gpu"])
def test_extras_for_gpus_can_watch_the_gpu(extra: str) -> None:
    assert {"cuda-python", "nvidia-ml-py"} <= packages(extra)
