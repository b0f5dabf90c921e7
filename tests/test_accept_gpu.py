"""benchmarks/accept_gpu.py: its runner with fake steps, and the real steps that a CPU can run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rtresnet.core.hardware import Gpu
from rtresnet.core.isolated import StepFailed, StepResult, StepSkipped
from rtresnet.runtime.loading import load

FOLDER = Path(__file__).parents[1] / "benchmarks"
FAKE = """
import ctypes, os, sys, time
sys.path.insert(0, {folder!r})
from accept_gpu import main
from accept_steps import Step
from rtresnet.core.isolated import StepSkipped

def skip(context):
    raise StepSkipped("not on sm_90")

def garbage(context):
    sys.stdout.buffer.write(bytes(range(256)))
    open(os.environ["RTRESNET_STEP_RESULT"], "w").write("no JSON")
    os._exit(0)

STEPS = (
    Step(name="machine", run=lambda context: {{"devices": {devices!r}, "reason": "none listed"}}),
    Step(name="crash", run=lambda context: ctypes.string_at(0)),
    Step(name="hang", run=lambda context: time.sleep(60), timeout=1.5),
    Step(name="garbage", run=garbage),
    Step(name="long", run=lambda context: sys.exit("x" * 9000)),
    Step(name="skip", run=skip),
    Step(name="absent", run=skip, needs=("no_such_module",)),
    Step(name="last", run=lambda context: {{"model": context.model}}),
)
if __name__ == "__main__":
    sys.exit(main(steps=STEPS, script=__file__))
"""


@pytest.fixture
def accept(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import accept_gpu

    return accept_gpu


@pytest.fixture
def steps(accept: ModuleType) -> ModuleType:
    import accept_steps

    return accept_steps


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run("--only", ..., devices=[...]): a script with fake steps, from another folder."""

    def start(*arguments: str, devices: tuple[str, ...] = ("GPU",)) -> Any:
        script = tmp_path / "fake.py"
        script.write_text(FAKE.format(folder=str(FOLDER), devices=list(devices)))
        return subprocess.run(
            [sys.executable, str(script), "--out", str(tmp_path / "out"), *arguments],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip

    return start


def test_accept_gpu_one_failing_step_never_hides_the_others(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    done = run("--model", "resnet8")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    results = {step["name"]: step for step in report["steps"]}
    statuses = {name: step["status"] for name, step in results.items()}
    failed = dict.fromkeys(("crash", "hang", "garbage", "long"), "failed")
    assert statuses == {
        "machine": "ok", **failed, "skip": "skipped", "absent": "skipped", "last": "ok",
    }  # fmt: skip
    assert report["counts"] == {"ok": 2, "failed": 4, "skipped": 2}
    for name, reason in (
        ("crash", "SIGSEGV"), ("hang", "1.5 s"), ("garbage", "valid"), ("skip", "sm_90"),
        ("absent", "no_such_module"),
    ):  # fmt: skip
        assert reason in results[name]["reason"], name
    assert results["last"]["data"] == {"model": "resnet8"}
    assert all(step["seconds"] >= 0 and len(step["stderr"]) <= 2000 for step in report["steps"])
    assert (tmp_path / "out" / "logs" / "crash.stderr.txt").exists()


def test_accept_gpu_only_runs_the_named_steps(run: Callable[..., Any]) -> None:
    done = run("--only", "la*", "--only", "skip")
    assert done.returncode == 0
    assert [step["name"] for step in json.loads(done.stdout)["steps"]] == [
        "machine", "skip", "last",
    ]  # fmt: skip
    assert run("--only", "nothing").returncode == 2


def test_accept_gpu_without_a_gpu_is_one_line_and_exit_3(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    done = run(devices=())
    assert done.returncode == 3
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert "none listed" in done.stderr
    assert not (tmp_path / "out").exists()


def test_accept_gpu_needs_only_the_standard_library_to_start(tmp_path: Path) -> None:
    command = [sys.executable, "-S", str(FOLDER / "accept_gpu.py"), "--out", str(tmp_path)]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("machine") and "can start" in line for line in lines)
    assert any(line.startswith("export") and "pip install" in line for line in lines)


def test_accept_gpu_report_stays_short_enough_for_an_issue(accept: ModuleType) -> None:
    results = [
        StepResult(name=f"step {n}", status="failed", reason="no", stderr="e" * 4000)
        for n in range(45)
    ]
    text = accept.report(results, [])
    assert len(text) <= accept.LONGEST
    assert len(json.loads(text)["steps"]) == 45


@pytest.fixture
def context(steps: ModuleType, engines: Path, tmp_path: Path) -> Any:
    (tmp_path / "engines").mkdir()
    for path in engines.glob("*.onnx*"):
        shutil.copy(path, tmp_path / "engines")
    return steps.Context(out=tmp_path, model="resnet8", calls=10, keep_logs=True)


def test_accept_step_build_keeps_log_layers_and_attestation(
    steps: ModuleType, context: Any, with_gpu: Gpu
) -> None:
    pytest.importorskip("tensorrt_rtx")
    data = steps.build_plan(context, "rtx", "int8")
    assert data["targets"] == ["sm_89"] and set(data["attested"]["dtypes"]) == {"Int8"}
    assert data["validity"] == "INVALID"  # without a GPU
    plan = context.plan("rtx", "int8")
    assert (context.out / "fixtures" / f"{plan.name}.layers.json").exists()
    log = (context.out / "logs" / f"{plan.stem}-build.tensorrt.txt").read_text()
    assert "[VERBOSE] " in log


def test_accept_step_on_a_gpu_without_rtx_target_is_skipped(
    steps: ModuleType, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper = Gpu(name="NVIDIA H100", capability=(9, 0), memory=1 << 30)
    monkeypatch.setattr("rtresnet.core.hardware.gpus", lambda: (hopper,))
    with pytest.raises(StepSkipped, match="sm_90"):
        steps.target_of("rtx")
    assert steps.target_of("tensorrt") is None


def test_accept_step_without_an_earlier_steps_file_is_skipped(
    steps: ModuleType, tmp_path: Path
) -> None:
    empty = steps.Context(out=tmp_path, model="resnet8", calls=1, keep_logs=False)
    pytest.importorskip("tensorrt_rtx")
    for call in (
        lambda: steps.build_plan(empty, "rtx", "fp16"),
        lambda: steps.run_plan(empty, "rtx", "fp16"),
        lambda: steps.run_many_calls(empty, "rtx"),
    ):
        with pytest.raises(StepSkipped, match="missing"):
            call()


def test_accept_step_compare_with_cpu_tells_equal_from_different(
    steps: ModuleType, engines: Path
) -> None:
    fp32 = engines / "resnet8.onnx"
    with load(fp32, provider="cpu") as session:
        data = steps.compare_with_cpu(session, fp32, "fp32")
        assert set(data["errors"]) == {1, 8, 33, 70}
        assert max(data["errors"].values()) < 1e-4

        class Wrong:
            describe = session.describe

            def logits(self, images: Any) -> Any:
                return session.logits(images) + (len(images) == 33)

        with pytest.raises(StepFailed, match="batch 33") as failed:
            steps.compare_with_cpu(Wrong(), fp32, "fp32")
    assert set(failed.value.data["errors"]) == {1, 8, 33, 70}
