"""Run ONNX files with ONNX Runtime.

The requested provider runs the whole net, or loading fails: after loading, the session reports
the provider of every node. ONNX Runtime itself falls back in four cases, with a warning at most: a
provider that was not built in (`providers.py`), one that does not start, a node that the provider
has no kernel for, and a run that fails.

Three measures make results correct and fast on a CPU. The file on disk stays as TensorRT needs it:

- A Q/DQ file is rewritten in memory (`cpu_rewrite.py`): always for ONNX Runtime's own CPU provider,
  for OpenVINO if the CPU's integer kernels would saturate.
- A BF16 file runs in float32 with every result rounded to BF16: the CPU provider has no BF16
  convolutions.
- OpenVINO computes FP32 files in BF16 on CPUs that support it (ResNet-50's logits then differ by
  11 % relative, measured). It is set to f32, because the file determines the precision.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from rtresnet.core import hardware
from rtresnet.core.errors import ArtifactError, InputError, UnavailableError, missing_package
from rtresnet.core.preprocess import pieces
from rtresnet.runtime.backend import LAYOUTS, TOPK, TopK
from rtresnet.runtime.cpu_rewrite import (
    CpuModel,
    has_bf16,
    has_fp8,
    is_quantized,
    read_quantized,
    rewrite_for_cpu,
)
from rtresnet.runtime.providers import (
    BUILDS,
    ERRORS_ONLY,
    SILENT,
    Provider,
    find_provider,
    import_onnxruntime,
    openvino,
    start_error,
    use_provider,
)

RECORD = "session.record_ep_graph_assignment_info"
NO_FALLBACK = "session.disable_cpu_ep_fallback"
# Wording of ONNX Runtime 1.31: "CUDA failure 35: CUDA driver version is insufficient for ..."
GPU_FAILURE = re.compile(r"(CUDA|CUDNN|CUBLAS\w*|CUFFT) failure \w+: [^;]+")
# By default each thread spins for tens of milliseconds after a call, and another session that is
# called meanwhile takes twice as long. This stops it between calls; within a call threads spin.
NO_SPINNING = ("session.force_spinning_stop", "1")
# Q and DQ nodes run one by one and convolutions in float: the numbers of the file on every CPU.
# Minimum for 4 images of 64 pixels in ResNet-50 (AMD EPYC with VNNI, 1 thread, ONNX Runtime 1.32):
# FP32 15.8 ms; INT8 17.5 ms so, 24.9 ms with integer kernels, and 6.2 ms after the rewrite.
NO_INTEGER_KERNELS = ("session.disable_quant_qdq", "1")
# Removes a ReLU before a QuantizeLinear with zero point 0. Only unsigned types replace it: an FP8
# ResNet-20 then has a signal to noise of 0 dB instead of 28 (ONNX Runtime 1.32).
WRONG_IN_FP8 = ["ReluQuantRewrite"]
TENSOR_TYPES = {
    "float32": "tensor(float)", "float16": "tensor(float16)", "uint8": "tensor(uint8)",
}  # fmt: skip
WITHOUT_ONNX = (
    "INT8 layers run in float, with the file's rounding, because the package onnx is not "
    "installed; for integer kernels: pip install 'rtresnet[export]'"
)


BF16_NOTE = (
    "BF16 runs in float32 with every result rounded to BF16, because ONNX Runtime's CPU provider "
    "has no BF16 convolutions"
)


class OrtBackend:
    """An ONNX file in ONNX Runtime. See `runtime.backend.Backend`.

    Args:
        path: The ONNX file.
        provider: A key of `PROVIDERS`, or "auto": OpenVINO if it supports this CPU (see
            `openvino`), else ONNX Runtime's own CPU provider.
        threads: Intra-op threads; by default all cores that this process may use.
        profile: First part of the name of ONNX Runtime's profile; None for no profile.
        preserve_numerics: On ONNX Runtime's CPU provider, skip the one rule of `cpu_rewrite.py`
            that changes results of an INT8 file, by one step at most.
        tf32: Whether the CUDA provider may run FP32 convolutions and matrix products as TF32,
            which rounds inputs to a mantissa of 10 bits, on GPUs from sm_80 on. ONNX Runtime's
            default is yes, as TensorRT's.
        rewritten: The result of `rewrite_for_cpu`, if it has been called.

    Attributes:
        placement: Number of nodes on each execution provider, as the session reports it.
        cpu_note: How an INT8 file runs if the CPU's integer sums would saturate, or if it cannot
            be rewritten because the package onnx is not installed; how a BF16 file runs; else None.
        batch: The only batch size that the file accepts; None if it accepts any. `infer` accepts
            any number of images in either case.
        tf32: As the argument for the CUDA provider; None for others.

    Raises:
        UnavailableError: The provider is not available, or part of the net would run on another.
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
        tf32: bool = True,
        rewritten: CpuModel | None = None,
    ) -> None:
        ort = import_onnxruntime()
        saturates = hardware.int8_sums_saturate()
        graph = read_quantized(path) if rewritten is None else None
        fp8 = has_fp8(graph) if rewritten is None else rewritten.fp8

        def has_untested_type() -> bool:  # OpenVINO's FP8 and BF16 are not tested
            if fp8 or graph is not None:
                return fp8
            return has_bf16(path) if rewritten is None else rewritten.emulates_bf16

        provider, about = _choose_provider(path, provider, saturates, has_untested_type)
        self.provider = about.title
        self.tf32 = tf32 if provider == "cuda" else None
        # Two builds may be installed on top of each other; the module belongs to one of them.
        builds = tuple(name for name in BUILDS if hardware.version(name) == ort.__version__)
        self.versions = {(builds or BUILDS)[0]: str(ort.__version__)}
        if about.plugin and (plugin_version := hardware.version(about.package)):
            self.versions[about.package] = plugin_version
        self.device = "cpu"
        self.cpu_note: str | None = None
        self.threads: int | None = None if about.gpu else threads or hardware.cores()
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised, and the log prints names unescaped
        options.intra_op_num_threads = self.threads or 0
        options.add_session_config_entry(*NO_SPINNING)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        providers = use_provider(ort, options, about, self.threads, tf32=tf32)
        if about.gpu:
            self.device = hardware.gpus()[0].name
        reports_placement = hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")
        if reports_placement:
            options.add_session_config_entry(RECORD, "1")
        elif provider != "cpu":  # ONNX Runtime before 1.24 cannot report it, but can reject
            options.add_session_config_entry(NO_FALLBACK, "1")
        model: str | bytes = os.fspath(path)
        if provider == "cpu" or (provider == "openvino" and saturates):
            rewritten = rewritten or rewrite_for_cpu(
                path,
                graph,
                saturates=saturates,
                integer_chains=provider == "cpu",
                preserve_numerics=preserve_numerics,
            )
            model = rewritten.model
            if rewritten.emulates_bf16:
                self.cpu_note = BF16_NOTE
            if rewritten.needs_float:
                options.add_session_config_entry(*NO_INTEGER_KERNELS)
                self.cpu_note = WITHOUT_ONNX
            elif saturates and rewritten.quantized:
                self.cpu_note = _int8_on_cpu(rewritten.float_layers)
        if about.library:  # a missing dependency would go to stderr; `start_error` reports it
            ort.set_default_logger_severity(SILENT)
        try:
            self._session: Any = ort.InferenceSession(
                model, options, providers=providers or None, enable_fallback=0,
                disabled_optimizers=WRONG_IN_FP8 if fp8 or not hardware.installed("onnx") else None,
            )  # fmt: skip
        except Exception as error:  # ONNX Runtime raises its own types, one for each status code
            raise _load_error(path, about, error) from error
        finally:
            ort.set_default_logger_severity(ERRORS_ONLY)
        if about.library and about.ep not in self._session.get_providers():
            raise start_error(path, about)
        self.placement = check_placement(self._session, about.ep) if reports_placement else {}
        self._read_io()

    def _read_io(self) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._inputs = {entry.name: (entry.type, entry.shape) for entry in inputs}
        tensor = inputs[0]
        self.input_name: str = tensor.name
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        kind = "uint8" if tensor.type == "tensor(uint8)" else "float32"
        self.input_dtype: np.dtype[Any] = np.dtype(kind)
        self.layout: Literal["nchw", "nhwc"] = LAYOUTS[kind]
        batch, side = (tensor.shape[0], tensor.shape[2]) if len(tensor.shape) == 4 else (None, None)
        self.batch = batch if isinstance(batch, int) else None
        self.size = side if isinstance(side, int) else None
        names = [output.name for output in outputs]
        self._outputs = list(TOPK) if set(TOPK) <= set(names) else names[:1]
        self.output_names: list[str] = self._outputs
        self._all_outputs = names
        self._extent = inputs[1].name if len(inputs) > 1 else ""  # of a detector

    def infer(self, images: np.ndarray) -> np.ndarray | TopK:
        """Run a batch of any N from 1. See `runtime.backend.Backend.infer`.

        A file with a fixed batch runs as often as needed, the last time with padding.

        Raises:
            InputError: Images have the wrong type or shape, or the backend is closed.
            ArtifactError: A file with a fixed batch does not return one row for each image.
            UnavailableError: The provider failed.
        """
        if self._session is None:
            raise InputError("infer: the session is closed")
        _require_native_array("images", images)
        if self.batch is None or not images.ndim or len(images) in (0, self.batch):
            return _result(self._run({self.input_name: images}))
        chunks = []
        for part, rows in pieces(images, self.batch):
            values = self._run({self.input_name: part})
            if any(len(value) != len(part) for value in values):
                shapes = ", ".join(str(list(value.shape)) for value in values)
                raise ArtifactError(
                    f"takes batches of {self.batch} and returns {shapes}, expected one row for "
                    "each image",
                    fix=f"call it with {self.batch} images, or export it with a dynamic batch",
                )
            chunks.append([value[:rows] for value in values])
        return _result([np.concatenate(parts) for parts in zip(*chunks, strict=True)])

    def detect(self, images: np.ndarray, extent: np.ndarray) -> dict[str, np.ndarray]:
        """Run a detector on one image.

        Args:
            images: float32 [1, 3, H, W], of the file's size.
            extent: Height and width of the image on that canvas, float32 [1, 2].

        Returns:
            The outputs by name.

        Raises:
            InputError: Wrong type or shape, or the backend is closed.
            UnavailableError: The provider failed.
        """
        if self._session is None:
            raise InputError("detect: the session is closed")
        _require_native_array("images", images)
        _require_native_array("extent", extent)
        feeds = {self.input_name: images, self._extent: extent}
        return dict(zip(self._all_outputs, self._run(feeds, self._all_outputs), strict=True))

    def _run(
        self, feeds: dict[str, np.ndarray], outputs: list[str] | None = None
    ) -> list[np.ndarray]:
        try:
            values: list[np.ndarray] = self._session.run(outputs or self._outputs, feeds)
        except Exception as error:  # ONNX Runtime raises its own types, for both kinds
            for name, entry in feeds.items():
                if not _fits(entry, *self._inputs[name]):
                    raise InputError(
                        f"{name}: {entry.dtype} {list(entry.shape)} does not fit: "
                        f"{str(error)[:200]}"
                    ) from error
            reason = _reason(error)
            raise UnavailableError(
                f"{self.provider} failed: {reason}", fix=hardware.driver_fix(reason)
            ) from error
        return values

    def timings(self) -> dict[str, float]:
        """Return an empty dict: ONNX Runtime has no events; only wall time is known."""
        return {}

    def end_profile(self) -> str:
        """End the profile and return its path."""
        path: str = self._session.end_profiling()
        return path

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def _require_native_array(name: str, values: object) -> None:
    """Raise InputError unless `values` is a NumPy array in this machine's byte order."""
    if not isinstance(values, np.ndarray):
        raise InputError(f"{name}: {type(values).__name__}, not a NumPy array")
    if not values.dtype.isnative:  # ONNX Runtime ignores the byte order
        raise InputError(
            f"{name}: {values.dtype}, which is not in this machine's byte order",
            fix=f"{name}.astype({name}.dtype.newbyteorder('='))",
        )


def _fits(values: np.ndarray, kind: str, shape: Sequence[int | str | None]) -> bool:
    """Return whether an array fits an input; a name in its shape stands for any length from 1."""
    return (
        kind == TENSOR_TYPES.get(values.dtype.name)
        and len(values.shape) == len(shape)
        and all(
            length == expected if isinstance(expected, int) else length > 0
            for length, expected in zip(values.shape, shape, strict=True)
        )
    )


def _choose_provider(
    path: str | os.PathLike[str], name: str, saturates: bool, has_untested_type: Callable[[], bool]
) -> tuple[str, Provider]:
    """Return the name and description of a provider; "auto" is OpenVINO or the CPU provider."""
    if name not in ("auto", "openvino"):
        return name, find_provider(name)
    available = openvino()
    # OpenVINO would saturate, and the file cannot be rewritten.
    unfit = saturates and not hardware.installed("onnx") and is_quantized(path)
    if name == "openvino":
        if unfit:
            raise missing_package("onnx", f"{path}: INT8 in OpenVINO on a CPU without VNNI")
        return name, available or find_provider(name)
    if available is None or unfit or has_untested_type():
        return "cpu", find_provider("cpu")
    return "openvino", available


def _result(outputs: Sequence[np.ndarray]) -> np.ndarray | TopK:
    """Return logits, or the two outputs of a top-K file."""
    return (outputs[0], outputs[1]) if len(outputs) > 1 else outputs[0]


def _int8_on_cpu(float_layers: Sequence[str]) -> str:
    """Describe how layers run whose sums would saturate."""
    shown = ", ".join(float_layers[:3]) + (", ..." if len(float_layers) > 3 else "")
    count = f"{len(float_layers)} layer{'s run' if len(float_layers) > 1 else ' runs'}"
    change = f"{count} in float ({shown})" if float_layers else "none in this file"
    return f"this CPU has no VNNI, so 16-bit INT8 sums could saturate: {change}"


def check_placement(session: Any, ep: str) -> dict[str, int]:
    """Check that an ONNX Runtime session assigned every node to the requested execution provider.

    Args:
        session: An InferenceSession that was created with `RECORD` on.
        ep: The execution provider that must run all nodes.

    Returns:
        Number of nodes by execution provider.

    Raises:
        UnavailableError: Some nodes are on another provider; the message has their number and the
            first of them.
    """
    nodes = [
        (part.ep_name, node.name or "unnamed", node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    others = [(name, op, other) for other, name, op in nodes if other != ep]
    if others:
        examples = ", ".join(f"{name} ({op}) on {other}" for name, op, other in others[:3])
        raise UnavailableError(
            f"{ep} was requested, but {len(others)} of {len(nodes)} nodes would run on another "
            f"provider: {examples}{', ...' if len(others) > 3 else ''}",
            fix="see which providers are available: rtresnet doctor",
        )
    return dict(Counter(provider for provider, _, _ in nodes))


def _load_error(
    path: str | os.PathLike[str], about: Provider, error: Exception
) -> ArtifactError | UnavailableError:
    """Return the error for a file that did not load: the file's or the provider's fault."""
    reason = _reason(error)
    no_fallback = "fallback to CPU EP" in str(error)
    if no_fallback or type(error).__name__ == "EPFail" or GPU_FAILURE.search(str(error)):
        return UnavailableError(
            f"{path}: {about.title} was requested but cannot run it ({reason})",
            fix=hardware.driver_fix(reason) or "see which providers are available: rtresnet doctor",
        )
    return ArtifactError(
        f"{path}: {about.title} cannot load it ({reason})", fix="check it with: rtresnet inspect"
    )


def _reason(error: Exception) -> str:
    """Return the part of ONNX Runtime's message that names the cause."""
    failure = GPU_FAILURE.search(str(error))
    return (failure[0] if failure else str(error)).strip()[:200]
