"""The tests of `pytest -m gpu`, collected without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def test_gpu_tests_of_plans_run_with_each_builder() -> None:
    command = [
        sys.executable, "-m", "pytest", "--collect-only", "-m", "gpu",
        str(FOLDER / "runtime/test_gpu.py"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    collected = [line for line in done.stdout.splitlines() if "::test_" in line]
    for test in (
        "test_check_of_a_plan_passes", "test_timeline_large_batch_copies_overlap_computation",
    ):  # fmt: skip
        ids = [line for line in collected if test in line]
        tensorrt = [line for line in ids if "tensorrt" in line]
        rtx = [line for line in ids if "rtx" in line]
        assert tensorrt and len(tensorrt) == len(rtx) == len(ids) / 2, ids
