"""Whether a plan can run here, as far as its sidecar says, before any library is given it."""

from __future__ import annotations

import importlib
import os

from rtresnet import artifacts, machine
from rtresnet.errors import ArtifactError, EnvironmentLack
from rtresnet.sidecar import Sidecar

BUILDERS = ("tensorrt_rtx", "tensorrt")


def check_compatible(path: str | os.PathLike[str], sidecar: Sidecar | None) -> None:
    """Holds a plan's sidecar against what is installed and present, before deserializing.

    Raises:
        ArtifactError: Built by another version, or for other GPUs.
        EnvironmentLack: The module that built it is not installed.
    """
    if sidecar is None or sidecar.plan is None:
        return
    plan = sidecar.plan
    anew = f"build it anew: {sidecar.made_by.get('command', 'rtresnet build')}"
    if plan.builder not in BUILDERS:  # a module's name: nothing else is imported for a sidecar
        raise ArtifactError(f"{path}: its sidecar names the builder {plan.builder!r}", fix=anew)
    if not machine.installed(plan.builder):
        raise EnvironmentLack(
            f"{path}: built by {plan.builder} {plan.version}, which is not installed",
            fix=f"pip install {machine.DISTRIBUTIONS.get(plan.builder, plan.builder)}",
        )
    installed = importlib.import_module(plan.builder).__version__
    if installed != plan.version:
        raise ArtifactError(
            f"{path}: built by {plan.builder} {plan.version}, installed is {installed}", fix=anew
        )
    gpus = machine.gpus()
    if gpus and plan.targets and gpus[0].target not in plan.targets:
        raise ArtifactError(
            f"{path}: built for {', '.join(plan.targets)}, and this GPU ({gpus[0].name}) is "
            f"{gpus[0].target}",
            fix=anew,
        )


def plan_needs_gpu(path: str | os.PathLike[str], *, here: bool = False) -> EnvironmentLack:
    """The error for a plan on a machine without a GPU, or (`here`) asked onto the CPU of one."""
    sidecar = artifacts.read_sidecar(path)
    parent = artifacts.parent_path(path, sidecar) if sidecar else None
    fix = f"on a CPU use {parent}" if parent else "on a CPU use its ONNX file"
    why = "a plan runs on an NVIDIA GPU" + ("" if here else ", and there is none here")
    return EnvironmentLack(f"{path}: {why}", fix=fix)
