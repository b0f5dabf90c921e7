"""Peak rates, and the minimum time that they imply.

Rates of this machine are measured and cached: a matrix product in ONNX Runtime for each data type,
and a copy in NumPy on all threads, the best of many repetitions. The cache is
~/.cache/rtresnet/roofline.json (RTRESNET_CACHE), by processor, threads and version of ONNX Runtime.

Rates of GPUs are those that NVIDIA publishes: dense (without structured sparsity), at the boost
clock, FP16 and FP8 with FP16 accumulation if that is faster, BF16 with FP32 accumulation, FP32 as
TF32 on GPUs with tensor cores for it. The figures were entered from memory of the named documents
and not compared with them, which every estimate says. Each row also has what the FP16 rate and the
bandwidth consist of: streaming multiprocessors, operations per clock and clock, and width and data
rate of the memory. A test compares them, so that a mistyped figure is found. A bound from published
rates is never a measurement: real kernels reach a part of the peak, and launches, copies and
synchronization are added.
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
from dataclasses import dataclass, fields, replace
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
        fastest: The same, of any other type; None if the types above are the fastest.
        bandwidth: Bytes per second, read and written together.
        source: Origin of the rates.
    """

    fp32: float
    int8: float
    fp16: float | None = None
    bf16: float | None = None
    fp8: float | None = None
    fastest: float | None = None
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
            rates: list[float | None] = [
                self.fastest,
                *(getattr(self, name) for name in PRECISIONS),
            ]
            return max(rate for rate in rates if rate is not None)
        if self.fp16 is None and dtype in ("fp16", "bf16"):  # a CPU
            return self.fp32
        rate: float | None = getattr(self, dtype)
        if rate is None:
            raise InputError(f"this device has no {dtype.upper()} rate (source: {self.source})")
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
class Multiprocessors:
    """What a GPU's rate of FP16 and its bandwidth consist of.

    Attributes:
        count: Number of streaming multiprocessors.
        operations: FP16 operations of one of them per clock, in dense matrix products.
        ghz: Boost clock of the tensor cores.
        bits: Width of the memory interface.
        gbps: Data rate of one of its bits, in 10^9 per second.
    """

    count: int
    operations: int
    ghz: float
    bits: int
    gbps: float

    @property
    def fp16(self) -> float:
        """Rate of FP16, in 10^12 operations per second."""
        return self.count * self.operations * self.ghz / 1e3

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth, in 10^9 bytes per second."""
        return self.bits * self.gbps / 8

    def __str__(self) -> str:
        return (
            f"{self.count} SMs x {self.operations:,} x {self.ghz:g} GHz, {self.bits:,} bits x "
            f"{self.gbps:g} Gbit/s"
        )


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """Published figures of a GPU.

    Attributes:
        fp32, fp16, int8: Peak rate of dense matrix products, in 10^12 operations per second.
        bf16, fp8: The same; None for a GPU without it.
        bandwidth: Memory bandwidth, in 10^9 bytes per second.
        l2: Size of the L2 cache, in 2^20 bytes (published as MB).
        source: The document with the figures.
        parts: What the rate of FP16 and the bandwidth consist of.
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
    parts: Multiprocessors

    @property
    def described(self) -> str:
        """The document, and how the figures were entered."""
        return f"{self.source}, entered from memory and not compared with it ({self.parts})"

    @property
    def dtypes(self) -> frozenset[str]:
        """The data types whose products it computes."""
        return frozenset(name for name in PRECISIONS if getattr(self, name) is not None)

    @property
    def rates(self) -> PeakRates:
        """The published rates."""
        rates = {name: getattr(self, name) * 1e12 for name in self.dtypes}
        return PeakRates(
            **rates,
            # INT4 (T4 to Ada) and FP4 (RTX 50) have twice the rate of INT8; Hopper has neither.
            fastest=2e12 * self.int8,
            bandwidth=self.bandwidth * 1e9,
            source=f"published: {self.described}",
        )


def _gpus(table: Sequence[tuple[Any, ...]]) -> tuple[GpuSpec, ...]:
    """Return the rows of the table; its columns are in the order of `GpuSpec`'s fields."""
    names = [field.name for field in fields(GpuSpec)][:-1]
    parts = [field.name for field in fields(Multiprocessors)]
    return tuple(
        GpuSpec(
            **dict(zip(names, row[: len(names)], strict=True)),
            parts=Multiprocessors(**dict(zip(parts, row[len(names) :], strict=True))),
        )
        for row in table
    )


DATASHEET = "NVIDIA {} Tensor Core GPU datasheet, Specifications"
GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper"
ADA = "NVIDIA Ada GPU Architecture whitepaper"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
HOPPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper"
# The datasheet of L40S has 362 for FP16, but 733 for FP8 and 183 for TF32, whose half and double
# are 366: a bound takes the higher rate.
GPUS = _gpus((
    # name, FP32, FP16, BF16, INT8, FP8, GB/s, L2, source, SMs, operations, GHz, bits, Gbit/s
    ("T4", 8.1, 65, None, 130, None, 320, 4, DATASHEET.format("T4"), 40, 1024, 1.59, 256, 10),
    ("A10", 62.5, 125, 125, 250, None, 600, 6, DATASHEET.format("A10"),
     72, 1024, 1.695, 384, 12.5),
    ("A30", 82, 165, 165, 330, None, 933, 24, DATASHEET.format("A30"),
     56, 2048, 1.44, 3072, 2.43),
    ("A100 40GB", 156, 312, 312, 624, None, 1555, 40, DATASHEET.format("A100"),
     108, 2048, 1.41, 5120, 2.43),
    ("A100 80GB", 156, 312, 312, 624, None, 2039, 40, DATASHEET.format("A100"),
     108, 2048, 1.41, 5120, 3.186),
    ("L4", 60, 121, 121, 242, 242, 300, 48, DATASHEET.format("L4"), 58, 1024, 2.04, 192, 12.5),
    ("L40S", 183, 366, 366, 733, 733, 864, 96, "NVIDIA L40S GPU datasheet, Specifications",
     142, 1024, 2.52, 384, 18),
    ("RTX 3090", 35.6, 142, 71, 284, None, 936, 6, GA102, 82, 1024, 1.695, 384, 19.5),
    ("RTX 4090", 82.6, 330.3, 165.2, 660.6, 660.6, 1008, 72, ADA, 128, 1024, 2.52, 384, 21),
    ("RTX 5090", 104.8, 419, 209.5, 838, 838, 1792, 96, BLACKWELL, 170, 1024, 2.407, 512, 28),
    ("H100 PCIe", 378, 756, 756, 1513, 1513, 2039, 50, HOPPER, 114, 4096, 1.62, 5120, 3.186),
    ("H100 SXM", 494.7, 989.4, 989.4, 1978.9, 1978.9, 3352, 50, HOPPER,
     132, 4096, 1.83, 5120, 5.238),
    ("H200 SXM", 494.7, 989.4, 989.4, 1978.9, 1978.9, 4800, 50, DATASHEET.format("H200"),
     132, 4096, 1.83, 6144, 6.25),
))  # fmt: skip
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
