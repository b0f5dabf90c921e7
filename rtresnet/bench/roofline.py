"""Peak rates, and the minimum time that they imply.

Rates of this machine are measured and cached: a matrix product in ONNX Runtime for each data type,
and a copy in NumPy on all threads, the best of many repetitions. The cache is
~/.cache/rtresnet/roofline.json (RTRESNET_CACHE), by processor, threads and version of ONNX Runtime.

Rates of GPUs are those that NVIDIA publishes: dense (without structured sparsity), at the boost
clock, FP16 and FP8 with FP16 accumulation if that is faster, BF16 with FP32 accumulation, FP32 as
TF32 on GPUs with tensor cores for it. The figures were entered from memory of the named documents;
`checked` names a page that was read and repeats the rates of FP16 and FP8 and the bandwidth, and
rows without one are called unverified wherever they are shown. A bound from published rates is
never a measurement: real kernels reach a part of the peak, and launches, copies and synchronization
are added.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rtresnet.bench.kernels import Kernel
from rtresnet.core import atomic_io, hardware
from rtresnet.core.errors import InputError, UnknownNameError, missing_package
from rtresnet.core.precisions import PRECISIONS
from rtresnet.core.serialization import from_json
from rtresnet.runtime.ort import OrtBackend

SIDES = (512, 1024)  # sides of the matrices
COPY = 128 << 20  # bytes: far beyond any cache
SECONDS = 0.6  # for each measurement
CACHED = ("fp32", "int8", "bandwidth")


@dataclass(frozen=True, kw_only=True)
class PeakRates:
    """The roof that achieved rates are compared with.

    Attributes:
        fp32, int8: Operations per second; a multiply-add counts as two.
        fp16: The same; None on a CPU, which computes FP16 in FP32.
        bf16, fp8: The same; None on a device without it, and BF16 on a CPU.
        bandwidth: Bytes per second, read and written together.
        source: Origin of the rates.
    """

    fp32: float
    int8: float
    fp16: float | None = None
    bf16: float | None = None
    fp8: float | None = None
    bandwidth: float
    source: str = ""

    def rate(self, dtype: str) -> float:
        """Return operations per second in a precision of `core.precisions`.

        The rate of another type, such as `kernels.UNKNOWN`, is the fastest: a time that follows
        from it is still a lower bound.

        Raises:
            InputError: The device does not have it.
        """
        if dtype not in PRECISIONS:
            rates: list[float | None] = [getattr(self, name) for name in PRECISIONS]
            return max(rate for rate in rates if rate is not None)
        if self.fp16 is None and dtype in ("fp16", "bf16"):  # a CPU
            return self.fp32
        rate: float | None = getattr(self, dtype)
        if rate is None:
            raise InputError(f"no {dtype.upper()} rate is {self.source or 'known'}")
        return rate


def cache_file() -> Path:
    """Return the file that stores the measured peak rates."""
    folder = os.environ.get("RTRESNET_CACHE", Path.home() / ".cache" / "rtresnet")
    return Path(folder) / "roofline.json"


def key(threads: int) -> str:
    """Return the cache key of the peak rates: processor, threads and version of ONNX Runtime."""
    version = hardware.version("onnxruntime", "onnxruntime-gpu")
    return f"{hardware.cpu()}; {threads} threads; onnxruntime {version}"


def of_this_machine(
    threads: int, *, remeasure: bool = False, measure: Callable[[int], PeakRates] | None = None
) -> PeakRates:
    """Return the peak rates of this machine, measured now or earlier.

    An unreadable cache is replaced; a cache that cannot be written is ignored.

    Args:
        threads: CPU threads.
        remeasure: Whether to ignore the cache.
        measure: Replaces `measure_roof` in tests.
    """
    path, name = cache_file(), key(threads)
    cached = _read(path)
    if not remeasure and name in cached:
        return replace(cached[name], source=f"measured earlier, {path}")
    rates = (measure or measure_roof)(threads)
    entries = {
        label: {field: getattr(entry, field) for field in CACHED}
        for label, entry in (cached | {name: rates}).items()
    }
    with contextlib.suppress(OSError, ValueError):  # a home that is not writable
        atomic_io.write_text(path, json.dumps(entries, indent=1) + "\n")
    return replace(rates, source="measured just now")


def _read(path: Path) -> dict[str, PeakRates]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rates = {name: from_json(PeakRates, entry) for name, entry in data.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {
        name: entry
        for name, entry in rates.items()
        if min(getattr(entry, field) for field in CACHED) > 0
    }


def measure_roof(threads: int) -> PeakRates:
    """Measure all three rates, in about two seconds."""
    return PeakRates(
        fp32=max(_product(side, "fp32", threads) for side in SIDES),
        int8=max(_product(side, "int8", threads) for side in SIDES),
        bandwidth=_copy(threads),
    )


def _best(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of many calls."""
    call()
    best, until = float("inf"), time.perf_counter() + SECONDS / 2
    while True:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > until:
            return best


def _product(side: int, dtype: str, threads: int) -> float:
    rng = np.random.default_rng(0)
    if dtype == "int8":  # the types that runtime/ort.py uses on this processor
        weight = rng.integers(0, 100, (side, side)).astype(
            np.int8 if not hardware.int8_sums_saturate() else np.uint8
        )
        images = rng.integers(0, 255, (side, side), dtype=np.uint8)
    else:
        weight = rng.standard_normal((side, side)).astype(np.float32)
        images = rng.standard_normal((side, side)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="rtresnet-roof-") as folder:
        path = Path(folder) / "product.onnx"
        path.write_bytes(_model(weight, images))
        backend = OrtBackend(path, provider="cpu", threads=threads)
        seconds = _best(lambda: backend.infer(images))
        backend.close()
    return float(2 * side**3 / seconds)


def _model(weight: np.ndarray, images: np.ndarray) -> bytes:
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise missing_package("onnx", "measuring the roofline") from None
    whole = weight.dtype != np.float32
    node = helper.make_node("MatMulInteger" if whole else "MatMul", ["x", "w"], ["y"])
    out = TensorProto.INT32 if whole else TensorProto.FLOAT
    shape = list(weight.shape)
    kinds: dict[Any, int] = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", kinds[images.dtype.name], shape)],
        [helper.make_tensor_value_info("y", out, shape)],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 18)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


def _copy(threads: int) -> float:
    parts = [np.ones(COPY // threads // 8) for _ in range(threads)]
    into = [np.empty_like(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best(lambda: list(pool.map(np.copyto, into, parts)))
    return 2 * sum(part.nbytes for part in parts) / seconds


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """Published figures of a GPU.

    Attributes:
        fp32, fp16, int8: Peak rate of dense matrix products, in 10^12 operations per second.
        bf16, fp8: The same; None for a GPU without it.
        bandwidth: Memory bandwidth, in 10^9 bytes per second.
        l2: Size of the L2 cache, in 2^20 bytes (published as MB).
        source: The document with the figures.
        checked: A page that repeats those of FP16, FP8 and the bandwidth; empty: none was read.
    """

    name: str
    fp32: float
    fp16: float
    bf16: float | None
    int8: float
    fp8: float | None
    bandwidth: float
    l2: float
    source: str
    checked: str = ""

    @property
    def described(self) -> str:
        """The document, and whether the figures were compared with a second one."""
        if self.checked:
            return f"{self.source}; compared with {self.checked}"
        return f"{self.source}; unverified: from memory, not compared with a document"

    @property
    def dtypes(self) -> frozenset[str]:
        """The data types whose products it computes."""
        return frozenset(name for name in PRECISIONS if getattr(self, name) is not None)

    @property
    def rates(self) -> PeakRates:
        """The published rates."""
        rates = {name: getattr(self, name) * 1e12 for name in self.dtypes}
        return PeakRates(
            **rates, bandwidth=self.bandwidth * 1e9, source=f"published: {self.described}"
        )


def _gpu(
    name: str, fp32: float, fp16: float, bf16: float | None, int8: float, fp8: float | None,
    bandwidth: float, l2: float, source: str, checked: str = "",
) -> GpuSpec:  # fmt: skip
    return GpuSpec(
        name=name, fp32=fp32, fp16=fp16, bf16=bf16, int8=int8, fp8=fp8, bandwidth=bandwidth, l2=l2,
        source=source, checked=checked,
    )  # fmt: skip


TURING = "NVIDIA Turing GPU Architecture whitepaper, WP-09183-001"
GA100 = "NVIDIA A100 Tensor Core GPU Architecture whitepaper"
GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper"
ADA = "NVIDIA Ada GPU Architecture whitepaper"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
HOPPER = "NVIDIA H100 Tensor Core GPU datasheet; L2: H100 Architecture whitepaper"
# The pages of H100 and RTX 4090 also repeat the L2 cache. Two more were read: an RTX 4090's rate of
# INT8, and half of its rates for FP16 and FP8 with FP32 accumulation, are in
# https://waredb.com/processor/nvidia-geforce-rtx-4090; T4's bandwidth and cache are in
# https://sysrqmts.com/gpus/compare/nvidia-a100-sxm4-40-gb-vs-nvidia-tesla-t4.
H100_PAGE = "https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html"
GPUS = (
    _gpu("T4", 8.1, 65, None, 130, None, 320, 4, TURING,
         "https://hmc-tech.com/gpu/nvidia-a800-40gb-vs-nvidia-t4"),
    _gpu("A10", 62.5, 125, 125, 250, None, 600, 6, "NVIDIA A10 Tensor Core GPU datasheet"),
    _gpu("A30", 82, 165, 165, 330, None, 933, 24, "NVIDIA A30 Tensor Core GPU datasheet"),
    _gpu("A100 40GB", 156, 312, 312, 624, None, 1555, 40, GA100),
    _gpu("A100 80GB", 156, 312, 312, 624, None, 2039, 40,
         "NVIDIA A100 80GB datasheet; L2: " + GA100),
    _gpu("L4", 60, 121, 121, 242, 242, 300, 48, "NVIDIA L4 Tensor Core GPU datasheet; L2: " + ADA,
         "https://grokipedia.com/page/NVIDIA_L4_vs_L40S"),
    _gpu("L40S", 183, 362, 362, 733, 733, 864, 96, "NVIDIA L40S GPU datasheet; L2: " + ADA,
         "https://www.mullet.se/product.html?product_id=355414"),
    _gpu("RTX 3090", 35.6, 142, 71, 284, None, 936, 6, GA102),
    _gpu("RTX 4090", 82.6, 330.3, 165.2, 660.6, 660.6, 1008, 72, ADA,
         "https://holynerdvana.blogspot.com/2022/10/nvidia-geforce-rtx-4090-specifications.html"),
    _gpu("RTX 5090", 104.8, 419, 209.5, 838, 838, 1792, 96, BLACKWELL,
         "https://www.spheron.network/blog/nvidia-rtx-5090-specs/"),
    _gpu("H100 PCIe", 378, 756, 756, 1513, 1513, 2000, 50, HOPPER, H100_PAGE),
    _gpu("H100 SXM", 494, 989, 989, 1979, 1979, 3350, 50, HOPPER, H100_PAGE),
    _gpu("H200 SXM", 494, 989, 989, 1979, 1979, 4800, 50, "NVIDIA H200 Tensor Core GPU datasheet",
         "https://itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html"),
)  # fmt: skip
# Cards with several variants: the default variant of a short name.
DEFAULT_FORM = {"a100": "A100 80GB", "h100": "H100 SXM", "h200": "H200 SXM"}
IGNORED_WORDS = {
    "nvidia", "geforce", "tesla", "tensor", "core", "gpu", "sxm", "sxm4", "sxm5", "pcie",
    "16gb", "24gb", "32gb", "40gb", "48gb", "80gb", "141gb", "hbm2e", "hbm3", "hbm3e",
}  # fmt: skip


def find_gpu(name: str) -> GpuSpec:
    """Find a GPU by its name, as people and drivers write it: "rtx4090", "NVIDIA A100-SXM4-80GB".

    Raises:
        UnknownNameError: Not in the table.
    """
    words = _words(name)
    for gpu in GPUS:
        required = _words(gpu.name)
        if required <= words and words - required <= IGNORED_WORDS:
            return gpu
    for family, form in DEFAULT_FORM.items():
        if family in words and words - {family} <= IGNORED_WORDS:
            return find_gpu(form)
    raise UnknownNameError("GPU", name, [gpu.name for gpu in GPUS])


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", re.sub(r"rtx(?=\d)", "rtx ", name.lower())))


@dataclass(frozen=True, kw_only=True)
class MinimumTime:
    """The minimum time of one kernel for a whole batch, in milliseconds.

    Attributes:
        compute: Multiply-adds at the peak rate.
        memory: All bytes read and written at the memory's bandwidth.
        beyond_cache: Only the bytes that do not fit the L2 cache.
    """

    kernel: Kernel
    compute: float
    memory: float
    beyond_cache: float

    @property
    def least(self) -> float:
        """Lower bound of any implementation."""
        return max(self.compute, self.beyond_cache)

    @property
    def through_memory(self) -> float:
        """Lower bound of implementations that write every kernel's output to memory."""
        return max(self.compute, self.memory)


def minimum_times(kernels: Sequence[Kernel], gpu: GpuSpec, batch: int) -> list[MinimumTime]:
    """Return the minimum time of each kernel, for kernels that run one after another.

    Tensors, and the weights of all kernels together, are assumed to stay in the L2 cache as far
    as they fit; only the rest goes through memory.

    Raises:
        InputError: The batch is below 1.
    """
    if batch < 1:
        raise InputError(f"--batch {batch}: a batch has at least one image")
    cache, rates = gpu.l2 * 2**20, gpu.rates
    weights = sum(kernel.weights for kernel in kernels)
    uncached = max(0.0, 1 - cache / weights) if weights else 0.0
    bounds = []
    for kernel in kernels:
        tensors = [batch * size for size in (*kernel.read, kernel.written)]
        outside = sum(max(0.0, size - cache) for size in tensors) + kernel.weights * uncached
        bounds.append(
            MinimumTime(
                kernel=kernel,
                compute=2e3 * batch * kernel.multiply_adds / rates.rate(kernel.dtype),
                memory=1e3 * (sum(tensors) + kernel.weights) / rates.bandwidth,
                beyond_cache=1e3 * outside / rates.bandwidth,
            )
        )
    return bounds
