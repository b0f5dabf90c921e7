"""Check a plan's sidecar and header before TensorRT deserializes it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core import artifacts, gpu_targets, hardware, trt_loading
from rtresnet.core.errors import ArtifactError, UnavailableError
from rtresnet.core.sidecar import Sidecar

if TYPE_CHECKING:
    from rtresnet.runtime.trt_plan import ErrorLog

REBUILD = "build it on this machine: rtresnet build"


def check_compatible(path: str | os.PathLike[str], sidecar: Sidecar | None) -> None:
    """Compare a plan's sidecar with the GPU and the TensorRT of this machine, in this order.

    Args:
        path: The plan.
        sidecar: Its sidecar; without one there is nothing to compare.

    Raises:
        ArtifactError: The plan was built by another version or for other GPUs.
        UnavailableError: The module that built it is not installed or cannot be imported.
    """
    if sidecar is None or sidecar.plan is None:
        return
    plan = sidecar.plan
    rebuild = f"build it again: {sidecar.made_by.get('command', 'rtresnet build')}"
    if plan.builder not in trt_loading.MODULES:
        raise ArtifactError(f"{path}: its sidecar names the builder {plan.builder!r}", fix=rebuild)
    for gpu in hardware.gpus()[:1]:
        if plan.targets and gpu.target not in plan.targets:
            raise ArtifactError(
                f"{path}: built for {', '.join(plan.targets)}, but this GPU ({gpu.name}) is "
                f"{gpu.target}",
                fix=rebuild_fix(gpu, _source(path, sidecar)),
            )
    try:
        installed = trt_loading.load_tensorrt(plan.builder).__version__
    except UnavailableError as error:
        raise UnavailableError(
            f"{path}: built by {plan.builder} {plan.version}: {error.message}", fix=error.fix
        ) from error
    if installed != plan.version:
        raise ArtifactError(
            f"{path}: built by {plan.builder} {plan.version}, but {installed} is installed",
            fix=rebuild,
        )


def check_header(trt: Any, runtime: Any, data: bytes, path: Path, errors: ErrorLog) -> None:
    """Ask TensorRT-RTX whether a plan can run here, which it reads from the plan's first bytes.

    Args:
        trt: The TensorRT module.
        runtime: Its Runtime. TensorRT's own has no such check, and the plan passes.
        data: The plan.
        path: The plan's file, for messages.
        errors: The log of `runtime`, which has the reason if the header gives none.

    Raises:
        UnavailableError: The plan cannot run here; the message has the reason.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    errors.clear()
    validity, bits = runtime.get_engine_validity(data[: runtime.engine_header_size])
    if validity not in (trt.EngineValidity.INVALID, trt.EngineValidity.SUBOPTIMAL):
        return
    diagnostics = [
        name.lower().replace("_", " ")
        for name, diagnostic in trt.EngineInvalidityDiagnostics.__members__.items()
        if int(bits) & int(diagnostic)
    ]
    reason = ", ".join(diagnostics) or errors.take()
    if validity == trt.EngineValidity.INVALID:
        # Without diagnostics, CUDA itself did not start; a driver that is too old explains that.
        driver_fix = None if diagnostics else hardware.driver_fix(reason) or hardware.driver_fix()
        gpu = hardware.gpus()[0]
        raise UnavailableError(
            f"{path}: TensorRT-RTX {trt.__version__} does not accept this plan on {gpu.name}: "
            f"{reason}",
            fix=driver_fix or rebuild_fix(gpu),
        )
    warnings.warn(
        f"{path}: runs slower than possible on this machine ({reason}); {REBUILD}",
        RuntimeWarning,
        stacklevel=2,
    )


def rebuild_fix(gpu: hardware.Gpu, source: str = "MODEL.onnx") -> str:
    """Return the fix for a plan that this GPU does not accept: the command that builds one."""
    if gpu_targets.served_by_rtx(gpu.target):
        return f"build it for this GPU: rtresnet build {source} --target current"
    return (
        f"build it for this GPU, which TensorRT-RTX does not support: rtresnet build {source} "
        f"--builder tensorrt"
    )


def _source(path: str | os.PathLike[str], sidecar: Sidecar) -> str:
    return str(artifacts.parent_path(path, sidecar) or "MODEL.onnx")


def plan_needs_gpu(
    path: str | os.PathLike[str], sidecar: Sidecar | None, *, has_gpu: bool = False
) -> UnavailableError:
    """Return the error for a plan that cannot use a GPU.

    Args:
        path: The plan.
        sidecar: Its sidecar, or its own description.
        has_gpu: Whether this machine has a GPU, and the plan was requested to run on the CPU.
    """
    parent = artifacts.parent_path(path, sidecar) if sidecar else None
    fix = f"on a CPU use {parent}" if parent else "on a CPU use its ONNX file"
    why = "a plan runs on an NVIDIA GPU" + ("" if has_gpu else ", but this machine has none")
    return UnavailableError(f"{path}: {why}", fix=fix)
