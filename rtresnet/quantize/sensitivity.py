"""Which blocks of a net suffer from INT8, and which to leave in float.

The noise is that of the logits on a few images, against the float net (`simulate.py`). A block is
what lies between two residual additions, with its shortcut; the stem and the FC are blocks too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from rtresnet.quantize import places
from rtresnet.quantize.calibrate import Calibrated
from rtresnet.quantize.simulate import Simulation, noise_ratio

NAMED = re.compile(r"(layer\d+[./]\d+)[./]")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block under INT8.

    Attributes:
        name: layer1.0 and the like, "stem", "fc".
        nodes: Its convolutions, additions and FC.
        weights: Share of the net's weights, in [0, 1]: they stay four times as large in float.
        alone: Signal-to-noise with this block alone quantized, in dB.
        gain: What leaving it alone in float gains over the whole net in INT8, in dB.
    """

    name: str
    nodes: tuple[str, ...]
    weights: float
    alone: float
    gain: float


def blocks(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Nodes that can be quantized, by block, in graph order."""
    nodes = [n for n in model.graph.node if n.op_type in (*places.WEIGHTED, "Add")]
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    if sum(NAMED.match(node.name) is not None for node in convolutions) >= len(convolutions) - 1:
        return _by_name(nodes)
    return _by_additions(nodes)


def _by_name(nodes: Sequence[onnx.NodeProto]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for node in nodes:
        match = NAMED.match(node.name)
        other = "fc" if node.op_type == "Gemm" else "stem"
        found.setdefault(match[1].replace("/", ".") if match else other, []).append(node.name)
    return found


def _by_additions(nodes: Sequence[onnx.NodeProto]) -> dict[str, list[str]]:
    """For names that say nothing: an Add ends a block; the net begins with the stem."""
    found: dict[str, list[str]] = {}
    number, current = 0, "stem"
    for node in nodes:
        if current == "stem" and found and node.op_type == "Conv":
            number, current = 1, "block1"
        if node.op_type == "Gemm":
            found.setdefault("fc", []).append(node.name)
            continue
        found.setdefault(current, []).append(node.name)
        if node.op_type == "Add":
            number += 1
            current = f"block{number}"
    return found


def sensitivity(
    found: Calibrated, held: Sequence[np.ndarray], reference: np.ndarray
) -> list[Block]:
    """Every block, the most harmful first.

    Args:
        found: From calibration.
        held: float32 [N, 3, S, S] each.
        reference: Logits of the float net on them.
    """
    parts = blocks(found.model)
    everything = [name for names in parts.values() for name in names]

    def ratio(keep: Sequence[str]) -> float:
        simulation = Simulation(found.model, keep, found.shifts)
        return noise_ratio(reference, simulation.logits(held, found.scales))

    whole, sizes = ratio(()), _weights(found.model)
    total = sum(sizes.values())
    ranked = []
    for name, nodes in parts.items():
        rest = [other for other in everything if other not in nodes]
        ranked.append(
            Block(
                name=name,
                nodes=tuple(nodes),
                weights=sum(sizes.get(node, 0) for node in nodes) / total,
                alone=ratio(rest),
                gain=ratio(nodes) - whole,
            )
        )
    return sorted(ranked, key=lambda block: -block.gain)


def _weights(model: onnx.ModelProto) -> dict[str, int]:
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    return {n.name: sizes[n.input[1]] for n in model.graph.node if n.op_type in places.WEIGHTED}
