"""ONNX Runtime's GPU package on a machine without a GPU: import, options, error classification.

`make test-slow` installs it into .venv/onnxruntime-gpu, and only these tests look there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(sys.prefix) / "onnxruntime-gpu"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BUILD / "onnxruntime").is_dir(), reason=f"no onnxruntime-gpu in {BUILD}"
    ),
]
# The real package is asked for its CUDA provider as if there were a GPU.
AS_IF = """
import sys
from rtresnet.core import hardware
gpu = hardware.Gpu(name="Test GPU", capability=(8, 9), memory=1 << 30)
hardware.gpus = lambda: (gpu,)
from rtresnet.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(BUILD), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", AS_IF, *map(str, arguments)], text=True, capture_output=True,
        check=False, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--no-tf32"]])
def test_cuda_provider_that_cannot_load_is_one_line_and_exit_code_3(
    options: list[str], engines: Path
) -> None:
    file = engines / "resnet8.onnx"
    done = run("bench", file, "--provider", "cuda", *options, "--queries", "3")
    assert done.returncode == 3, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert "CUDA" in errors[0]


def test_its_cpu_provider_runs_and_is_named(engines: Path) -> None:
    done = run("bench", engines / "resnet8.onnx", "--provider", "cpu", "--queries", "3")
    assert done.returncode == 0, done.stderr
    assert "onnxruntime-gpu" in done.stdout
