"""Channels that set the range of a whole tensor, brought down without changing the function.

Between two convolutions with a ReLU in between, a channel can be divided by a factor in the first
and multiplied by it in the second: what the net computes stays the same, but for float rounding
(Nagel et al., 2019, section 4.1). Activations have one scale a tensor, so a single channel a
hundred times larger than the others leaves these one or two steps of 127: the net collapses in
INT8. With one scale an output channel the first convolution's weights lose nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from rtresnet.quantization.histogram import Histogram

OUTLIER = 8.0  # times the median channel's largest value


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """Channels of one tensor that are far larger than the others.

    Attributes:
        tensor: Read by a quantized node.
        channels: Their numbers.
        times: The largest of them over the median of all.
    """

    tensor: str
    channels: tuple[int, ...]
    times: float


def outliers(found: Mapping[str, Histogram]) -> list[Outlier]:
    """Tensors whose range is set by a few channels."""
    result = []
    for name, seen in found.items():
        alive = seen.channels[seen.channels > 0]
        if len(alive) < 4:
            continue
        median = float(np.median(alive))
        high = np.flatnonzero(seen.channels > OUTLIER * median)
        if len(high):
            times = float(seen.channels.max()) / median
            result.append(Outlier(tensor=name, channels=tuple(map(int, high)), times=times))
    return result


def equalize(
    model: onnx.ModelProto, found: Mapping[str, Histogram]
) -> tuple[onnx.ModelProto, list[Outlier]]:
    """The same function without those outliers that lie between two convolutions.

    Args:
        model: Folded FP32 model. Not changed.
        found: From calibration.

    Returns:
        The model, and the outliers that were brought down.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {out: node for node in graph.node for out in node.output}
    reads = Counter(name for node in graph.node for name in node.input)
    reads.update(out.name for out in graph.output)
    mended = []
    for outlier in outliers(found):
        readers = [node for node in graph.node if outlier.tensor in node.input]
        first = producers.get(outlier.tensor)
        chain = [outlier.tensor]
        if first is not None and first.op_type == "Relu":
            chain.append(first.input[0])
            first = producers.get(first.input[0])
        alone = all(reads[name] == 1 for name in chain)
        if first is None or first.op_type != "Conv" or not alone or readers[0].op_type != "Conv":
            continue
        second = readers[0]
        ranges = found[outlier.tensor].channels
        # Down to the largest of the others: that is the range without them.
        rest = float(np.delete(ranges, outlier.channels).max())
        factors = np.ones(len(ranges))
        factors[list(outlier.channels)] = ranges[list(outlier.channels)] / rest
        _scale(constants[first.input[1]], 1 / factors, axis=0)
        if len(first.input) > 2:
            _scale(constants[first.input[2]], 1 / factors, axis=0)
        _scale(constants[second.input[1]], factors, axis=1)
        mended.append(outlier)
    return changed, mended


def _scale(tensor: onnx.TensorProto, factors: np.ndarray, axis: int) -> None:
    values = numpy_helper.to_array(tensor).astype(np.float64)
    shape = [1] * values.ndim
    shape[axis] = -1
    scaled = (values * factors.reshape(shape)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))
