"""How far the branch of each residual block goes: see `onnxlib/metadata.py`.

The lowest and the highest value of the tensor that is added to a shortcut, over all calibration
images. Two reductions inside the graph: the tensor itself never leaves the session.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from rtresnet.quantization.placement import branches


class Extents:
    """Takes what the reductions give, batch by batch.

    Args:
        model: Folded FP32 model.

    Attributes:
        nodes: To be added to the graph.
        outputs: What they compute; `see` takes the values in this order.
        found: Tensor to its lowest and highest value so far, 0 included: rounding keeps it exact.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        names = branches(model.graph.node, {tensor.name for tensor in model.graph.initializer})
        self.outputs = [f"{name}.{end}" for name in names for end in ("lowest", "highest")]
        self.nodes = [
            helper.make_node(operation, [name], [f"{name}.{end}"], keepdims=0)
            for name in names
            for operation, end in (("ReduceMin", "lowest"), ("ReduceMax", "highest"))
        ]
        self.found = dict.fromkeys(names, (0.0, 0.0))

    def see(self, values: Sequence[np.ndarray]) -> None:
        """One batch's."""
        for index, (name, (low, high)) in enumerate(self.found.items()):
            lowest, highest = (float(value) for value in values[2 * index : 2 * index + 2])
            self.found[name] = min(low, lowest), max(high, highest)
