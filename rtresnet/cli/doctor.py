"""`rtresnet doctor`: what this machine can do, and the command for what it lacks."""

from __future__ import annotations

import contextlib
import importlib
import platform
from typing import Any

import click

from rtresnet.cli import common

# module: what it is for
PACKAGES = {
    "torch": "train, read checkpoints",
    "onnx": "export, quantize",
    "onnxruntime": "calibrate; run ONNX files",
    "onnxruntime_ep_openvino": "run INT8 faster on an Intel CPU",
    "tensorrt_rtx": "build plans, GPU or not; run them",
    "tensorrt": "build and run plans on this machine's GPU",
    "cuda.bindings": "run plans",
    "pycuda": "run plans, with RTRESNET_CUDA=pycuda",
    "pynvml": "watch the GPU's clocks while it is measured",
    "sklearn": "the data set digits",
    "matplotlib": "plots",
}
# Of no use without a GPU, so that a machine without one does not miss them.
FOR_GPUS = ("onnxruntime-gpu", "tensorrt-cu13", "pycuda", "nvidia-ml-py")
ON_GPU = "run ONNX files on an NVIDIA GPU, in place of onnxruntime"


@click.command("doctor", short_help="Show what this machine can do, and what it lacks.")
@click.option("--gpu", "on_gpu", is_flag=True, help="Check the GPU with small runs on it.")
@common.json_option
def command(json_file: str | None, on_gpu: bool) -> None:
    """Show what this machine can do, and the command for each thing missing."""
    if on_gpu:
        importlib.import_module("rtresnet.cli.doctor_gpu").show(json_file)
        return
    from rtresnet.reporting import tables

    result = run()
    console = common.out_console()
    console.print(f"{result['cpu']}; Python {result['python']}", soft_wrap=True)
    for gpu in result["gpus"]:
        console.print(f"GPU: {gpu['name']}, {gpu['target']}, {gpu['memory'] / 2**30:.0f} GiB")
    if not result["gpus"]:
        console.print(
            "GPU: none, or no driver. Plans can be built here, and run on another machine."
        )
    rows = [(p["package"], p["version"] or "missing", p["purpose"]) for p in result["packages"]]
    tables.show(console, ("package", "version", "for"), rows)
    missing = [
        p["package"] for p in result["packages"]
        if not p["version"] and (result["gpus"] or p["package"] not in FOR_GPUS)
    ]  # fmt: skip
    if "onnxruntime-gpu" in missing:
        missing.remove("onnxruntime-gpu")
        console.print(f"To {ON_GPU}: {_swap('onnxruntime-gpu')}", soft_wrap=True, markup=False)
    if missing:
        console.print("Missing, each with: pip install NAME - " + ", ".join(missing))
    for conflict in result["conflicts"]:
        console.print(f"WARNING: {conflict}", soft_wrap=True, markup=False)
    if result["int8_sums_saturate"]:
        console.print(
            "INT8: this CPU has no VNNI. Its integer sums of 16 bits could saturate, so INT8 files "
            "run in a form that cannot. They gain less speed than with VNNI.",
            soft_wrap=True,
        )
    for name, state in result["runs"].items():
        console.print(f"{name}: {state}", soft_wrap=True, markup=False)
    common.write_json(json_file, "doctor", result)


def run() -> dict[str, Any]:
    """The verb's body; returns what `--json` writes."""
    from rtresnet.core import hardware

    packages = []
    for module, purpose in PACKAGES.items():
        name = hardware.DISTRIBUTIONS.get(module, module)
        version = None
        if hardware.installed(module):
            version = hardware.version(name, module) or "unknown"
            if module == "onnxruntime":  # several packages bring it, and may lie on top of another
                try:
                    version = importlib.import_module(module).__version__
                except ImportError as error:
                    version = f"broken: {error}"
        packages.append({"package": name, "version": version, "purpose": purpose})
        if module == "onnxruntime":
            found = hardware.version("onnxruntime-gpu")
            packages.append({"package": "onnxruntime-gpu", "version": found, "purpose": ON_GPU})
    gpus = [
        {"name": gpu.name, "target": gpu.target, "memory": gpu.memory} for gpu in hardware.gpus()
    ]
    return {
        "cpu": hardware.cpu(),
        "python": platform.python_version(),
        "gpus": gpus,
        "int8_sums_saturate": hardware.int8_sums_saturate(),
        "packages": packages,
        "conflicts": _conflicts(bool(gpus)),
        "runs": {
            "ONNX files run on": _providers(),
            "plans are built by": _builder(),
            "plans run on": _plans_run_on(),
        },
    }


def _providers() -> str:
    from rtresnet.core import hardware
    from rtresnet.core.errors import UnavailableError
    from rtresnet.runtime.providers import openvino

    if not hardware.installed("onnxruntime"):
        return "nothing: pip install onnxruntime"
    try:
        import onnxruntime
    except ImportError as error:
        return f"nothing: onnxruntime cannot be imported: {error}"

    # Azure runs nothing here, and TensorRT's provider is not one of ours.
    others = ("AzureExecutionProvider", "TensorrtExecutionProvider")
    found = [name for name in onnxruntime.get_available_providers() if name not in others]
    try:
        served_by = openvino()
    except UnavailableError as lack:
        return f"nothing: {lack}"
    if served_by is not None:
        found.insert(0, f"{served_by.title} (the default on this CPU)")
    elif hardware.installed("onnxruntime_ep_openvino"):
        found.append(
            "not the OpenVINO plugin, which offers no device on this processor "
            "(onnxruntime-openvino in place of onnxruntime would)"
        )
    return ", ".join(found)


def _builder() -> str:
    from rtresnet.builder import targets
    from rtresnet.core.errors import UnavailableError

    try:
        module = targets.builder()
    except UnavailableError as lack:
        return f"nothing: {lack}"
    return f"{module.__name__} {module.__version__}"


def _plans_run_on() -> str:
    """The GPU and the library that runs plans on it, or why there is none."""
    from rtresnet.core import gpu_targets, hardware, trt_loading
    from rtresnet.core.errors import RtresnetError
    from rtresnet.runtime.cuda import open_cuda

    gpus = hardware.gpus()
    if not gpus:
        return "nothing here: no GPU"
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
    found, reasons = [], []
    for module, product in trt_loading.MODULES.items():
        if module == "tensorrt_rtx" and not gpu_targets.served_by_rtx(gpus[0].target):
            reasons.append(f"TensorRT-RTX does not serve {gpus[0].target}")
            continue
        try:
            found.append(f"{product} {trt_loading.load_tensorrt(module).__version__}")
        except RtresnetError as error:
            reasons.append(str(error))
    if not found:
        return "nothing: " + "; ".join(reasons)
    return f"{gpus[0].name}, by {' or '.join(found)}"


def _conflicts(on_gpu: bool) -> list[str]:
    """Builds of ONNX Runtime that were installed into one folder, where they share file names."""
    from importlib import metadata

    from rtresnet.runtime.providers import BUILDS

    folders: dict[str, list[str]] = {}
    for name in BUILDS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            folder = str(metadata.distribution(name).locate_file("onnxruntime"))
            folders.setdefault(folder, []).append(name)
    return [
        f"{' and '.join(names)} overwrite each other's files in {folder}; keep one: "
        f"{_swap('onnxruntime-gpu' if on_gpu and 'onnxruntime-gpu' in names else names[0], *names)}"
        for folder, names in folders.items()
        if len(names) > 1
    ]


def _swap(wanted: str, *installed: str) -> str:
    """The command that leaves one build of ONNX Runtime."""
    extras = "[cuda,cudnn]" if wanted == "onnxruntime-gpu" else ""
    others = " ".join(installed or ("onnxruntime",))
    return f"pip uninstall -y {others} && pip install '{wanted}{extras}'"
