"""ONNX Runtime and its execution providers. The only file that imports it.

What is asked for is what runs. A provider that is not there is an error, never a fallback, and
after loading, the session is asked where it put every node. ONNX Runtime itself falls back in four
places, with a warning at most: a provider it was not built with, one that does not start, a node
that the provider has no kernel for, a run that fails.

Two things are done to be right and fast on a CPU; the file on disk stays TensorRT's:

- A Q/DQ file is rewritten in memory (`cpu_rewrite.py`): always for ONNX Runtime's own CPU provider,
  for OpenVINO where the processor's integer kernels would saturate.
- OpenVINO computes FP32 files in BF16 where the processor can (ResNet-50's logits then differ by
  11 % relative, measured). It is told f32: precision lives in the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rtresnet.core import hardware
from rtresnet.core.errors import (
    ArtifactError,
    InputError,
    UnavailableError,
    UnknownNameError,
    missing_package,
)
from rtresnet.core.preprocess import pieces
from rtresnet.runtime.backend import LAYOUTS, TOPK, TopK
from rtresnet.runtime.cpu_rewrite import is_quantized, rewrite_for_cpu


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One execution provider.

    Attributes:
        ep: ONNX Runtime's name for it.
        shown: As printed beside every figure.
        package: What brings it, as pip knows it.
        plugin: Module of a plugin that is registered at run time; None for one that is built in.
        library: Its shared library in ONNX Runtime's package; None where it has none of its own.
        gpu: Whether it needs an NVIDIA GPU.
    """

    ep: str
    shown: str
    package: str
    plugin: str | None = None
    library: str | None = None
    gpu: bool = False


PROVIDERS = {
    "cpu": Provider(ep="CPUExecutionProvider", shown="ONNX Runtime CPU", package="onnxruntime"),
    "openvino": Provider(
        ep="OpenVINOExecutionProvider",
        shown="OpenVINO plugin",
        package="onnxruntime-ep-openvino",
        plugin="onnxruntime_ep_openvino",
    ),
    "cuda": Provider(
        ep="CUDAExecutionProvider",
        shown="ONNX Runtime CUDA",
        package="onnxruntime-gpu[cuda,cudnn]",
        library="libonnxruntime_providers_cuda.so",
        gpu=True,
    ),
    "tensorrt-rtx": Provider(
        ep="NvTensorRTRTXExecutionProvider",
        shown="TensorRT-RTX plugin",
        package="onnxruntime-ep-nv-tensorrt-rtx",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        gpu=True,
    ),
}
# For processors that the plugin does not serve: OpenVINO as a build of ONNX Runtime brings it.
OPENVINO_BUILT_IN = Provider(
    ep="OpenVINOExecutionProvider", shown="ONNX Runtime OpenVINO", package="onnxruntime-openvino"
)
# Distributions that bring the module onnxruntime.
BUILDS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")
RECORD = "session.record_ep_graph_assignment_info"
NO_FALLBACK = "session.disable_cpu_ep_fallback"
# Severities of ONNX Runtime's log. Errors come as exceptions too.
ERRORS_ONLY, SILENT = 3, 4
# As ONNX Runtime 1.31 words it: "CUDA failure 35: CUDA driver version is insufficient for ..."
GPU_FAILURE = re.compile(r"(CUDA|CUDNN|CUBLAS\w*|CUFFT) failure \w+: [^;]+")
# Threads that wait for work between two calls keep a core each busy for tens of milliseconds, and
# another session called meanwhile takes twice as long. Within a call they spin as before.
NO_SPINNING = ("session.force_spinning_stop", "1")
# Q and DQ nodes run one by one and convolutions in float: the numbers of the file on every CPU.
# ResNet-50 at 64 pixels, 1 thread, AVX-512 VNNI: 25 ms for 4 images; 34 ms with integer kernels on
# a file that is not rewritten.
NO_INTEGER_KERNELS = ("session.disable_quant_qdq", "1")
WITHOUT_ONNX = (
    "INT8 layers run in float, with the file's rounding, because the package onnx is not "
    "installed; for integer kernels: pip install 'rtresnet[export]'"
)


class OrtBackend:
    """An ONNX file in ONNX Runtime. See `runtime.backend.Backend`.

    Args:
        path: The ONNX file.
        provider: A key of PROVIDERS, or "auto": OpenVINO where it serves this processor (see
            `openvino`), else ONNX Runtime's own CPU provider.
        threads: Intra-op threads; every core this process may use by default.
        profile: Begin of the file's name that ONNX Runtime's profile goes to; None for no profile.
        preserve_numerics: On ONNX Runtime's CPU provider, skip the one rule of `cpu_rewrite.py`
            that changes results of an INT8 file, by one step at most.

    Attributes:
        placement: Nodes of the net on each execution provider, as the session says.
        int8_note: How an INT8 file runs where the CPU's integer sums would saturate, or where it
            cannot be rewritten because the package onnx is not installed; else None.
        batch: The only batch size that the file takes; None where it takes any. `infer` takes any
            number of images in either case.

    Raises:
        UnavailableError: The provider is not here, or part of the net would run on another one.
        ArtifactError: The file cannot be loaded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        provider: str = "auto",
        threads: int | None = None,
        profile: str | None = None,
        preserve_numerics: bool = False,
    ) -> None:
        ort = _onnxruntime()
        served_by = openvino() if provider in ("auto", "openvino") else None
        saturates = hardware.int8_sums_saturate()
        # What OpenVINO would compute wrongly as it is, and nothing here can rewrite.
        unfit = saturates and not hardware.installed("onnx") and is_quantized(path)
        if provider == "auto":
            provider = "openvino" if served_by and not unfit else "cpu"
        elif provider == "openvino" and unfit:
            raise missing_package("onnx", f"{path}: INT8 in OpenVINO on a CPU without VNNI")
        about = (served_by if provider == "openvino" else None) or find_provider(provider)
        self.provider = about.shown
        # Two builds may be installed on top of each other; the module is of one of them.
        builds = tuple(name for name in BUILDS if hardware.version(name) == ort.__version__)
        self.versions = {(builds or BUILDS)[0]: str(ort.__version__)}
        if about.plugin and (plugin_version := hardware.version(about.package)):
            self.versions[about.package] = plugin_version
        self.device = "cpu"
        self.int8_note: str | None = None
        self.threads: int | None = None if about.gpu else threads or hardware.cores()
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised; the log prints names unescaped
        options.intra_op_num_threads = self.threads or 0
        options.add_session_config_entry(*NO_SPINNING)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        chosen = _choose(ort, options, about, self.threads)
        if about.gpu:
            self.device = hardware.gpus()[0].name
        tells = hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")
        if tells:
            options.add_session_config_entry(RECORD, "1")
        elif provider != "cpu":  # ONNX Runtime before 1.24 does not say where, but refuses
            options.add_session_config_entry(NO_FALLBACK, "1")
        model: str | bytes = os.fspath(path)
        if provider == "cpu" or (provider == "openvino" and saturates):
            rewritten = rewrite_for_cpu(
                path,
                saturates=saturates,
                integer_chains=provider == "cpu",
                preserve_numerics=preserve_numerics,
            )
            model = rewritten.model
            if rewritten.needs_float:
                options.add_session_config_entry(*NO_INTEGER_KERNELS)
                self.int8_note = WITHOUT_ONNX
            elif saturates and rewritten.quantized:
                self.int8_note = _without_vnni(rewritten.float_layers)
        if about.library:  # what its library lacks would go to stderr, and comes as an error here
            ort.set_default_logger_severity(SILENT)
        try:
            self._session: Any = ort.InferenceSession(
                model, options, providers=chosen or None, enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime raises its own types, one for each status code
            raise _load_error(path, about, error) from error
        finally:
            ort.set_default_logger_severity(ERRORS_ONLY)
        if about.library and about.ep not in self._session.get_providers():
            raise _start_error(path, about)
        self.placement = hold_placement(self._session, about.ep) if tells else {}
        self._describe_ends()

    def _describe_ends(self) -> None:
        tensor, outputs = self._session.get_inputs()[0], self._session.get_outputs()
        self._input, self._shape = tensor.name, tensor.shape
        self.input_name: str = tensor.name
        kind = "uint8" if tensor.type == "tensor(uint8)" else "float32"
        self.input_dtype: np.dtype[Any] = np.dtype(kind)
        self.layout: Literal["nchw", "nhwc"] = LAYOUTS[kind]
        batch, side = (tensor.shape[0], tensor.shape[2]) if len(tensor.shape) == 4 else (None, None)
        self.batch = batch if isinstance(batch, int) else None
        self.size = side if isinstance(side, int) else None
        names = [output.name for output in outputs]
        self._outputs = list(TOPK) if set(TOPK) <= set(names) else names[:1]
        self.output_names: list[str] = self._outputs

    def infer(self, images: np.ndarray) -> np.ndarray | TopK:
        """A batch of any N from 1 to logits, or to indices and probabilities.

        A file with a fixed batch runs as often as it takes; a batch that is not full is filled up.

        Raises:
            InputError: Images of another type or shape, or the backend is closed.
            ArtifactError: A file with a fixed batch does not return one row an image.
            UnavailableError: The provider failed.
        """
        if self._session is None:
            raise InputError("infer after close")
        if not isinstance(images, np.ndarray):
            raise InputError(f"images are {type(images).__name__}, not a NumPy array")
        if not images.dtype.isnative:  # ONNX Runtime reads the bytes as if they were
            raise InputError(
                f"images {images.dtype} do not fit: they are in another machine's byte order",
                fix="images.astype(images.dtype.newbyteorder('='))",
            )
        if self.batch is None or not images.ndim or len(images) in (0, self.batch):
            return _result(self._run(images))
        found = []
        for part, rows in pieces(images, self.batch):
            values = self._run(part)
            if any(len(value) != len(part) for value in values):
                shapes = ", ".join(str(list(value.shape)) for value in values)
                raise ArtifactError(
                    f"takes batches of {self.batch} and gives {shapes}: not one row an image",
                    fix=f"call it with {self.batch} images, or export it with an open batch",
                )
            found.append([value[:rows] for value in values])
        return _result([np.concatenate(parts) for parts in zip(*found, strict=True)])

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        try:
            found: list[np.ndarray] = self._session.run(self._outputs, {self._input: images})
        except Exception as error:  # ONNX Runtime raises its own types, for both kinds
            if self._takes(images):
                reason = _reason(error)
                raise UnavailableError(
                    f"{self.provider} failed: {reason}", fix=hardware.driver_fix(reason)
                ) from error
            raise InputError(
                f"images {images.dtype} {list(images.shape)} do not fit: {str(error)[:200]}"
            ) from error
        return found

    def _takes(self, images: np.ndarray) -> bool:
        """Whether type and shape are those of the input; names stand for any length from 1."""
        return (
            images.dtype == self.input_dtype
            and len(images.shape) == len(self._shape)
            and all(
                given == wanted if isinstance(wanted, int) else given > 0
                for given, wanted in zip(images.shape, self._shape, strict=True)
            )
        )

    def timings(self) -> dict[str, float]:
        """Nothing but wall time is known on a CPU."""
        return {}

    def end_profile(self) -> str:
        """Path of the profile that was asked for; nothing is recorded any more."""
        path: str = self._session.end_profiling()
        return path

    def close(self) -> None:
        """Drops the session."""
        self._session = None


def _result(found: Sequence[np.ndarray]) -> np.ndarray | TopK:
    """Logits, or the two outputs of a top-K file."""
    return (found[0], found[1]) if len(found) > 1 else found[0]


def _without_vnni(float_layers: Sequence[str]) -> str:
    """What runs instead of saturating sums, for people who read a figure."""
    shown = ", ".join(float_layers[:3]) + (", ..." if len(float_layers) > 3 else "")
    count = f"{len(float_layers)} layer{'s run' if len(float_layers) > 1 else ' runs'}"
    change = f"{count} in float ({shown})" if float_layers else "none of this file's would"
    return f"no VNNI on this CPU, so INT8 sums of 16 bits could saturate: {change}"


def hold_placement(session: Any, ep: str) -> dict[str, int]:
    """Reads back where an ONNX Runtime session put every node.

    Args:
        session: An InferenceSession that was made with RECORD on.
        ep: The execution provider that must have them all.

    Returns:
        Execution provider to the number of nodes it runs.

    Raises:
        UnavailableError: Some are on another provider; the message says how many, and which.
    """
    nodes = [
        (part.ep_name, node.name or "unnamed", node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    strays = [(name, op, where) for where, name, op in nodes if where != ep]
    if strays:
        shown = ", ".join(f"{name} ({op}) on {where}" for name, op, where in strays[:3])
        raise UnavailableError(
            f"{ep} was asked for, and {len(strays)} of {len(nodes)} nodes would run elsewhere: "
            f"{shown}{', ...' if len(strays) > 3 else ''}",
            fix="see what there is: rtresnet doctor",
        )
    return dict(Counter(where for where, _, _ in nodes))


def _load_error(
    path: str | os.PathLike[str], about: Provider, error: Exception
) -> ArtifactError | UnavailableError:
    """Whether it is the file or the provider that does not work."""
    reason = _reason(error)
    no_fallback = "fallback to CPU EP" in str(error)
    if no_fallback or type(error).__name__ == "EPFail" or GPU_FAILURE.search(str(error)):
        return UnavailableError(
            f"{path}: {about.shown} was asked for and cannot run it ({reason})",
            fix=hardware.driver_fix(reason) or "see what there is: rtresnet doctor",
        )
    return ArtifactError(
        f"{path}: {about.shown} cannot load it ({reason})", fix="check it with: rtresnet inspect"
    )


def _reason(error: Exception) -> str:
    """The part of ONNX Runtime's message that says what happened, not where in its source."""
    failure = GPU_FAILURE.search(str(error))
    return (failure[0] if failure else str(error)).strip()[:200]


def _start_error(path: str | os.PathLike[str], about: Provider) -> UnavailableError:
    """The error for a provider that ONNX Runtime dropped, with what its library lacks."""
    assert about.library is not None
    why = "ONNX Runtime gives no reason"
    try:
        ctypes.CDLL(str(Path(_onnxruntime().__file__).parent / "capi" / about.library))
    except OSError as error:
        why = str(error)
    return UnavailableError(
        f"{path}: {about.shown} does not start: {why}",
        fix=f"pip install '{about.package}', or see: rtresnet doctor",
    )


def _preload_cuda(ort: Any) -> None:
    """Load the CUDA libraries that pip installed; ONNX Runtime does not search for them itself.

    What it prints is dropped: a missing library is an error once the session is made.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


def _require_gpu(about: Provider) -> None:
    """Refuse a provider that does not accept this machine's GPU.

    Raises:
        UnavailableError: There is no GPU, or one that the provider does not accept.
    """
    gpus = hardware.gpus()
    if not gpus:
        raise UnavailableError(
            f"{about.shown} needs an NVIDIA GPU, and this machine has none or no driver",
            fix="use --provider cpu",
        )
    gpu = gpus[0]
    if about.plugin and gpu.capability not in ((8, 6), (8, 9)) and gpu.capability < (12, 0):
        raise UnavailableError(
            f"the {about.shown} accepts GPUs of sm_86, sm_89 and from sm_120 on, and this one "
            f"({gpu.name}) is {gpu.target}",
            fix="use --provider cuda",
        )


def find_provider(name: str) -> Provider:
    """The provider of this name.

    Raises:
        InputError: ONNX Runtime's own TensorRT provider, which is not supported: builds of 1.31
            need TensorRT 10 while pip installs 11, and it builds an engine at every load.
        UnknownNameError: No provider has this name.
    """
    if name == "tensorrt":
        raise InputError(
            "--provider tensorrt: ONNX Runtime's own TensorRT provider is not supported",
            fix="build a plan and run that: rtresnet build MODEL.onnx --builder tensorrt",
        )
    if name not in PROVIDERS:
        raise UnknownNameError("provider", name, ["auto", *PROVIDERS])
    return PROVIDERS[name]


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        if not hardware.installed("onnxruntime"):
            raise missing_package("onnxruntime", "running an ONNX file") from None
        raise UnavailableError(
            f"onnxruntime is installed and cannot be imported: {error}", fix="see: rtresnet doctor"
        ) from error
    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(ERRORS_ONLY)
    return onnxruntime


def _choose(
    ort: Any, options: Any, about: Provider, threads: int | None
) -> list[tuple[str, dict[str, str]]]:
    """Puts a plugin's device into the options, or returns a provider that is built in."""
    settings = {}
    if about.ep == OPENVINO_BUILT_IN.ep:
        cpu = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads)}
        settings["load_config"] = json.dumps({"CPU": cpu})
    if about.plugin is None:
        if about.ep not in ort.get_available_providers():
            raise UnavailableError(
                f"this onnxruntime was built without {about.ep}",
                fix=f"pip uninstall -y onnxruntime && pip install '{about.package}'",
            )
        if about.gpu:
            _require_gpu(about)
            _preload_cuda(ort)
        return [(about.ep, settings)]
    if not hardware.installed(about.plugin):
        raise missing_package(about.package, f"--provider for {about.shown}")
    if about.gpu:
        _require_gpu(about)
    device = _plugin_device(about)
    if device is None and about.gpu:
        raise UnavailableError(
            f"the {about.shown} offers no device on this GPU ({hardware.gpus()[0].name})",
            fix="use --provider cuda",
        )
    if device is None:
        build = OPENVINO_BUILT_IN.package
        raise UnavailableError(
            f"the {about.shown} offers no device on this processor ({hardware.cpu()}), and this "
            f"onnxruntime was built without OpenVINO",
            fix=f"use --provider cpu, or: pip uninstall -y onnxruntime && pip install {build}",
        )
    options.add_provider_for_devices([device], settings)
    return []


def openvino() -> Provider | None:
    """The OpenVINO that serves this processor: the plugin's, else onnxruntime's own; or None.

    The plugin (1.8) offers processors made by Intel only: microsoft/onnxruntime#31981. The build
    of ONNX Runtime that has OpenVINO in it runs on others too.
    """
    plugin = PROVIDERS["openvino"]
    assert plugin.plugin is not None
    if hardware.installed(plugin.plugin) and _plugin_device(plugin) is not None:
        return plugin
    built_in = OPENVINO_BUILT_IN.ep in _onnxruntime().get_available_providers()
    return OPENVINO_BUILT_IN if built_in else None


def _plugin_device(about: Provider) -> Any | None:
    """The first device of the right kind that an installed plugin offers, if any.

    Raises:
        UnavailableError: The plugin's library does not load.
    """
    ort = _onnxruntime()
    assert about.plugin is not None
    if about.plugin not in _registered:
        plugin = importlib.import_module(about.plugin)
        try:
            ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
        except Exception as error:  # ONNX Runtime's Fail, or the plugin's own
            raise UnavailableError(
                f"the {about.shown} does not load: {str(error).rpartition('error: ')[2][:200]}",
                fix="use --provider cpu",
            ) from error
        _registered.append(about.plugin)
    kinds = ort.OrtHardwareDeviceType
    kind = kinds.GPU if about.gpu else kinds.CPU
    offered = (d for d in ort.get_ep_devices() if d.ep_name == about.ep)
    return next((d for d in offered if d.device.type == kind), None)


_registered: list[str] = []  # a library is registered once a process, or ONNX Runtime raises
