"""Which blocks of a net suffer from INT8, and which to leave in float.

The noise is that of the logits on a few images, against the float net (`simulate.py`). A block is
what lies between two residual additions, with its shortcut; the stem and the FC are blocks too
(`rtresnet/onnxlib/blocks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from rtresnet.onnxlib.blocks import HEAD, assign
from rtresnet.quantization import placement
from rtresnet.quantization.calibrate import Calibrated
from rtresnet.quantization.simulate import Simulation, noise_ratio


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
    nodes = [n for n in model.graph.node if n.op_type in (*placement.WEIGHTED, "Add")]
    found: dict[str, list[str]] = {}
    for node, block in zip(nodes, assign([(n.name, n.op_type) for n in nodes]), strict=True):
        # Of the head nothing but the FC can be quantized.
        found.setdefault("fc" if block == HEAD else block, []).append(node.name)
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
    return {n.name: sizes[n.input[1]] for n in model.graph.node if n.op_type in placement.WEIGHTED}
