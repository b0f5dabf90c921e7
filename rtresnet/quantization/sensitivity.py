"""Measure the sensitivity of each block to quantization, to choose blocks to leave in float.

The noise is measured at the logits on a few images, against the float net (`simulate.py`). A block
is the part between two residual additions, with its shortcut; the stem and the FC are also blocks
(`onnxlib/graph.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from rtresnet.onnxlib.graph import GraphIndex
from rtresnet.quantization.calibrate import Calibrated
from rtresnet.quantization.number_formats import INT8
from rtresnet.quantization.placement import WEIGHTED
from rtresnet.quantization.simulate import Simulation, noise_ratio


@dataclass(frozen=True, kw_only=True)
class BlockSensitivity:
    """The effect of quantizing one block.

    Attributes:
        name: "layer1.0" and so on, "stem", "head".
        nodes: Its convolutions, additions and FC.
        weights: Share of the net's weights, in [0, 1]; in float they are four times as large.
        alone: Signal to noise with only this block quantized, in dB.
        gain: Signal to noise that leaving only this block in float gains, in dB.
        int8_gain: Signal to noise that only this block in INT8 gains in an FP8 net; None in INT8.
    """

    name: str
    nodes: tuple[str, ...]
    weights: float
    alone: float
    gain: float
    int8_gain: float | None = None


def blocks(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Return the nodes that can be quantized, by block, in graph order."""
    by_block: dict[str, list[str]] = {}
    index = GraphIndex(model)
    for node, (_, block) in zip(index.nodes, index.blocks(), strict=True):
        if node.op_type in (*WEIGHTED, "Add"):
            by_block.setdefault(block, []).append(node.name)
    return by_block


def sensitivity(
    calibrated: Calibrated, held_out: Sequence[np.ndarray], reference: np.ndarray
) -> list[BlockSensitivity]:
    """Measure every block; return the most harmful one first.

    Args:
        calibrated: From calibration.
        held_out: float32 [N, 3, S, S] each.
        reference: Logits of the float net on them.
    """
    model = calibrated.model
    floats = set(calibrated.float_nodes)
    by_block = {
        name: nodes for name, nodes in blocks(model).items() if not floats.issuperset(nodes)
    }
    every_node = [name for names in by_block.values() for name in names]

    def ratio(nodes_to_exclude: Sequence[str], int8_nodes: Sequence[str] = ()) -> float:
        simulation = Simulation(
            model, (*floats, *nodes_to_exclude), calibrated.bias_corrections,
            calibrated.number_format, int8_nodes,
        )  # fmt: skip
        return noise_ratio(reference, simulation.logits(held_out, calibrated.scales))

    whole = ratio(())
    index = GraphIndex(model)
    sizes = {
        node.name: int(np.prod(index.initializers[node.input[1]].dims))
        for node in index.nodes
        if node.op_type in WEIGHTED
    }
    ranked = [
        BlockSensitivity(
            name=name,
            nodes=tuple(nodes),
            weights=sum(sizes.get(node, 0) for node in nodes) / sum(sizes.values()),
            alone=ratio([other for other in every_node if other not in nodes]),
            gain=ratio(nodes) - whole,
            int8_gain=None if calibrated.number_format is INT8 else ratio((), nodes) - whole,
        )
        for name, nodes in by_block.items()
    ]
    return sorted(ranked, key=lambda block: -block.gain)
