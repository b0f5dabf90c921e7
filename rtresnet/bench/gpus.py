"""What NVIDIA publishes of its GPUs, and the least time a net can take on one that is not here.

Peak rates are dense (without structured sparsity) and at the published boost clock, FP16 with FP16
accumulation where the two differ, FP32 on tensor cores as TF32 where there are any. A bound made
of them is never a measurement: real kernels reach a part of the peak, and launches, copies and
synchronization come on top.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rtresnet.bench.kernels import Kernel
from rtresnet.core.errors import InputError, UnknownNameError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as published.

    Attributes:
        fp32, fp16, int8: Peak of dense matrix products, in 10^12 operations a second.
        bandwidth: Of its memory, in 10^9 bytes a second.
        l2: Second-level cache, in 2^20 bytes: what is published as MB.
        source: The document the rates stand in.
    """

    name: str
    fp32: float
    fp16: float
    int8: float
    bandwidth: float
    l2: float
    source: str

    def rate(self, dtype: str) -> float:
        """Operations a second."""
        return {"fp32": self.fp32, "fp16": self.fp16, "int8": self.int8}[dtype] * 1e12


def _gpu(
    name: str, fp32: float, fp16: float, int8: float, bandwidth: float, l2: float, source: str
) -> Gpu:
    return Gpu(
        name=name, fp32=fp32, fp16=fp16, int8=int8, bandwidth=bandwidth, l2=l2, source=source
    )


TURING = "NVIDIA Turing GPU Architecture whitepaper, WP-09183-001"
GA100 = "NVIDIA A100 Tensor Core GPU Architecture whitepaper"
GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper"
ADA = "NVIDIA Ada GPU Architecture whitepaper"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
HOPPER = "NVIDIA H100 Tensor Core GPU datasheet; L2: H100 Architecture whitepaper"
GPUS = (
    _gpu("T4", 8.1, 65, 130, 320, 4, TURING),
    _gpu("A10", 62.5, 125, 250, 600, 6, "NVIDIA A10 Tensor Core GPU datasheet"),
    _gpu("A30", 82, 165, 330, 933, 24, "NVIDIA A30 Tensor Core GPU datasheet"),
    _gpu("A100 40GB", 156, 312, 624, 1555, 40, GA100),
    _gpu("A100 80GB", 156, 312, 624, 2039, 40, "NVIDIA A100 80GB datasheet; L2: " + GA100),
    _gpu("L4", 60, 121, 242, 300, 48, "NVIDIA L4 Tensor Core GPU datasheet; L2: " + ADA),
    _gpu("L40S", 183, 362, 733, 864, 96, "NVIDIA L40S GPU datasheet; L2: " + ADA),
    _gpu("RTX 3090", 35.6, 142, 284, 936, 6, GA102),
    _gpu("RTX 4090", 82.6, 330.3, 660.6, 1008, 72, ADA),
    _gpu("RTX 5090", 104.8, 419, 838, 1792, 96, BLACKWELL),
    _gpu("H100 PCIe", 378, 756, 1513, 2000, 50, HOPPER),
    _gpu("H100 SXM", 494, 989, 1979, 3350, 50, HOPPER),
    _gpu("H200 SXM", 494, 989, 1979, 4800, 50, "NVIDIA H200 Tensor Core GPU datasheet"),
)  # fmt: skip
# A card that comes in several forms: which one is meant where nothing else is said.
FIRST_MEANT = {"a100": "A100 80GB", "h100": "H100 SXM", "h200": "H200 SXM"}
SAYS_NOTHING = {
    "nvidia", "geforce", "tesla", "tensor", "core", "gpu", "sxm", "sxm4", "sxm5", "pcie",
    "16gb", "24gb", "32gb", "40gb", "48gb", "80gb", "141gb", "hbm2e", "hbm3", "hbm3e",
}  # fmt: skip


def find(name: str) -> Gpu:
    """A GPU by its name, as people and drivers write it: "rtx4090", "NVIDIA A100-SXM4-80GB".

    Raises:
        UnknownNameError: Not in the table.
    """
    words = _words(name)
    for gpu in GPUS:
        wanted = _words(gpu.name)
        if wanted <= words and words - wanted <= SAYS_NOTHING:
            return gpu
    for family, form in FIRST_MEANT.items():
        if family in words and words - {family} <= SAYS_NOTHING:
            return find(form)
    raise UnknownNameError("GPU", name, [gpu.name for gpu in GPUS])


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", re.sub(r"rtx(?=\d)", "rtx ", name.lower())))


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The least time of one kernel for a whole batch, in milliseconds.

    Attributes:
        compute: Multiply-adds at the peak rate.
        memory: Every byte in and out at the memory's bandwidth.
        beyond_cache: Only the bytes that the L2 cache cannot hold.
    """

    kernel: Kernel
    compute: float
    memory: float
    beyond_cache: float

    @property
    def least(self) -> float:
        """No implementation is faster."""
        return max(self.compute, self.beyond_cache)

    @property
    def through_memory(self) -> float:
        """No implementation is faster that leaves every kernel's output in memory."""
        return max(self.compute, self.memory)


def estimate(kernels: Sequence[Kernel], gpu: Gpu, batch: int) -> list[Bound]:
    """A bound for each kernel, one after another.

    A tensor, or the weights of all kernels together, stays in the L2 cache as far as it fits, and
    only the rest must pass through memory.

    Raises:
        InputError: The batch is below 1.
    """
    if batch < 1:
        raise InputError(f"--batch {batch}: a batch holds at least one image")
    cache = gpu.l2 * 2**20
    weights = sum(kernel.weights for kernel in kernels)
    kept_out = max(0.0, 1 - cache / weights) if weights else 0.0
    bounds = []
    for kernel in kernels:
        tensors = [batch * size for size in (*kernel.read, kernel.written)]
        outside = sum(max(0.0, size - cache) for size in tensors) + kernel.weights * kept_out
        bounds.append(
            Bound(
                kernel=kernel,
                compute=2e3 * batch * kernel.multiply_adds / gpu.rate(kernel.dtype),
                memory=1e3 * (sum(tensors) + kernel.weights) / (gpu.bandwidth * 1e9),
                beyond_cache=1e3 * outside / (gpu.bandwidth * 1e9),
            )
        )
    return bounds
