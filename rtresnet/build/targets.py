"""Which builder there is, and which GPUs it can build for.

TensorRT-RTX (`tensorrt_rtx`) needs no GPU and builds one plan for several compute capabilities.
TensorRT (`tensorrt`) builds for the GPU in the machine. Same Python API, one seam: `builder()`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from rtresnet import machine
from rtresnet.errors import EnvironmentLack, InputError, UnknownName

# What TensorRT-RTX 1.7 lists, in the order of the bits of a plan's header.
GPUS = {
    "sm_75": "RTX 20, T4",
    "sm_80": "A100, A30",
    "sm_86": "RTX 30, A10, A40",
    "sm_89": "RTX 40, L4, L40",
    "sm_120": "RTX 50",
    "sm_121": "GB10",
}
RTX_TARGETS = tuple(GPUS)
BUILDERS = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


def builder(choice: str = "auto") -> Any:
    """The TensorRT module to build with.

    Args:
        choice: "rtx", "tensorrt", or "auto": `tensorrt` where it is installed and there is a
            GPU, else `tensorrt_rtx`.

    Raises:
        EnvironmentLack: It is not installed, or `tensorrt` has no GPU to build on.
    """
    if choice not in ("auto", *BUILDERS):
        raise UnknownName("builder", choice, ("auto", *BUILDERS))
    if choice == "auto":
        choice = "tensorrt" if machine.installed("tensorrt") and machine.gpus() else "rtx"
    module = BUILDERS[choice]
    if not machine.installed(module):
        raise EnvironmentLack(
            f"no {module} builder is installed",
            fix=f"pip install {machine.DISTRIBUTIONS[module]}",
        )
    if choice == "tensorrt" and not machine.gpus():
        raise EnvironmentLack(
            "tensorrt builds for the GPU in the machine, and there is none", fix="use --builder rtx"
        )
    return importlib.import_module(module)


def available() -> bool:
    """Whether `builder("auto")` would find one."""
    return machine.installed("tensorrt_rtx") or (
        machine.installed("tensorrt") and bool(machine.gpus())
    )


def parse(text: str | None) -> tuple[str, ...]:
    """`sm_86,sm_89` to names; None or an empty text leaves the choice to the builder.

    Raises:
        InputError: sm_90, which TensorRT-RTX does not serve.
        InputError: Any other name that is no target.
    """
    names = tuple(
        part.strip().lower().replace("sm", "sm_").replace("__", "_")
        for part in (text or "").split(",")
        if part.strip()
    )
    for name in names:
        if name == "sm_90":
            raise InputError(
                "TensorRT-RTX does not build for sm_90 (H100, H200)",
                fix="build there with --builder tensorrt",
            )
        if name not in RTX_TARGETS:
            known = ", ".join(f"{target} ({gpus})" for target, gpus in GPUS.items())
            raise InputError(f"--target {text}: {name} is no target", fix=f"known: {known}")
    return tuple(dict.fromkeys(names))


def apply(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Tells an RTX builder configuration what to build for.

    Raises:
        InputError: The builder builds for its own GPU only, or refuses a target.
    """
    if not targets:
        return
    if not hasattr(trt, "ComputeCapability"):
        raise InputError(
            "tensorrt builds for the GPU in the machine and takes no --target",
            fix="leave it out, or use --builder rtx",
        )
    config.num_compute_capabilities = len(targets)
    for index, name in enumerate(targets):
        capability = getattr(trt.ComputeCapability, name.replace("_", "").upper())
        if config.set_compute_capability(capability, index) is False:
            raise InputError(f"the builder refuses the target {name}")
