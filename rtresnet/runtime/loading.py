"""Load an ONNX file or a plan, whose sidecar is checked before anything is deserialized.

Imports no torch; `workflows.loading.load` also loads checkpoints.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core import artifacts, atomic_io, hardware
from rtresnet.core.errors import ArtifactError, InputError, UnavailableError, UnknownNameError
from rtresnet.core.sidecar import Sidecar
from rtresnet.runtime.backend import Backend
from rtresnet.runtime.session import Session

if TYPE_CHECKING:
    from rtresnet.runtime.ort import OrtBackend

DEVICES = ("auto", "cpu", "cuda")


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    provider: str = "auto",
    threads: int | None = None,
    contexts: int = 1,
    graphs: bool | None = None,
    kernels: str = "eager",
    cache: bool = True,
    timings: bool = False,
    blocking: bool = False,
    tf32: bool | None = None,
) -> Session:
    """Load an ONNX file or a plan.

    Args:
        path: A .onnx or .plan file.
        device: "cpu", "cuda", or "auto": a plan on the GPU, an ONNX file on the CPU.
        provider: For an ONNX file: "auto", "cpu", "openvino", "cuda" or "tensorrt-rtx".
        threads: For an ONNX file on a CPU: intra-op threads; every core by default.
        contexts: For a plan, as the following: see `runtime.trt_plan.PlanBackend`.
        graphs: Whether calls are CUDA graphs; None if possible, True or an error.
        kernels: "eager" or "lazy".
        cache: Whether compiled kernels are kept in PLAN.cache.
        timings: Whether copies and computation are timed.
        blocking: Whether a thread that waits for the GPU sleeps.
        tf32: For provider "cuda": whether FP32 layers may run as TF32; None for the default, yes.

    Raises:
        InputError: No such file, or not an ONNX file or a plan; or an argument out of range.
        ArtifactError: The file does not match its sidecar, or another version or GPU.
        UnavailableError: The device, the provider or a package is missing, or the provider would
            leave part of the net to another one.
    """
    if device not in DEVICES:
        raise UnknownNameError("device", device, DEVICES)
    for name, number in (("threads", threads), ("contexts", contexts)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}, but must be at least 1")
    path = atomic_io.require_file(path, fix="create it with: rtresnet export")
    kind = artifacts.kind_of(path)
    sidecar = artifacts.verify(path)
    if device == "cuda" and provider == "auto" and kind == "onnx":
        if not hardware.gpus():
            raise UnavailableError(
                f"{path}: --device cuda needs an NVIDIA GPU; this machine has none or no driver",
                fix="use --device cpu",
            )
        provider = "cuda"
    if tf32 is not None and provider != "cuda":
        raise InputError(
            f"{path}: tf32 applies to ONNX Runtime's CUDA provider only",
            fix="leave it out; for a plan: rtresnet build --no-tf32",
        )
    if kind == "plan":
        if provider != "auto" or threads is not None:
            raise InputError(
                f"{path}: is a plan, which runs in TensorRT; --provider and --threads apply to "
                "ONNX files only"
            )
        return _load_plan(
            path, sidecar, device, contexts=contexts, graphs=graphs, kernels=kernels, cache=cache,
            timings=timings, blocking=blocking,
        )  # fmt: skip
    if kind != "onnx":
        raise InputError(f"{path}: not an ONNX file or a plan", fix="create one: rtresnet export")
    from rtresnet.runtime.ort import OrtBackend
    from rtresnet.runtime.providers import find_provider

    on_gpu = provider != "auto" and find_provider(provider).gpu
    if device != "auto" and (device == "cuda") != on_gpu:
        raise InputError(f"--device {device} and --provider {provider} contradict each other")
    backend = OrtBackend(path, provider=provider, threads=threads, tf32=tf32 is not False)
    return Session(path, sidecar or _described(path, backend), backend)


def _load_plan(path: Path, sidecar: Sidecar | None, device: str, **options: Any) -> Session:
    from rtresnet.core import plan_info
    from rtresnet.runtime import compatibility

    sidecar = sidecar or plan_info.described(path)
    if not hardware.gpus() or device == "cpu":
        compatibility.check_compatible(path, sidecar)
        raise compatibility.plan_needs_gpu(path, sidecar, has_gpu=bool(hardware.gpus()))
    from rtresnet.runtime.trt import TrtBackend
    from rtresnet.runtime.trt_detector import TrtDetector

    detects = sidecar is not None and sidecar.detection is not None
    backend: Backend = (TrtDetector if detects else TrtBackend)(path, sidecar, **options)
    return Session(path, sidecar, backend)


def _described(path: Path, backend: OrtBackend) -> Sidecar | None:
    """Return the description in the metadata of an ONNX file without a sidecar, or None."""
    from rtresnet.onnxlib import metadata

    try:
        return metadata.DESCRIPTION.read(backend.metadata)
    except ArtifactError as error:
        backend.close()
        raise ArtifactError(f"{path}: {error.message}", fix=error.fix) from None
