"""Test the GPU with small runs, each in a separate process.

benchmarks/accept_gpu.py is the long form.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rtresnet.core import hardware
from rtresnet.core.isolated import (
    OK,
    StepFailed,
    StepResult,
    StepSkipped,
    report_step,
    run_step,
)
from rtresnet.runtime.session import RuntimeInfo

PACKAGES = (
    "rtresnet", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt-cu13", "tensorrt-rtx-cu13",
    "cuda-python", "pycuda", "nvidia-ml-py",
)  # fmt: skip
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")
BATCH = 5
BOUND = 1e-2  # bound of the relative L2 difference from the CPU's logits


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """A device of the driver; `memory` is in bytes."""

    name: str
    target: str
    memory: int
    uuid: str | None


@dataclass(frozen=True, kw_only=True)
class DriverFacts:
    """The driver and its devices.

    Attributes:
        cuda: CUDA version that the driver supports.
        kernel_driver: Version line of the kernel module.
        reason: Why there is no device.
    """

    cuda: str | None
    kernel_driver: str | None
    devices: tuple[DeviceFacts, ...]
    reason: str | None
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class CudaFacts:
    """State of each CUDA operation: "ok" or the error."""

    operations: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """Difference of an engine's logits from the CPU's, relative to their norm, and its bound."""

    relative_error: float
    bound: float
    described: RuntimeInfo


def check_driver() -> DriverFacts:
    """Describe the driver and its devices, with the reason if there is none."""
    reason = hardware.driver_error()
    kernel = None
    with contextlib.suppress(OSError):
        kernel = KERNEL_DRIVER.read_text().splitlines()[0]
    devices = tuple(
        DeviceFacts(name=gpu.name, target=gpu.target, memory=gpu.memory, uuid=gpu.uuid)
        for gpu in hardware.gpus()
    )
    if not devices and reason is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = "the driver lists no device"
        if visible is not None:
            reason += f" with CUDA_VISIBLE_DEVICES={visible!r}"
    version = hardware.cuda_version()
    return DriverFacts(
        cuda=".".join(map(str, version)) if version else None,
        kernel_driver=kernel,
        devices=devices,
        reason=reason,
        versions=hardware.versions(PACKAGES),
    )


def check_cuda() -> CudaFacts:
    """Check every CUDA operation that the runtime needs."""
    from rtresnet.runtime import gpu_check

    operations = gpu_check.check_cuda()
    wrong = [f"{name}: {state}" for name, state in operations.items() if state != OK]
    if wrong:
        raise StepFailed("; ".join(wrong), CudaFacts(operations=operations))
    return CudaFacts(operations=operations)


def check_engine() -> EngineFacts:
    """Export, build and run ResNet-8 in FP16, and compare it with ONNX Runtime on the CPU."""
    import numpy as np

    from rtresnet.builder import targets
    from rtresnet.core.errors import UnavailableError
    from rtresnet.runtime.loading import load
    from rtresnet.workflows.build import BuildConfig, build
    from rtresnet.workflows.export import ExportConfig, export

    try:
        module = targets.builder()
    except UnavailableError as error:
        raise StepSkipped(str(error)) from None
    here, targets_here = hardware.gpus()[0].target, tuple[str, ...]()
    if module.__name__ == "tensorrt_rtx":
        if here not in targets.RTX_TARGETS:
            raise StepSkipped(f"TensorRT-RTX does not support {here}; pip install tensorrt-cu13")
        targets_here = (here,)
    with tempfile.TemporaryDirectory() as folder:
        exported = export("untrained", folder, ExportConfig(model="resnet8", precisions=("fp16",)))
        source = exported.onnx[1].path
        plan = build(source, BuildConfig(targets=targets_here)).path
        with load(source, provider="cpu") as reference:
            images = reference.example(BATCH)
            expected = reference.logits(images)
        with load(plan) as session:
            got, info = session.logits(images), session.info
    difference = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    facts = EngineFacts(relative_error=difference, bound=BOUND, described=info)
    if not difference <= BOUND:
        raise StepFailed(f"logits differ from the CPU's by {difference:.2g}, bound {BOUND}", facts)
    return facts


STEPS: dict[str, tuple[Callable[[], object], float]] = {  # and seconds until it is killed
    "driver": (check_driver, 60),
    "cuda": (check_cuda, 60),
    "engine": (check_engine, 300),
}


def test_gpu() -> list[StepResult]:
    """Run every step in a separate process.

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
                    f"no NVIDIA GPU: {first.data['reason']}",
                    fix="run it on a machine with a GPU, or see: rtresnet doctor",
                )
    return results


if __name__ == "__main__":
    report_step(STEPS[sys.argv[1]][0])
