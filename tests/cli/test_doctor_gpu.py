from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rtresnet.cli.main import main
from rtresnet.core.errors import UnavailableError
from rtresnet.core.hardware import Gpu
from rtresnet.core.isolated import StepResult, StepSkipped
from rtresnet.workflows import doctor_gpu

DRIVER = {
    "cuda": "13.0", "kernel_driver": None, "reason": None, "versions": {"python": "3.12"},
    "devices": [{"name": "Test GPU", "target": "sm_89", "memory": 1 << 30, "uuid": "0-1"}],
}  # fmt: skip


def pretend(monkeypatch: pytest.MonkeyPatch, **results: dict[str, Any]) -> None:
    """Return steps with the given outcomes, and ok otherwise."""

    def run_step(name: str, command: Any, **options: Any) -> StepResult:
        data = DRIVER if name == "driver" else {}
        fields: dict[str, Any] = {"status": "ok", "data": data} | results.get(name, {})
        return StepResult(name=name, **fields)

    monkeypatch.setattr(doctor_gpu, "run_step", run_step)


def test_doctor_gpu_prints_the_gpu_and_each_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pretend(monkeypatch, engine={"status": "skipped", "reason": "no builder"})
    assert main(["doctor", "--gpu", "--json", str(tmp_path / "d.json")]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("Test GPU", "sm_89", "0-1", "13.0", "no builder"))
    steps = json.loads((tmp_path / "d.json").read_text())["result"]["gpu"]
    assert [step["status"] for step in steps] == ["ok", "ok", "skipped"]


def test_doctor_gpu_with_a_failed_step_is_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, cuda={"status": "failed", "reason": "ended by SIGSEGV"})
    assert main(["doctor", "--gpu"]) == 1
    assert "SIGSEGV" in capsys.readouterr().err


def test_doctor_gpu_without_a_gpu_is_one_line_and_exit_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, driver={"data": DRIVER | {"devices": [], "reason": "no driver"}})
    assert main(["doctor", "--gpu"]) == 3
    caught = capsys.readouterr()
    assert caught.out == "" and caught.err.count("\n") == 1 and "no driver" in caught.err


def test_doctor_gpu_runs_its_steps_in_processes() -> None:
    """The driver's step itself: it ends ok with or without a GPU."""
    try:
        results = doctor_gpu.test_gpu()
    except UnavailableError as lack:
        assert "no NVIDIA GPU" in str(lack)
    else:
        assert results[0].status == "ok"


def test_check_engine_without_an_rtx_target_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hopper = Gpu(name="NVIDIA H100", capability=(9, 0), memory=1 << 30)
    monkeypatch.setattr("rtresnet.core.hardware.gpus", lambda: (hopper,))
    fake = SimpleNamespace(__name__="tensorrt_rtx")
    monkeypatch.setattr("rtresnet.builder.targets.builder", lambda: fake)
    with pytest.raises(StepSkipped, match="sm_90"):
        doctor_gpu.check_engine()
