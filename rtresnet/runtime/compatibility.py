"""Check from a plan's sidecar whether it can run here, before TensorRT is given the plan."""

from __future__ import annotations

import os

from rtresnet.core import artifacts, gpu_targets, hardware, trt_loading
from rtresnet.core.errors import ArtifactError, UnavailableError
from rtresnet.core.sidecar import Sidecar


def check_compatible(path: str | os.PathLike[str], sidecar: Sidecar | None) -> None:
    """Compare a plan's sidecar with the GPU and the TensorRT that are here, in this order.

    Raises:
        ArtifactError: Built by another version, or for other GPUs.
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
                f"{path}: built for {', '.join(plan.targets)}, and this GPU ({gpu.name}) is "
                f"{gpu.target}",
                fix=rebuild_here(gpu, _source(path, sidecar)),
            )
    try:
        installed = trt_loading.load_tensorrt(plan.builder).__version__
    except UnavailableError as error:
        raise UnavailableError(
            f"{path}: built by {plan.builder} {plan.version}: {error.message}", fix=error.fix
        ) from error
    if installed != plan.version:
        raise ArtifactError(
            f"{path}: built by {plan.builder} {plan.version}, installed is {installed}", fix=rebuild
        )


def rebuild_here(gpu: hardware.Gpu, source: str = "MODEL.onnx") -> str:
    """The fix for a plan that this GPU does not accept: the command that builds one for it."""
    if gpu_targets.served_by_rtx(gpu.target):
        return f"build it for this GPU: rtresnet build {source} --target current"
    return (
        f"build it for this GPU, which TensorRT-RTX does not serve: rtresnet build {source} "
        f"--builder tensorrt"
    )


def _source(path: str | os.PathLike[str], sidecar: Sidecar) -> str:
    return str(artifacts.parent_path(path, sidecar) or "MODEL.onnx")


def plan_needs_gpu(path: str | os.PathLike[str], *, here: bool = False) -> UnavailableError:
    """The error for a plan on a machine without a GPU, or (`here`) asked onto the CPU of one."""
    sidecar = artifacts.read_sidecar(path)
    parent = artifacts.parent_path(path, sidecar) if sidecar else None
    fix = f"on a CPU use {parent}" if parent else "on a CPU use its ONNX file"
    why = "a plan runs on an NVIDIA GPU" + ("" if here else ", and there is none here")
    return UnavailableError(f"{path}: {why}", fix=fix)
