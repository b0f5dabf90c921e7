"""Interruption of a running build by SIGINT, in a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rtresnet.builder import engine
from rtresnet.core import artifacts
from rtresnet.core.sidecar import Profile

pytest.importorskip("tensorrt_rtx")

LONG = "determining refit engines"  # a phase of the builder's
# As `python -m rtresnet`; says which phase the builder is in, and in the long one lets it wait for
# the test, which a busy machine may hold up.
WATCHED = """
import sys
from rtresnet.builder import engine
from rtresnet.cli.main import main
real = engine.run_builder
def run(trt, maker, network, config, progress):
    def told(phase):
        print(phase, flush=True)
        if phase == "determining refit engines":
            sys.stdin.readline()
        progress(phase)
    return real(trt, maker, network, config, told)
engine.run_builder = run
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_stops_a_build_and_leaves_nothing(
    onnx_file: Callable[..., Path], tmp_path: Path, times: int
) -> None:
    source, out = onnx_file("resnet50", "int8", 64), tmp_path / "plans" / "net.plan"
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, "build", str(source), "--out", str(out), "--builder=rtx"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == LONG:
            break
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    output, complaint = process.communicate("go on\n", timeout=60)
    # One that comes when Python has already ended is the system's: 130 to a shell, too.
    assert process.returncode in ((130,) if times == 1 else (130, -2)), complaint
    assert complaint.splitlines()[-1] == "interrupted" and "Traceback" not in complaint
    assert "cancelling" in output
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_a_build_that_is_stopped_leaves_the_earlier_plan_and_the_next_one_builds(
    onnx_file: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = onnx_file("resnet8", "fp16"), tmp_path / "net.plan"
    options = {"profiles": [Profile(min=1, opt=4, max=8)], "builder": "rtx"}
    before = engine.build(source, out, **options)  # type: ignore[arg-type]

    observed: list[str] = []

    def interrupt(phase: str) -> None:
        observed.append(phase)
        if observed.count("building engine") == 1 and phase == "building engine":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        engine.build(source, out, progress=interrupt, **options)  # type: ignore[arg-type]
    assert artifacts.verify(out) == before
    assert len(list(tmp_path.iterdir())) == 3
    engine.build(source, out, **options)  # type: ignore[arg-type]
