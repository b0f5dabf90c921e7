"""Recorded times of nodes as layers, blocks and stages of the net, held against a roof.

What ran is named after fusion, and reorders and conversions are named by the runtime: a node that
cannot be recognized by its name belongs to the block of the node that ran before it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from rtresnet.bench.kernels import Kernel

AGREES = 0.10  # sums of parts against the whole
IDLE = 0.25  # of the roof: below, neither arithmetic nor memory is what a block waits for
ADDED = re.compile(
    r"^(InsertedPrecisionFreeCast_|fused )"
    r"|(_nchwc|_token_\d+|/duplicated|_quant|(_U\d+)?_myl\d+_\d+)$"
)
SEPARATORS = re.compile(r"[\s+(),\[\]{}\x1f]+")
INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger")
WORK = ("Conv", "Gemm", "MatMul", "Pool", "ReduceMean")


class Rates(Protocol):
    """Peak rates: of this machine, or of a GPU as published."""

    def rate(self, dtype: str) -> float:
        """Operations a second."""
        ...


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One node as it ran: the median of its times, in milliseconds."""

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
        share: Of the sum of all, in [0, 1].
        other: Of `ms`, in [0, 1]: spent on neither product nor pooling (reorders, conversions).
        flops: Operations, for the batch; a multiply-add is two.
        bytes: The least that moves in and out, for the batch.
        flops_per_second, bytes_per_second: Achieved.
        compute, memory: Milliseconds at the roof; None without one.
        bound: compute, memory or overhead; None without a roof.
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
class Profile:
    """A net's time, part by part.

    Attributes:
        whole: Median of runs without a profiler, in milliseconds.
        total: Sum of the layers.
        agrees: Whether the two are within 10 % of each other.
        runs: Profiled.
        unrecognized: Share of the time in nodes that were put where they ran.
        int8_products: Of the products that the file has in INT8, how many ran in it; None unless
            the runtime says.
    """

    whole: float
    total: float
    agrees: bool
    runs: int
    unrecognized: float
    int8_products: tuple[int, int] | None
    layers: tuple[Layer, ...]
    blocks: tuple[Part, ...]
    stages: tuple[Part, ...]


def recognize(name: str, known: Mapping[str, str]) -> str | None:
    """The node of the file that a name after fusion stands for, or None.

    `layer1.0.relu1_nchwc`, `conv1_token_7` (ONNX Runtime), `conv1 + PWN(relu)` (TensorRT),
    `layer1.0.conv1_U4_myl0_4` (TensorRT-RTX).
    """
    for whole in (name, *SEPARATORS.split(name)):
        part = whole
        while part:
            if part in known:
                return part
            shorter = ADDED.sub("", part)
            if shorter == part:
                break
            part = shorter
    return None


def engine_blocks(layers: Mapping[str, Sequence[str]], blocks: Mapping[str, str]) -> dict[str, str]:
    """Find the block of each layer of a TensorRT engine.

    Names of generated kernels (`__myl_MulAddRelu_myl0_6`) say nothing of the net, so that the
    builder's own record of where a layer came from is needed.

    Args:
        layers: Layer's name to the ONNX nodes it was made from.
        blocks: Node's name to block.

    Returns:
        Layer's name to the block that most of its nodes belong to; a layer without a known node
        is left out.
    """
    found = {}
    for name, nodes in layers.items():
        counts = Counter(blocks[node] for node in nodes if node in blocks)
        if counts:
            found[name] = counts.most_common(1)[0][0]
    return found


def layers_of(
    runs: Sequence[Sequence[tuple[str, str, float]]], blocks: Mapping[str, str]
) -> list[Layer]:
    """Medians over runs of the same nodes.

    Args:
        runs: (name, operator, milliseconds), in the order they ran.
        blocks: Node's name to block.
    """
    counts = [len(run) for run in runs]
    usual = max(set(counts), key=counts.count)
    same = [run for run in runs if len(run) == usual]
    times = np.median([[ms for _, _, ms in run] for run in same], axis=0)
    found = [recognize(name, blocks) for name, _, _ in same[0]]
    current = next((blocks[node] for node in found if node), "")
    layers = []
    for (name, op, _), node, ms in zip(same[0], found, times, strict=True):
        current = blocks[node] if node else current
        layers.append(
            Layer(name=name, op=op, block=current, recognized=node is not None, ms=float(ms))
        )
    return layers


def profile(
    runs: Sequence[Sequence[tuple[str, str, float]]],
    whole: Sequence[float],
    kernels: Sequence[Kernel],
    blocks: Mapping[str, str],
    *,
    batch: int,
    rates: Rates | None,
    bandwidth: float | None,
) -> Profile:
    """Puts times, counts and a roof together.

    Args:
        runs: See `layers_of`.
        whole: Milliseconds of runs without a profiler.
        kernels: From `kernels.count`.
        blocks: Likewise.
        batch: Images a run.
        rates: The roof's operations a second, or None where it is not known.
        bandwidth: The roof's bytes a second.
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
            batch=batch, rates=rates, bandwidth=bandwidth,
        )  # fmt: skip

    stages = {
        stage: [b for b in order if stage_of[b] == stage]
        for stage in dict.fromkeys(stage_of[block] for block in order)
    }
    return Profile(
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
    kernels: Sequence[Kernel], layers: Sequence[Layer], blocks: Mapping[str, str]
) -> tuple[list[Kernel], tuple[int, int] | None]:
    """Kernels in the type they ran in: ONNX Runtime leaves some INT8 convolutions in float."""
    integer = {recognize(layer.name, blocks) for layer in layers if layer.op.startswith(INTEGER)}
    if not any(layer.op for layer in layers):  # TensorRT names no operators
        return list(kernels), None
    quantized = [kernel for kernel in kernels if kernel.dtype == "int8"]
    ran_so = [kernel for kernel in quantized if integer & set(kernel.nodes)]
    changed = [
        replace(kernel, dtype="fp32") if kernel in quantized and kernel not in ran_so else kernel
        for kernel in kernels
    ]
    return changed, (len(ran_so), len(quantized)) if quantized else None


def _part(
    name: str,
    stage: str,
    layers: Sequence[Layer],
    kernels: Sequence[Kernel],
    total: float,
    *,
    batch: int,
    rates: Rates | None,
    bandwidth: float | None,
) -> Part:
    ms = sum(layer.ms for layer in layers)
    other = sum(
        layer.ms for layer in layers if layer.op and not any(word in layer.op for word in WORK)
    )
    flops = sum(2 * batch * kernel.multiply_adds for kernel in kernels)
    moved = sum(batch * (sum(k.read) + k.written) + k.weights for k in kernels)
    compute = memory = bound = None
    if rates is not None and bandwidth is not None:
        compute = sum(2e3 * batch * k.multiply_adds / rates.rate(k.dtype) for k in kernels)
        memory = 1e3 * moved / bandwidth
        bound = bound_by(ms, other, compute, memory)
    return Part(
        name=name, stage=stage, ms=ms, share=ms / total, other=other / ms if ms else 0.0,
        flops=flops, bytes=moved,
        flops_per_second=1e3 * flops / ms if ms else 0.0,
        bytes_per_second=1e3 * moved / ms if ms else 0.0,
        compute=compute, memory=memory, bound=bound,
    )  # fmt: skip


def bound_by(ms: float, other: float, compute: float, memory: float) -> str:
    """What a part's time goes into: compute, memory, or overhead where neither explains it."""
    if other > ms / 2 or max(compute, memory) < IDLE * ms:
        return "overhead"
    return "compute" if compute >= memory else "memory"
