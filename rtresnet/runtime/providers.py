"""Execution providers of ONNX Runtime, and how a session uses one.

ONNX Runtime itself falls back to another provider if the requested one was not built in or does
not start. Here both are errors.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtresnet.core import hardware
from rtresnet.core.errors import InputError, UnavailableError, UnknownNameError, missing_package

# Severities of ONNX Runtime's log. Errors are also raised as exceptions.
ERRORS_ONLY, SILENT = 3, 4


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One execution provider.

    Attributes:
        ep: ONNX Runtime's name for it.
        title: Its name in messages.
        package: Name of the package that contains it, for pip.
        plugin: Module of a plugin that is registered at run time; None if it is built in.
        library: Its shared library in ONNX Runtime's package; None if it has none.
        gpu: Whether it needs an NVIDIA GPU.
    """

    ep: str
    title: str
    package: str
    plugin: str | None = None
    library: str | None = None
    gpu: bool = False


PROVIDERS = {
    "cpu": Provider(ep="CPUExecutionProvider", title="ONNX Runtime CPU", package="onnxruntime"),
    "openvino": Provider(
        ep="OpenVINOExecutionProvider",
        title="OpenVINO plugin",
        package="onnxruntime-ep-openvino",
        plugin="onnxruntime_ep_openvino",
    ),
    "cuda": Provider(
        ep="CUDAExecutionProvider",
        title="ONNX Runtime CUDA",
        package="onnxruntime-gpu[cuda,cudnn]",
        library="libonnxruntime_providers_cuda.so",
        gpu=True,
    ),
    "tensorrt-rtx": Provider(
        ep="NvTensorRTRTXExecutionProvider",
        title="TensorRT-RTX plugin",
        package="onnxruntime-ep-nv-tensorrt-rtx",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        gpu=True,
    ),
}
# OpenVINO in a build of ONNX Runtime, for CPUs that the plugin does not support.
OPENVINO_BUILT_IN = Provider(
    ep="OpenVINOExecutionProvider", title="ONNX Runtime OpenVINO", package="onnxruntime-openvino"
)
# Distributions that contain the module onnxruntime.
BUILDS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")


def start_error(path: str | os.PathLike[str], provider: Provider) -> UnavailableError:
    """Return the error for a provider that did not start, with the missing libraries."""
    assert provider.library is not None
    reason = "ONNX Runtime gives no reason"
    try:
        ctypes.CDLL(str(Path(import_onnxruntime().__file__).parent / "capi" / provider.library))
    except OSError as error:
        reason = str(error)
    return UnavailableError(
        f"{path}: {provider.title} does not start: {reason}",
        fix=f"pip install '{provider.package}', or see: rtresnet doctor",
    )


def _preload_cuda(ort: Any) -> None:
    """Load the CUDA libraries that pip installed, which ONNX Runtime does not search itself.

    Its output is dropped, because a missing library is an error when the session is created.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


def _require_gpu(provider: Provider) -> None:
    """Check that a provider supports this machine's GPU.

    Raises:
        UnavailableError: There is no GPU, or the provider does not support it.
    """
    gpus = hardware.gpus()
    if not gpus:
        raise UnavailableError(
            f"{provider.title} needs an NVIDIA GPU, but this machine has none or no driver",
            fix="use --provider cpu",
        )
    gpu = gpus[0]
    if provider.plugin and gpu.capability not in ((8, 6), (8, 9)) and gpu.capability < (12, 0):
        raise UnavailableError(
            f"the {provider.title} supports GPUs of sm_86, sm_89 and from sm_120 on, but this one "
            f"({gpu.name}) is {gpu.target}",
            fix="use --provider cuda",
        )


def find_provider(name: str) -> Provider:
    """Return the provider with this name.

    Raises:
        InputError: "tensorrt", ONNX Runtime's own TensorRT provider, which is not supported: builds
            of 1.31 need TensorRT 10 while pip installs 11, and it builds an engine at every load.
        UnknownNameError: There is no such provider.
    """
    if name == "tensorrt":
        raise InputError(
            "--provider tensorrt: ONNX Runtime's own TensorRT provider is not supported",
            fix="build a plan and run that: rtresnet build MODEL.onnx --builder tensorrt",
        )
    if name not in PROVIDERS:
        raise UnknownNameError("provider", name, ["auto", *PROVIDERS])
    return PROVIDERS[name]


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, without telemetry and with errors only in its log.

    Raises:
        UnavailableError: It is not installed or cannot be imported.
    """
    try:
        import onnxruntime
    except ImportError as error:
        if not hardware.installed("onnxruntime"):
            raise missing_package("onnxruntime", "running an ONNX file") from None
        raise UnavailableError(
            f"onnxruntime is installed but cannot be imported: {error}", fix="see: rtresnet doctor"
        ) from error
    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(ERRORS_ONLY)
    return onnxruntime


def use_provider(
    ort: Any, options: Any, provider: Provider, threads: int | None, *, tf32: bool = True
) -> list[tuple[str, dict[str, str]]]:
    """Prepare a session to run on a provider.

    Args:
        ort: The module onnxruntime.
        options: SessionOptions, which receive the device of a plugin.
        provider: The provider.
        threads: Intra-op threads on a CPU.
        tf32: Whether the CUDA provider may compute FP32 in TF32.

    Returns:
        The `providers` argument of InferenceSession: name and options; empty for a plugin.

    Raises:
        UnavailableError: The provider is not installed, or does not support this machine.
    """
    settings = {}
    if provider.ep == OPENVINO_BUILT_IN.ep:
        cpu = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads)}
        settings["load_config"] = json.dumps({"CPU": cpu})
    if provider.gpu:
        _require_gpu(provider)
    if provider.plugin is None:
        if provider.ep not in ort.get_available_providers():
            raise UnavailableError(
                f"this onnxruntime was built without {provider.ep}",
                fix=f"pip uninstall -y onnxruntime && pip install '{provider.package}'",
            )
        if provider.gpu:
            _preload_cuda(ort)
            settings["use_tf32"] = str(int(tf32))
        return [(provider.ep, settings)]
    if not hardware.installed(provider.plugin):
        raise missing_package(provider.package, f"--provider for {provider.title}")
    device = _plugin_device(provider)
    if device is None and provider.gpu:
        raise UnavailableError(
            f"the {provider.title} supports no device on this GPU ({hardware.gpus()[0].name})",
            fix="use --provider cuda",
        )
    if device is None:
        build = OPENVINO_BUILT_IN.package
        raise UnavailableError(
            f"the {provider.title} does not support this processor ({hardware.cpu()}), and this "
            f"onnxruntime was built without OpenVINO",
            fix=f"use --provider cpu, or: pip uninstall -y onnxruntime && pip install {build}",
        )
    options.add_provider_for_devices([device], settings)
    return []


def openvino() -> Provider | None:
    """Return the OpenVINO provider for this CPU: the plugin, else the built-in one, else None.

    The plugin (1.8) supports CPUs of Intel only: microsoft/onnxruntime#31981. The build of ONNX
    Runtime that includes OpenVINO also runs on others.
    """
    plugin = PROVIDERS["openvino"]
    assert plugin.plugin is not None
    if hardware.installed(plugin.plugin) and _plugin_device(plugin) is not None:
        return plugin
    built_in = OPENVINO_BUILT_IN.ep in import_onnxruntime().get_available_providers()
    return OPENVINO_BUILT_IN if built_in else None


def _plugin_device(provider: Provider) -> Any | None:
    """Return the first device of the right kind that an installed plugin offers, or None.

    Raises:
        UnavailableError: The plugin's library cannot be loaded.
    """
    ort = import_onnxruntime()
    assert provider.plugin is not None
    if provider.plugin not in _registered:
        plugin = importlib.import_module(provider.plugin)
        try:
            ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
        except Exception as error:  # ONNX Runtime's Fail, or the plugin's own
            raise UnavailableError(
                f"the {provider.title} does not load: {str(error).rpartition('error: ')[2][:200]}",
                fix="use --provider cpu",
            ) from error
        _registered.append(provider.plugin)
    kinds = ort.OrtHardwareDeviceType
    kind = kinds.GPU if provider.gpu else kinds.CPU
    offered = (d for d in ort.get_ep_devices() if d.ep_name == provider.ep)
    return next((d for d in offered if d.device.type == kind), None)


_registered: list[str] = []  # ONNX Runtime raises if a library is registered twice
