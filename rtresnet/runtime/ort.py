"""ONNX Runtime: the CPU provider, the OpenVINO plugin, CUDA. The only file that imports it.

What is asked for is what runs. A provider that is not there is an error, never a fallback.

Two things are done to be right and fast on a CPU; the file on disk stays TensorRT's:

- For the CPU provider a Q/DQ file is rewritten in memory (`cpu_form.py`).
- OpenVINO computes FP32 files in BF16 where the processor can (ResNet-50's logits then differ by
  11 % relative, measured). It is told f32: precision lives in the file.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from rtresnet import machine
from rtresnet.errors import ArtifactError, EnvironmentLack, InputError, UnknownName, missing_package
from rtresnet.runtime.cpu_form import for_cpu

PROVIDERS = ("auto", "cpu", "openvino", "cuda")


class OrtBackend:
    """An ONNX file in ONNX Runtime. See `runtime.backend.Backend`.

    Args:
        path: The ONNX file.
        provider: "cpu", "openvino", "cuda", or "auto": OpenVINO where the plugin offers this
            processor, else ONNX Runtime's own CPU provider.
        threads: Intra-op threads; every core this process may use by default.

    Raises:
        EnvironmentLack: The provider is not here.
        ArtifactError: The file cannot be loaded.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, provider: str = "auto", threads: int | None = None
    ) -> None:
        ort = _onnxruntime()
        if provider not in PROVIDERS:
            raise UnknownName("provider", provider, PROVIDERS)
        if provider == "auto":
            provider = "openvino" if openvino_device() is not None else "cpu"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.threads = threads or machine.cores() if provider != "cuda" else None
        options.intra_op_num_threads = self.threads or 0
        if provider == "cpu" and not machine.exact_int8():
            # Slower, and right: the fast kernels would saturate at 16 bits on this processor.
            options.add_session_config_entry("session.x64quantprecision", "1")
        self.device = "cpu"
        self.packages: tuple[str, ...] = ("onnxruntime",)
        names: list[str] = []
        if provider == "openvino":
            self.provider = "OpenVINO plugin"
            self.packages += ("onnxruntime-ep-openvino",)
            _use_openvino(options, self.threads)
        elif provider == "cuda":
            if "CUDAExecutionProvider" not in ort.get_available_providers():
                raise EnvironmentLack(
                    "onnxruntime has no CUDA provider here", fix="pip install onnxruntime-gpu"
                )
            self.provider, names = "ONNX Runtime CUDA", ["CUDAExecutionProvider"]
            self.device = machine.gpus()[0].name if machine.gpus() else "cuda"
        else:
            self.provider, names = "ONNX Runtime CPU", ["CPUExecutionProvider"]
        model = for_cpu(path) if provider == "cpu" else os.fspath(path)
        try:
            self._session: Any = ort.InferenceSession(model, options, providers=names or None)
        except Exception as error:  # ONNX Runtime raises its own types, one for each status code
            raise ArtifactError(
                f"{path}: ONNX Runtime cannot load it ({str(error)[:200]})",
                fix="check it with: rtresnet inspect",
            ) from error
        if provider == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise EnvironmentLack(
                "the CUDA provider was asked for and did not start",
                fix="see: rtresnet doctor",
            )
        tensor = self._session.get_inputs()[0]
        self._input, side = tensor.name, tensor.shape[-1]
        self.size = side if isinstance(side, int) else None

    def infer(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, 3, S, S] to float32 logits [N, classes]."""
        try:
            logits: np.ndarray = self._session.run(None, {self._input: images})[0]
        except Exception as error:  # InvalidArgument, which has no name outside its module
            raise InputError(
                f"images {images.dtype} {list(images.shape)} do not fit: {str(error)[:200]}"
            ) from error
        return logits

    def timings(self) -> dict[str, float]:
        """Nothing but wall time is known on a CPU."""
        return {}

    def close(self) -> None:
        """Drops the session."""
        self._session = None


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "running an ONNX file") from None
    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(3)  # errors only: they come as exceptions too
    return onnxruntime


def openvino_device() -> Any | None:
    """The plugin's CPU device, or None: not installed, or it does not serve this processor.

    The plugin (1.8) offers processors made by Intel only: microsoft/onnxruntime#31981.
    """
    if not machine.installed("onnxruntime_ep_openvino"):
        return None
    ort = _onnxruntime()
    import onnxruntime_ep_openvino as plugin

    def devices() -> list[Any]:
        name = plugin.get_ep_name()
        cpu = ort.OrtHardwareDeviceType.CPU
        return [d for d in ort.get_ep_devices() if d.ep_name == name and d.device.type == cpu]

    if not _registered:
        ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
        _registered.append(plugin.get_ep_name())
    return next(iter(devices()), None)


_registered: list[str] = []  # a library is registered once a process, or ONNX Runtime raises


def _use_openvino(options: Any, threads: int | None) -> None:
    device = openvino_device()
    if device is None:
        if not machine.installed("onnxruntime_ep_openvino"):
            raise missing_package("onnxruntime-ep-openvino", "the OpenVINO provider")
        raise EnvironmentLack(
            f"the OpenVINO plugin offers no device on this processor ({machine.cpu()})",
            fix="use --provider cpu",
        )
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads)}
    options.add_provider_for_devices([device], {"load_config": json.dumps({"CPU": settings})})
