"""The builder, the GPUs that it builds for, and the batch sizes.

TensorRT-RTX (`tensorrt_rtx`) needs no GPU and builds one plan for several compute capabilities.
TensorRT (`tensorrt`) builds for the GPU in the machine. Their Python APIs are almost the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtresnet.core import gpu_targets, hardware, trt_loading
from rtresnet.core.errors import InputError, UnavailableError, UnknownNameError, nearest
from rtresnet.core.sidecar import Profile

RTX_TARGETS = tuple(gpu_targets.SERVED)
DEFAULT = RTX_TARGETS[1:]  # TensorRT-RTX's own default
CURRENT = "current"
BUILDERS = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
DEFAULT_BATCH = "1:8:32"


def builder(choice: str = "auto") -> Any:
    """Import the TensorRT module to build with.

    Args:
        choice: "rtx", "tensorrt", or "auto": `tensorrt` if it is installed and there is a GPU, else
            `tensorrt_rtx`.

    Raises:
        UnknownNameError: There is no such builder.
        UnavailableError: It is not installed, cannot be imported, or `tensorrt` has no GPU.
    """
    if choice not in ("auto", *BUILDERS):
        raise UnknownNameError("builder", choice, ("auto", *BUILDERS))
    choice = _resolved(choice)
    # Without a device, TensorRT ends the process instead of raising.
    if choice == "tensorrt" and not hardware.gpus():
        raise UnavailableError(
            "tensorrt needs a GPU to build for, but this machine has none", fix="use --builder rtx"
        )
    return trt_loading.load_tensorrt(BUILDERS[choice])


def _resolved(choice: str) -> str:
    if choice != "auto":
        return choice
    return "tensorrt" if hardware.installed("tensorrt") and hardware.gpus() else "rtx"


def available() -> bool:
    """Return whether `builder("auto")` finds a builder."""
    return hardware.installed(BUILDERS[_resolved("auto")])


def parse(names: str | Sequence[str] | None, builder: str = "auto") -> tuple[str, ...]:
    """Translate the values of --target to compute capabilities; empty for the builder's default.

    Args:
        names: Compute capabilities (sm_86), GPUs ("RTX 4090"), `current` or `all`, separate or with
            commas in between.
        builder: With "tensorrt", only the GPU in the machine is possible.

    Raises:
        InputError: The builder does not support a target, or the values are empty.
        UnavailableError: `current` without a GPU.
    """
    texts = [names] if isinstance(names, str) else list(names or ())
    parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    if texts and not parts:  # an empty variable in a script
        raise InputError("--target is empty", fix="leave it out, or see: rtresnet doctor")
    targets: list[str] = []
    for name in parts:
        if name.lower() == "all":
            targets += RTX_TARGETS
            continue
        target = _target(name)
        if _resolved(builder) == "rtx":
            _require_rtx_target(name, target)
        targets.append(target)
    if _resolved(builder) == "tensorrt":
        _require_local_gpu(targets)
    return tuple(dict.fromkeys(targets))


def _target(name: str) -> str:
    if name.lower() == CURRENT:
        if not hardware.gpus():
            raise UnavailableError(
                "--target current: this machine has no GPU",
                fix="name the GPU, as in --target sm_89 or --target L4",
            )
        return hardware.gpus()[0].target
    capability = re.fullmatch(r"sm_?(\d{2,3})a?|(\d{1,2})\.(\d)", name.lower())
    if capability:
        return f"sm_{capability[1] or capability[2] + capability[3]}"
    target = gpu_targets.target_of(name)
    if target is None:
        raise _unknown_target(name)
    return target


def _unknown_target(name: str) -> InputError:
    targets = ", ".join(f"{target} ({names})" for target, names in gpu_targets.SERVED.items())
    near = None if _is_capability(name) else nearest(name, gpu_targets.names())
    guess = f"did you mean {near!r}? " if near else ""
    return InputError(
        f"--target {name}: not a known GPU or compute capability", fix=f"{guess}known: {targets}"
    )


def _is_capability(name: str) -> bool:
    return name.lower().startswith("sm") or name[0].isdigit()


def _require_rtx_target(name: str, target: str) -> None:
    if target in RTX_TARGETS:
        return
    is_capability = _is_capability(name)
    title = target if is_capability else f"{name} ({target})"
    if gpu_targets.too_old(target):
        raise InputError(
            f"neither TensorRT-RTX nor TensorRT 11 supports {title} ({gpu_targets.OLD})",
            fix="run the ONNX file on it, in ONNX Runtime",
        )
    if target not in gpu_targets.UNSERVED:
        raise _unknown_target(name)
    if is_capability:
        title = f"{target} ({gpu_targets.UNSERVED[target]})"
    raise InputError(
        f"TensorRT-RTX does not support {title}",
        fix="build on that machine with --builder tensorrt",
    )


def _require_local_gpu(targets: Sequence[str]) -> None:
    local = [gpu.target for gpu in hardware.gpus()[:1]]
    if targets and list(dict.fromkeys(targets)) != local:
        raise InputError(
            "tensorrt builds only for this machine's GPU"
            + (f", {local[0]}" if local else "")
            + f", not for {', '.join(dict.fromkeys(targets))}",
            fix="leave --target out, or use --builder rtx",
        )


def apply(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Set the targets of a builder configuration of TensorRT-RTX.

    Raises:
        InputError: The builder builds for its own GPU only, or rejects a target.
    """
    if not targets:
        return
    if not hasattr(trt, "ComputeCapability"):
        _require_local_gpu(targets)
        return
    config.num_compute_capabilities = len(targets)
    for index, name in enumerate(targets):
        capability = getattr(trt.ComputeCapability, name.replace("_", "").upper())
        if config.set_compute_capability(capability, index) is False:
            raise InputError(f"the builder rejects the target {name}")


def parse_profile(text: str) -> Profile:
    """Parse MIN:OPT:MAX, or one number for a fixed batch.

    Raises:
        InputError: Not whole numbers, below 1, or not in ascending order.
    """
    parts = text.split(":")
    try:
        values = [int(part) for part in parts]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 3
    if len(values) != 3 or not 1 <= values[0] <= values[1] <= values[2]:
        raise InputError(
            f"--batch {text}: not MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX",
            fix=f"as in --batch {DEFAULT_BATCH}",
        )
    return Profile(min=values[0], opt=values[1], max=values[2])


def parse_profiles(texts: Sequence[str]) -> tuple[Profile, ...]:
    """Parse every --batch, without repetitions.

    Raises:
        InputError: See `parse_profile`.
    """
    return tuple(dict.fromkeys(parse_profile(text) for text in texts))


def profiles_for(
    source: Path, profiles: Sequence[Profile], batch: int | None
) -> tuple[Profile, ...]:
    """Choose the optimization profiles to build a file with.

    Args:
        source: The ONNX file, for the message.
        profiles: Requested profiles; if there are none, DEFAULT_BATCH or the file's batch.
        batch: The only batch size that the file accepts; None if it accepts any.

    Raises:
        InputError: A profile's batch differs from the file's.
    """
    if batch is None:
        return tuple(profiles) or (parse_profile(DEFAULT_BATCH),)
    only = Profile(min=batch, opt=batch, max=batch)
    other = next((profile for profile in profiles if profile != only), None)
    if other is not None:
        raise InputError(
            f"{source}: its batch is fixed at {batch}, not --batch {other}",
            fix="leave --batch out, or export it with a dynamic batch (torch.onnx.export: "
            "dynamic_shapes)",
        )
    return (only,)
