"""`rtresnet doctor`: what this machine can do, and the command for what it lacks."""

from __future__ import annotations

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
    "sklearn": "the data set digits",
    "matplotlib": "plots",
}


@click.command("doctor", short_help="Show what this machine can do, and what it lacks.")
@click.option("--gpu", "on_gpu", is_flag=True, help="Check the GPU with small runs on it.")
@common.json_option
def command(json_file: str | None, on_gpu: bool) -> None:
    """Show what this machine can do, and the command for each thing missing."""
    if on_gpu:
        importlib.import_module("rtresnet.cli.doctor_gpu").show(json_file)
        return
    from rtresnet.report import tables

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
    missing = [p["package"] for p in result["packages"] if not p["version"]]
    if missing:
        console.print("Missing, each with: pip install NAME - " + ", ".join(missing))
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
    from rtresnet import machine

    packages = []
    for module, purpose in PACKAGES.items():
        name = machine.DISTRIBUTIONS.get(module, module)
        version = None
        if machine.installed(module):
            version = machine.version(name, module) or "unknown"
            if module == "onnxruntime":  # several packages bring it, and may lie on top of another
                version = importlib.import_module(module).__version__
        packages.append({"package": name, "version": version, "purpose": purpose})
    gpus = [
        {"name": gpu.name, "target": gpu.target, "memory": gpu.memory} for gpu in machine.gpus()
    ]
    return {
        "cpu": machine.cpu(),
        "python": platform.python_version(),
        "gpus": gpus,
        "int8_sums_saturate": machine.int8_sums_saturate(),
        "packages": packages,
        "runs": {
            "ONNX files run on": _providers(),
            "plans are built by": _builder(),
            "plans run on": gpus[0]["name"] if gpus else "nothing here: no GPU",
        },
    }


def _providers() -> str:
    from rtresnet import machine
    from rtresnet.runtime.ort import openvino

    if not machine.installed("onnxruntime"):
        return "nothing: pip install onnxruntime"
    import onnxruntime

    found = [
        name for name in onnxruntime.get_available_providers() if name != "AzureExecutionProvider"
    ]
    served_by = openvino()
    if served_by is not None:
        found.insert(0, f"{served_by.shown} (the default on this CPU)")
    elif machine.installed("onnxruntime_ep_openvino"):
        found.append(
            "not the OpenVINO plugin, which offers no device on this processor "
            "(onnxruntime-openvino in place of onnxruntime would)"
        )
    return ", ".join(found)


def _builder() -> str:
    from rtresnet.build import targets
    from rtresnet.errors import EnvironmentLack

    try:
        module = targets.builder()
    except EnvironmentLack as lack:
        return f"nothing: {lack}"
    return f"{module.__name__} {module.__version__}"
