from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from rtresnet.core import isolated
from rtresnet.core.isolated import StepResult, run_step

PREFACE = """
import ctypes, os, sys, time
from rtresnet.core.isolated import StepFailed, StepSkipped, report_step
def step():
    {}
report_step(step)
"""


def ran(code: str, folder: Path, timeout: float = 20.0, after: str = "") -> StepResult:
    """Return the result of a step with this body, and of code that follows it in its process."""
    command = [sys.executable, "-c", PREFACE.format(code) + after]
    root = str(Path(isolated.__file__).parents[1])
    return run_step("x", command, timeout=timeout, logs=folder, environment={"PYTHONPATH": root})


def test_run_step_returns_what_the_step_measured(tmp_path: Path) -> None:
    code = "print('noise'); return {'a': {1: float('nan')}, 'path': sys.path[0:0], 'n': 1.5}"
    result = ran(code, tmp_path)
    assert (result.status, result.reason) == ("ok", None)
    assert result.data == {"a": {"1": None}, "path": [], "n": 1.5}
    assert result.seconds > 0
    assert (tmp_path / "x.stdout.txt").read_text() == "noise\n"
    assert not (tmp_path / "x.result.json").exists()


@pytest.mark.parametrize(
    ("code", "status", "reason", "stderr"),
    [
        ("raise StepSkipped('no sm_90')", "skipped", "no sm_90", ""),
        ("raise ValueError('odd')", "failed", "ValueError: odd", "Traceback"),
        ("sys.exit(4)", "failed", "SystemExit: 4", ""),
        ("print('last', file=sys.stderr); os._exit(3)", "failed", "exit code 3", "last"),
        ("os._exit(0)", "failed", "without a valid result", ""),
        ("ctypes.string_at(0)", "failed", "SIGSEGV", "Segmentation fault"),
        ("open(os.environ['RTRESNET_STEP_RESULT'], 'wb').write(b'\\xff{'); os._exit(0)",
         "failed", "without a valid result", ""),
        ("open(os.environ['RTRESNET_STEP_RESULT'], 'w').write('[1]'); os._exit(0)",
         "failed", "without a valid result", ""),
        ("sys.stdout.buffer.write(b'\\xff\\x00' * 99999); sys.stderr.buffer.write(b'\\xfe')",
         "ok", "", ""),
    ],
    ids=["skip", "raise", "exit", "hard exit", "nothing", "segfault", "garbage", "list", "noise"],
)  # fmt: skip
def test_run_step_however_the_process_ends_reports_it(
    code: str, status: str, reason: str, stderr: str, tmp_path: Path
) -> None:
    result = ran(code, tmp_path)
    assert result.status == status
    assert reason in (result.reason or "")
    assert stderr in result.stderr


def test_run_step_that_failed_keeps_its_data(tmp_path: Path) -> None:
    result = ran("raise StepFailed('off by 2', {'error': 2.0})", tmp_path)
    assert (result.status, result.reason, result.data) == ("failed", "off by 2", {"error": 2.0})


def test_run_step_that_crashes_at_exit_failed_and_keeps_its_data(tmp_path: Path) -> None:
    result = ran("return {'a': 1}", tmp_path, after="ctypes.string_at(0)")
    assert result.status == "failed" and result.data == {"a": 1}
    assert "SIGSEGV" in (result.reason or "")


def test_run_step_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess; child = subprocess.Popen(['sleep', '60']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    begin = time.perf_counter()
    result = ran(code, tmp_path, timeout=2.0)
    assert time.perf_counter() - begin < 20
    assert result.status == "failed" and "2 s" in (result.reason or "")
    assert "in step" in result.stderr  # where it hung
    child = int((tmp_path / "x.stdout.txt").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, 9)
    pytest.fail("the child of a killed step is still running")
