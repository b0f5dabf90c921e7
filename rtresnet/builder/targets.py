"""Which builder there is, and which GPUs it can build for.

TensorRT-RTX (`tensorrt_rtx`) needs no GPU and builds one plan for several compute capabilities.
TensorRT (`tensorrt`) builds for the GPU in the machine. Same Python API, one seam: `builder()`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rtresnet.core import gpu_targets, hardware, trt_loading
from rtresnet.core.errors import InputError, UnavailableError, UnknownNameError

RTX_TARGETS = tuple(gpu_targets.SERVED)
DEFAULT = RTX_TARGETS[1:]  # what TensorRT-RTX builds for when nothing is said
CURRENT = "current"
BUILDERS = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


def builder(choice: str = "auto") -> Any:
    """The TensorRT module to build with.

    Args:
        choice: "rtx", "tensorrt", or "auto": `tensorrt` where it is installed and there is a
            GPU, else `tensorrt_rtx`.

    Raises:
        UnavailableError: It is not installed, does not load, or `tensorrt` has no GPU here.
    """
    if choice not in ("auto", *BUILDERS):
        raise UnknownNameError("builder", choice, ("auto", *BUILDERS))
    choice = _chosen(choice)
    # Without a device TensorRT ends the process where it should raise an error.
    if choice == "tensorrt" and hardware.installed("tensorrt") and not hardware.gpus():
        raise UnavailableError(
            "tensorrt builds for the GPU in the machine, and there is none", fix="use --builder rtx"
        )
    return trt_loading.load_tensorrt(BUILDERS[choice])


def _chosen(choice: str) -> str:
    if choice != "auto":
        return choice
    return "tensorrt" if hardware.installed("tensorrt") and hardware.gpus() else "rtx"


def available() -> bool:
    """Whether `builder("auto")` would find one."""
    return hardware.installed("tensorrt_rtx") or (
        hardware.installed("tensorrt") and bool(hardware.gpus())
    )


def parse(given: str | Sequence[str] | None, builder: str = "auto") -> tuple[str, ...]:
    """What `--target` says, as names; nothing leaves the choice to the builder.

    Args:
        given: Compute capabilities (sm_86), GPUs ("RTX 4090"), `current` or `all`, each in a text
            of its own or separated by commas.
        builder: With "tensorrt", only the GPU in the machine can be meant.

    Raises:
        InputError: What TensorRT-RTX does not serve, with what does; or no target at all.
        UnavailableError: `current` without a GPU.
    """
    texts = [given] if isinstance(given, str) else list(given or ())
    names = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    if texts and not names:  # an empty variable in a script
        raise InputError("--target names nothing", fix="leave it out, or see: rtresnet doctor")
    found: list[str] = []
    for name in names:
        if name.lower() == "all":
            found += RTX_TARGETS
            continue
        target = _target(name)
        if _chosen(builder) == "rtx":
            _served(name, target)
        found.append(target)
    if _chosen(builder) == "tensorrt":
        _only_own(found)
    return tuple(dict.fromkeys(found))


def _target(name: str) -> str:
    if name.lower() == CURRENT:
        if not hardware.gpus():
            raise UnavailableError(
                "--target current: there is no GPU in this machine",
                fix="name the one it is for, as in --target sm_89 or --target L4",
            )
        return hardware.gpus()[0].target
    plain = re.fullmatch(r"sm_?(\d{2,3})a?|(\d{1,2})\.(\d)", name.lower())
    if plain:
        return f"sm_{plain[1] or plain[2] + plain[3]}"
    found = gpu_targets.target_of(name)
    if found is None:
        raise _no_target(name)
    return found


def _no_target(name: str) -> InputError:
    known = ", ".join(f"{target} ({names})" for target, names in gpu_targets.SERVED.items())
    return InputError(f"--target {name}: {name} is no target", fix=f"known: {known}")


def _served(name: str, target: str) -> None:
    if target in RTX_TARGETS:
        return
    plain = name.lower().startswith("sm") or name[0].isdigit()
    called = target if plain else f"{target}, which {name} is"
    if gpu_targets.too_old(target):
        raise InputError(
            f"neither TensorRT-RTX nor TensorRT 11 builds for {called} ({gpu_targets.OLD})",
            fix="run the ONNX file there, in ONNX Runtime",
        )
    if target not in gpu_targets.UNSERVED:
        raise _no_target(name)
    raise InputError(
        f"TensorRT-RTX does not build for {called} ({gpu_targets.UNSERVED[target]})",
        fix="build on that machine with --builder tensorrt",
    )


def _only_own(found: Sequence[str]) -> None:
    own = [gpu.target for gpu in hardware.gpus()[:1]]
    if found and list(dict.fromkeys(found)) != own:
        raise InputError(
            "tensorrt builds for the GPU in the machine"
            + (f", {own[0]}" if own else "")
            + f", not for {', '.join(dict.fromkeys(found))}",
            fix="leave --target out, or use --builder rtx",
        )


def apply(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Tells an RTX builder configuration what to build for.

    Raises:
        InputError: The builder builds for its own GPU only, or refuses a target.
    """
    if not targets:
        return
    if not hasattr(trt, "ComputeCapability"):
        _only_own(targets)
        return
    config.num_compute_capabilities = len(targets)
    for index, name in enumerate(targets):
        capability = getattr(trt.ComputeCapability, name.replace("_", "").upper())
        if config.set_compute_capability(capability, index) is False:
            raise InputError(f"the builder refuses the target {name}")
