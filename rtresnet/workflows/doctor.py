"""Detect what this machine supports, and the commands that install what is missing."""

from __future__ import annotations

import contextlib
import importlib
import platform
from dataclasses import dataclass

from rtresnet.core import hardware
from rtresnet.core.errors import RtresnetError, UnavailableError

# module: purpose
PACKAGES = {
    "torch": "train, read checkpoints",
    "onnx": "export, quantize",
    "onnxruntime": "calibrate; run ONNX files",
    "onnxruntime_ep_openvino": "run INT8 faster on an Intel CPU",
    "tensorrt_rtx": "build plans without a GPU; run them on one",
    "tensorrt": "build and run plans on this machine's GPU",
    "cuda.bindings": "run plans",
    "pycuda": "run plans, with RTRESNET_CUDA=pycuda",
    "pynvml": "monitor the GPU's clocks during measurements",
    "sklearn": "the data set digits",
    "matplotlib": "plots",
}
# Only useful with a GPU, so they are not listed as missing without one.
FOR_GPUS = ("onnxruntime-gpu", "tensorrt-cu13", "pycuda", "nvidia-ml-py")
ON_GPU = "run ONNX files on an NVIDIA GPU, instead of onnxruntime"


@dataclass(frozen=True, kw_only=True)
class PackageStatus:
    """A package and its version; None if it is not installed."""

    package: str
    version: str | None
    purpose: str


@dataclass(frozen=True, kw_only=True)
class GpuStatus:
    """A GPU: name, compute capability, memory in bytes."""

    name: str
    target: str
    memory: int


@dataclass(frozen=True, kw_only=True)
class DoctorResult:
    """Result of `doctor`: the capabilities of this machine.

    Attributes:
        int8_sums_saturate: Whether the CPU has no VNNI.
        conflicts: Packages that overwrite each other's files.
        runs: What runs ONNX files, builds plans and runs plans, or why nothing does.
    """

    cpu: str
    python: str
    gpus: tuple[GpuStatus, ...]
    int8_sums_saturate: bool
    packages: tuple[PackageStatus, ...]
    conflicts: tuple[str, ...]
    runs: dict[str, str]

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed and would be of use here."""
        return [
            entry.package
            for entry in self.packages
            if entry.version is None and (self.gpus or entry.package not in FOR_GPUS)
        ]


def doctor() -> DoctorResult:
    """Report the CPU, the GPUs, the packages, and what they support.

    Returns:
        What this machine supports and what is missing; broken packages are part of it.
    """
    gpus = tuple(
        GpuStatus(name=gpu.name, target=gpu.target, memory=gpu.memory) for gpu in hardware.gpus()
    )
    return DoctorResult(
        cpu=hardware.cpu(),
        python=platform.python_version(),
        gpus=gpus,
        int8_sums_saturate=hardware.int8_sums_saturate(),
        packages=tuple(_packages()),
        conflicts=tuple(_conflicts(bool(gpus))),
        runs={
            "ONNX files run on": _providers(),
            "plans are built by": _builder(),
            "plans run on": _plans_run_on(),
        },
    )


def _packages() -> list[PackageStatus]:
    packages = []
    for module, purpose in PACKAGES.items():
        name = hardware.DISTRIBUTIONS.get(module, module)
        version = None
        if hardware.installed(module):
            version = hardware.version(name, module) or "unknown"
            if module == "onnxruntime":  # several packages provide it, and can overwrite each other
                try:
                    version = importlib.import_module(module).__version__
                except ImportError as error:
                    version = f"broken: {error}"
        packages.append(PackageStatus(package=name, version=version, purpose=purpose))
        if module == "onnxruntime":
            version = hardware.version("onnxruntime-gpu")
            packages.append(
                PackageStatus(package="onnxruntime-gpu", version=version, purpose=ON_GPU)
            )
    return packages


def _providers() -> str:
    from rtresnet.runtime.providers import openvino

    if not hardware.installed("onnxruntime"):
        return "nothing: pip install onnxruntime"
    try:
        import onnxruntime
    except ImportError as error:
        return f"nothing: onnxruntime cannot be imported: {error}"

    # Azure runs nothing here, and TensorRT's provider is not one of ours.
    others = ("AzureExecutionProvider", "TensorrtExecutionProvider")
    providers = [name for name in onnxruntime.get_available_providers() if name not in others]
    try:
        served_by = openvino()
    except UnavailableError as error:
        return f"nothing: {error}"
    if served_by is not None:
        providers.insert(0, f"{served_by.title} (the default on this CPU)")
    elif hardware.installed("onnxruntime_ep_openvino"):
        providers.append(
            "not the OpenVINO plugin, which supports no device of this machine "
            "(onnxruntime-openvino instead of onnxruntime does)"
        )
    return ", ".join(providers)


def _builder() -> str:
    from rtresnet.builder import targets

    try:
        module = targets.builder()
    except UnavailableError as error:
        return f"nothing: {error}"
    return f"{module.__name__} {module.__version__}"


def _plans_run_on() -> str:
    """Return the GPU and the library that runs plans on it, or why there is none."""
    from rtresnet.core import gpu_targets, trt_loading
    from rtresnet.runtime.cuda import open_cuda

    gpus = hardware.gpus()
    if not gpus:
        return "nothing: no GPU"
    try:
        cuda = open_cuda()
        with cuda.active():
            cuda.memory()
    except RtresnetError as error:  # also a binding that RTRESNET_CUDA misspells
        fix = hardware.driver_fix(str(error))
        return f"nothing: {error}" + (f"; {fix}" if fix else "")
    for_cuda_13 = [
        name for name in ("tensorrt-rtx-cu13", "tensorrt-cu13") if hardware.version(name)
    ]
    if for_cuda_13 and (fix := hardware.driver_fix()):
        return f"nothing: {' and '.join(for_cuda_13)} cannot use this driver; {fix}"
    versions, reasons = [], []
    for module, product in trt_loading.MODULES.items():
        if module == "tensorrt_rtx" and not gpu_targets.served_by_rtx(gpus[0].target):
            reasons.append(f"TensorRT-RTX does not support {gpus[0].target}")
            continue
        try:
            versions.append(f"{product} {trt_loading.load_tensorrt(module).__version__}")
        except RtresnetError as error:
            reasons.append(str(error))
    if not versions:
        return "nothing: " + "; ".join(reasons)
    return f"{gpus[0].name}, by {' or '.join(versions)}"


def _conflicts(on_gpu: bool) -> list[str]:
    """Describe builds of ONNX Runtime in one folder, which overwrite each other's files."""
    from importlib import metadata

    from rtresnet.runtime.providers import BUILDS

    folders: dict[str, list[str]] = {}
    for name in BUILDS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            folder = str(metadata.distribution(name).locate_file("onnxruntime"))
            folders.setdefault(folder, []).append(name)
    conflicts = []
    for folder, names in folders.items():
        if len(names) > 1:
            gpu = on_gpu and "onnxruntime-gpu" in names
            command = replacement("onnxruntime-gpu" if gpu else names[0], *names)
            conflicts.append(
                f"{' and '.join(names)} overwrite each other's files in {folder}; keep one: "
                f"{command}"
            )
    return conflicts


def replacement(required: str, *installed: str) -> str:
    """Return the command that leaves one build of ONNX Runtime."""
    extras = "[cuda,cudnn]" if required == "onnxruntime-gpu" else ""
    others = " ".join(installed or ("onnxruntime",))
    return f"pip uninstall -y {others} && pip install '{required}{extras}'"
