"""Biases that make up for the mean error of rounded weights (Nagel et al., 2019, section 4.2).

Rounding a weight to its step shifts a channel's mean output by (rounded - exact) * mean input.
The mean input of each channel is known from calibration, so the shift can be taken off the bias.
Padding is passed over: at a border the shift is smaller than assumed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from rtresnet.quantization import placement, qdq
from rtresnet.quantization.histogram import Histogram


def bias_shifts(model: onnx.ModelProto, found: Mapping[str, Histogram]) -> dict[str, np.ndarray]:
    """What `qdq.insert` is to take off the bias of each node whose weights it rounds.

    Args:
        model: Folded FP32 model.
        found: From calibration, of every tensor that a convolution or the FC reads.

    Returns:
        Node to float64 [out channels].
    """
    shifts = {}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in placement.WEIGHTED or len(node.input) < 3:
            continue
        weight = numpy_helper.to_array(constants[node.input[1]])
        means = found[node.input[0]].means
        if len(means) != weight.shape[1]:  # grouped convolutions see a part of the channels
            continue
        scales = qdq.weight_scales(weight)
        rounded = qdq.quantize_weight(weight, scales).astype(np.float64)
        error = rounded * scales.reshape((-1,) + (1,) * (weight.ndim - 1)) - weight
        shifts[node.name] = error.reshape(*weight.shape[:2], -1).sum(2) @ means
    return shifts
