"""ONNX Runtime: the CPU provider, the OpenVINO plugin, CUDA. The only file that imports it.

What is asked for is what runs. A provider that is not there is an error, never a fallback.

Two things are done to be right and fast on a CPU, both in memory; the file stays TensorRT's:

- The CPU provider is slower than FP32 on signed int8 activations and fast on unsigned ones. An
  int8 activation with zero point 0 becomes uint8 with zero point 128: q + 128 for every q, the
  same rounding, the same clipping, the same numbers after dequantization.
- OpenVINO computes FP32 files in BF16 where the processor can (ResNet-50's logits then differ by
  11 % relative, measured). It is told f32: precision lives in the file.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from rtresnet import machine
from rtresnet.errors import ArtifactError, EnvironmentLack, UnknownName, missing_package

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
        model = unsigned_activations(path) if provider == "cpu" else os.fspath(path)
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
        self._input = self._session.get_inputs()[0].name

    def infer(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, 3, S, S] to float32 logits [N, classes]."""
        logits: np.ndarray = self._session.run(None, {self._input: images})[0]
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


def unsigned_activations(path: str | os.PathLike[str]) -> str | bytes:
    """A Q/DQ file with activations moved from int8 around 0 to uint8 around 128.

    Returns:
        The serialized model, or the path itself where nothing is to be moved.
    """
    try:
        import onnx
    except ImportError:
        raise missing_package("onnx", "the CPU provider on an INT8 file") from None
    try:
        model = onnx.load(os.fspath(path))
    except Exception as error:  # protobuf's DecodeError is not one type across versions
        raise ArtifactError(
            f"{path}: not an ONNX file, or truncated", fix="export it anew"
        ) from error
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    quantized = {n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    moved: dict[str, str] = {}
    for node in model.graph.node:
        is_pair = node.op_type == "QuantizeLinear" or (
            node.op_type == "DequantizeLinear" and node.input[0] in quantized
        )
        if not is_pair or len(node.input) < 3:
            continue
        zero = constants.get(node.input[2])
        if zero is None or zero.data_type != onnx.TensorProto.INT8:
            continue
        values = onnx.numpy_helper.to_array(zero)
        if zero.name not in moved:
            moved[zero.name] = f"{zero.name}.unsigned"
            shifted = (values.astype(np.int16) + 128).astype(np.uint8)
            model.graph.initializer.append(onnx.numpy_helper.from_array(shifted, moved[zero.name]))
        node.input[2] = moved[zero.name]
    if not moved:
        return os.fspath(path)
    del model.graph.value_info[:]  # it still calls the moved tensors int8
    return bytes(model.SerializeToString())
