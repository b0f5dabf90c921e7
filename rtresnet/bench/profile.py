"""Recorded times of nodes by layer, block and stage, compared with a roofline.

Runtimes rename nodes when they fuse them, and insert reorders and conversions with their own
names. A node that is not recognized by its name is counted with the block of the preceding
node.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rtresnet.bench.kernels import Kernel
from rtresnet.bench.roofline import PeakRates

AGREES = 0.10  # largest relative difference between the sum of the layers and the whole
IDLE = 0.25  # share of the roof below which neither arithmetic nor memory bounds a block
ADDED = re.compile(
    r"^(InsertedPrecisionFreeCast_|fused )"
    r"|(_nchwc|_token_\d+|/duplicated|_quant|(_U\d+)?_myl\d+_\d+)$"
)
SEPARATORS = re.compile(r"[\s+(),\[\]{}\x1f]+")
INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger")
WORK = ("Conv", "Gemm", "MatMul", "Pool", "ReduceMean")


@dataclass(frozen=True, kw_only=True)
class ProfiledLayer:
    """One node as it ran.

    Attributes:
        block: The block that it is counted with.
        recognized: Whether its name stands for a node of the file.
        ms: Median of its times.
    """

    name: str
    op: str
    block: str
    recognized: bool
    ms: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """A block or a stage.

    Attributes:
        ms: Sum of its layers.
        share: Share of the sum of all, in [0, 1].
        other: Share of `ms` in neither products nor poolings (reorders, conversions), in [0, 1].
        flops: Operations for the batch; a multiply-add counts as two.
        bytes: Minimum of bytes read and written for the batch.
        flops_per_second, bytes_per_second: Achieved rates.
        compute, memory: Milliseconds at the peak rates; None if these are unknown.
        bound: "compute", "memory" or "overhead"; None if the peak rates are unknown.
    """

    name: str
    stage: str
    ms: float
    share: float
    other: float
    flops: int
    bytes: int
    flops_per_second: float
    bytes_per_second: float
    compute: float | None
    memory: float | None
    bound: str | None


@dataclass(frozen=True, kw_only=True)
class NetProfile:
    """The time of a net by layer, block and stage.

    Attributes:
        whole: Median of runs without a profiler, in milliseconds.
        total: Sum of the layers.
        agrees: Whether the two are within 10 % of each other.
        runs: Number of profiled runs.
        unrecognized: Share of the time in nodes that were not recognized by their name.
        int8_products: Number of INT8 products of the file that ran in INT8, and their total; None
            unless the runtime reports it.
    """

    whole: float
    total: float
    agrees: bool
    runs: int
    unrecognized: float
    int8_products: tuple[int, int] | None
    layers: tuple[ProfiledLayer, ...]
    blocks: tuple[Part, ...]
    stages: tuple[Part, ...]


def recognize(name: str, nodes: Mapping[str, str]) -> str | None:
    """Return the node of the file that a name after fusion stands for, or None.

    `layer1.0.relu1_nchwc`, `conv1_token_7` (ONNX Runtime), `conv1 + PWN(relu)` (TensorRT),
    `layer1.0.conv1_U4_myl0_4` (TensorRT-RTX).
    """
    for candidate in (name, *SEPARATORS.split(name)):
        part = candidate
        while part:
            if part in nodes:
                return part
            shorter = ADDED.sub("", part)
            if shorter == part:
                break
            part = shorter
    return None


def engine_blocks(layers: Mapping[str, Sequence[str]], blocks: Mapping[str, str]) -> dict[str, str]:
    """Find the block of each layer of a TensorRT engine.

    Names of generated kernels (`__myl_MulAddRelu_myl0_6`) do not name nodes of the net, so the
    builder's record of the layers is needed.

    Args:
        layers: Maps a layer's name to its ONNX nodes.
        blocks: Maps a node's name to its block.

    Returns:
        Maps a layer's name to the block of most of its nodes; layers without a known node are
        omitted.
    """
    result = {}
    for name, nodes in layers.items():
        counts = Counter(blocks[node] for node in nodes if node in blocks)
        if counts:
            result[name] = counts.most_common(1)[0][0]
    return result


def layers_of(
    runs: Sequence[Sequence[tuple[str, str, float]]], blocks: Mapping[str, str]
) -> list[ProfiledLayer]:
    """Take medians over the runs with the usual number of nodes.

    Args:
        runs: For each run (name, operator, milliseconds) of its nodes, in the order they ran.
        blocks: Maps a node's name to its block.
    """
    counts = [len(run) for run in runs]
    usual = max(set(counts), key=counts.count)
    same = [run for run in runs if len(run) == usual]
    times = np.median([[ms for _, _, ms in run] for run in same], axis=0)
    recognized = [recognize(name, blocks) for name, _, _ in same[0]]
    current = next((blocks[node] for node in recognized if node), "")
    layers = []
    for (name, op, _), node, ms in zip(same[0], recognized, times, strict=True):
        current = blocks[node] if node else current
        layers.append(
            ProfiledLayer(
                name=name, op=op, block=current, recognized=node is not None, ms=float(ms)
            )
        )
    return layers


def profile(
    runs: Sequence[Sequence[tuple[str, str, float]]],
    whole: Sequence[float],
    kernels: Sequence[Kernel],
    blocks: Mapping[str, str],
    *,
    batch: int,
    roof: PeakRates | None,
) -> NetProfile:
    """Combine times, counts and peak rates.

    Args:
        runs: See `layers_of`.
        whole: Milliseconds of runs without a profiler.
        kernels: Kernels of the file, from `kernels.count`.
        blocks: Block of each node, from `kernels.count`.
        batch: Images per run.
        roof: Peak rates; None if unknown.
    """
    layers = layers_of(runs, blocks)
    ran, ratio = _as_run(kernels, layers, blocks)
    total = sum(layer.ms for layer in layers)
    middle = float(np.median(whole))
    stage_of = {kernel.block: kernel.stage for kernel in ran}
    order = list(dict.fromkeys(kernel.block for kernel in ran))

    def part(name: str, members: Sequence[str]) -> Part:
        inside = [layer for layer in layers if layer.block in members]
        return _part(
            name, stage_of[members[0]], inside, [k for k in ran if k.block in members], total,
            batch=batch, roof=roof,
        )  # fmt: skip

    stages = {
        stage: [b for b in order if stage_of[b] == stage]
        for stage in dict.fromkeys(stage_of[block] for block in order)
    }
    return NetProfile(
        whole=middle,
        total=total,
        agrees=abs(total - middle) <= AGREES * middle,
        runs=len(runs),
        unrecognized=sum(layer.ms for layer in layers if not layer.recognized) / total,
        int8_products=ratio,
        layers=tuple(layers),
        blocks=tuple(part(block, [block]) for block in order),
        stages=tuple(part(stage, members) for stage, members in stages.items()),
    )


def _as_run(
    kernels: Sequence[Kernel], layers: Sequence[ProfiledLayer], blocks: Mapping[str, str]
) -> tuple[list[Kernel], tuple[int, int] | None]:
    """Return kernels in their actual type: ONNX Runtime runs some INT8 products in float."""
    integer = {recognize(layer.name, blocks) for layer in layers if layer.op.startswith(INTEGER)}
    if not any(layer.op for layer in layers):  # TensorRT names no operators
        return list(kernels), None
    quantized = [kernel for kernel in kernels if kernel.dtype == "int8"]
    ran_int8 = [kernel for kernel in quantized if integer & set(kernel.nodes)]
    changed = [
        replace(kernel, dtype="fp32") if kernel in quantized and kernel not in ran_int8 else kernel
        for kernel in kernels
    ]
    return changed, (len(ran_int8), len(quantized)) if quantized else None


def _part(
    name: str,
    stage: str,
    layers: Sequence[ProfiledLayer],
    kernels: Sequence[Kernel],
    total: float,
    *,
    batch: int,
    roof: PeakRates | None,
) -> Part:
    ms = sum(layer.ms for layer in layers)
    other = sum(
        layer.ms for layer in layers if layer.op and not any(word in layer.op for word in WORK)
    )
    flops = sum(2 * batch * kernel.multiply_adds for kernel in kernels)
    moved = sum(kernel.moved(batch) for kernel in kernels)
    compute = memory = bound = None
    if roof is not None:
        compute = sum(2e3 * batch * k.multiply_adds / roof.rate(k.dtype) for k in kernels)
        memory = 1e3 * moved / roof.bandwidth
        bound = bound_by(ms, other, compute, memory)
    return Part(
        name=name, stage=stage, ms=ms, share=ms / total, other=other / ms if ms else 0.0,
        flops=flops, bytes=moved,
        flops_per_second=1e3 * flops / ms if ms else 0.0,
        bytes_per_second=1e3 * moved / ms if ms else 0.0,
        compute=compute, memory=memory, bound=bound,
    )  # fmt: skip


def bound_by(ms: float, other: float, compute: float, memory: float) -> str:
    """Return a part's limit: compute, memory, or overhead if neither explains its time."""
    if other > ms / 2 or max(compute, memory) < IDLE * ms:
        return "overhead"
    return "compute" if compute >= memory else "memory"
