"""`rtresnet doctor --gpu`: small runs on the GPU, each in a process of its own.

The short form of benchmarks/accept_gpu.py.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rtresnet.core import hardware
from rtresnet.core.isolated import (
    FAILED,
    OK,
    StepFailed,
    StepResult,
    StepSkipped,
    report_step,
    run_step,
)

PACKAGES = (
    "rtresnet", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt-cu13", "tensorrt-rtx-cu13",
    "cuda-python", "pycuda", "nvidia-ml-py",
)  # fmt: skip
BATCH = 5
BOUND = 1e-2  # norm of the difference to the CPU's logits over their norm: FP16, in another order


def check_driver() -> dict[str, Any]:
    """The driver, its devices, and versions."""
    from rtresnet.runtime import gpu_check

    return gpu_check.driver_report() | {"versions": hardware.versions(PACKAGES)}


def check_cuda() -> dict[str, Any]:
    """Every CUDA operation there and back."""
    from rtresnet.runtime import gpu_check

    operations = gpu_check.check_cuda()
    wrong = [f"{name}: {state}" for name, state in operations.items() if state != OK]
    if wrong:
        raise StepFailed("; ".join(wrong), {"operations": operations})
    return {"operations": operations}


def check_engine() -> dict[str, Any]:
    """ResNet-8 in FP16, exported, built and run here, against ONNX Runtime on the CPU."""
    import numpy as np

    from rtresnet import load
    from rtresnet.builder import targets
    from rtresnet.cli.main import main
    from rtresnet.core.errors import UnavailableError

    try:
        module = targets.builder()
    except UnavailableError as lack:
        raise StepSkipped(str(lack)) from None
    here, aimed = hardware.gpus()[0].target, []
    if module.__name__ == "tensorrt_rtx":
        if here not in targets.RTX_TARGETS:
            raise StepSkipped(f"TensorRT-RTX has no target {here}; pip install tensorrt-cu13")
        aimed = ["--target", here]
    with tempfile.TemporaryDirectory() as folder:
        source, plan = Path(folder, "resnet8-fp16.onnx"), Path(folder, "resnet8.plan")
        for arguments in (
            ["export", "--model", "resnet8", "--weights", "untrained", "--fp16", "--no-plan",
             "--out", folder],
            ["build", str(source), "--out", str(plan), *aimed],
        ):  # fmt: skip
            if main(arguments):
                raise StepFailed(f"rtresnet {arguments[0]} failed; see stderr", {})
        with load(source, provider="cpu") as reference:
            images = reference.example(BATCH)
            wanted = reference.logits(images)
        with load(plan) as session:
            got, about = session.logits(images), session.describe()
    error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    data = {"relative_error": error, "bound": BOUND, "described": about}
    if not error <= BOUND:
        raise StepFailed(f"logits differ from the CPU's by {error:.2g}, bound {BOUND}", data)
    return data


STEPS: dict[str, tuple[Callable[[], dict[str, Any]], float]] = {  # and seconds until it is killed
    "driver": (check_driver, 60),
    "cuda": (check_cuda, 60),
    "engine": (check_engine, 300),
}


def run_steps() -> list[StepResult]:
    """Run every step in a process of its own.

    Raises:
        UnavailableError: There is no GPU.
    """
    from rtresnet.core.errors import UnavailableError

    results: list[StepResult] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, timeout) in STEPS.items():
            command = [sys.executable, "-m", __name__, name]
            # The package as it was imported here, installed or not.
            path = os.pathsep.join(filter(None, sys.path))
            results.append(
                run_step(
                    name, command, timeout=timeout, logs=Path(folder),
                    environment={"PYTHONPATH": path},
                )
            )  # fmt: skip
            first = results[0]
            if first.status == OK and not first.data["devices"]:
                raise UnavailableError(
                    f"no NVIDIA GPU here: {first.data['reason']}",
                    fix="run it on a machine with one; `rtresnet doctor` shows what works without",
                )
    return results


def show(json_file: str | None) -> None:
    """Print what the steps found.

    Raises:
        UnavailableError: There is no GPU.
        CheckFailedError: A step failed.
    """
    import dataclasses

    from rtresnet.cli import common
    from rtresnet.core.errors import CheckFailedError
    from rtresnet.reporting import tables

    results = run_steps()
    console = common.out_console()
    driver = results[0].data
    for gpu in driver.get("devices", ()):
        memory = f"{gpu['memory'] / 2**30:.0f} GiB"
        console.print(
            f"GPU: {gpu['name']}, {gpu['target']}, {memory}, UUID {gpu['uuid'] or 'unknown'}",
            soft_wrap=True, markup=False,
        )  # fmt: skip
    if driver:
        known = driver["kernel_driver"] or "unknown version"
        console.print(f"driver: CUDA {driver['cuda']}; {known}", soft_wrap=True, markup=False)
        packages = ", ".join(f"{name} {version}" for name, version in driver["versions"].items())
        console.print(packages, soft_wrap=True, markup=False)
    rows = [(r.name, r.status, f"{r.seconds:.1f}", r.reason or _detail(r)) for r in results]
    tables.show(console, ("step", "status", "s", "detail"), rows)
    common.write_json(json_file, "doctor", {"gpu": [dataclasses.asdict(r) for r in results]})
    failed = [result for result in results if result.status == FAILED]
    if failed:
        raise CheckFailedError(
            f"{len(failed)} of {len(results)} steps failed: {failed[0].name}: {failed[0].reason}",
            fix="see stderr in: rtresnet doctor --gpu --json -",
        )


def _detail(result: StepResult) -> str:
    if "relative_error" in result.data:
        about = result.data["described"]
        return f"{about['provider']} and the CPU differ by {result.data['relative_error']:.1g}"
    return ""


if __name__ == "__main__":
    report_step(STEPS[sys.argv[1]][0])
