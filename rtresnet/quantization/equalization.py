"""Changes of weights and biases that make quantization cost less (Nagel et al., 2019).

Cross-layer equalization (section 4.1): between two convolutions with a ReLU in between, a channel
can be divided by a factor in the first and multiplied by it in the second. The function stays the
same but for float rounding. Activations have one scale per tensor, so one channel a hundred times
larger than the others leaves them one or two of 127 steps. With one scale per output channel, the
weights of the first convolution lose nothing.

Bias correction (section 4.2): rounding a weight shifts the mean output of its channel by
(rounded - exact) * mean input. The mean input of each channel is known from calibration, so the
shift can be subtracted from the bias. Padding is ignored: at a border the shift is smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from rtresnet.onnxlib.graph import GraphIndex, copied
from rtresnet.quantization import number_formats
from rtresnet.quantization.calibrators import Histogram
from rtresnet.quantization.number_formats import INT8, NumberFormat
from rtresnet.quantization.placement import WEIGHTED

OUTLIER = 8.0  # times the largest value of the median channel


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """Channels of one tensor that are far larger than the others.

    Attributes:
        tensor: A quantized activation.
        channels: Their numbers.
        times: The largest value over that of the median channel.
    """

    tensor: str
    channels: tuple[int, ...]
    times: float


def find_outliers(histograms: Mapping[str, Histogram]) -> list[Outlier]:
    """Return the tensors whose range a few channels determine."""
    outliers = []
    for name, histogram in histograms.items():
        alive = histogram.channels[histogram.channels > 0]
        if len(alive) < 4:
            continue
        median = float(np.median(alive))
        channels = np.flatnonzero(histogram.channels > OUTLIER * median)
        if len(channels):
            times = float(histogram.channels.max()) / median
            outliers.append(Outlier(tensor=name, channels=tuple(map(int, channels)), times=times))
    return outliers


def equalize(
    model: onnx.ModelProto, histograms: Mapping[str, Histogram]
) -> tuple[onnx.ModelProto, list[Outlier]]:
    """Scale down the outliers between two convolutions.

    Args:
        model: Folded FP32 model. Not changed.
        histograms: From calibration.

    Returns:
        The same function, and the outliers that were scaled down.
    """
    changed = copied(model)
    index = GraphIndex(changed)
    equalized = []
    for outlier in find_outliers(histograms):
        chain = [outlier.tensor]
        if index.operator(outlier.tensor) == "Relu":
            chain.append(index.producers[outlier.tensor].input[0])
        readers = [index.only_reader(name) for name in chain]
        first, second = index.producers.get(chain[-1]), readers[0]
        if first is None or first.op_type != "Conv" or None in readers:
            continue
        if second is None or second.op_type != "Conv":
            continue
        ranges = histograms[outlier.tensor].channels
        # Down to the largest of the other channels: that is the range without the outliers.
        target = float(np.delete(ranges, outlier.channels).max())
        factors = np.ones(len(ranges))
        factors[list(outlier.channels)] = ranges[list(outlier.channels)] / target
        for name in first.input[1:]:
            _multiply(index, name, 1 / factors, axis=0)
        _multiply(index, second.input[1], factors, axis=1)
        equalized.append(outlier)
    return changed, equalized


def _multiply(index: GraphIndex, name: str, factors: np.ndarray, axis: int) -> None:
    value = index.constant(name)
    assert value is not None  # canonicalize() guarantees it
    shape = [-1 if dim == axis else 1 for dim in range(value.ndim)]
    scaled = value.astype(np.float64) * factors.reshape(shape)
    index.set_constant(name, scaled.astype(np.float32))


def bias_corrections(
    model: onnx.ModelProto,
    histograms: Mapping[str, Histogram],
    number_format: NumberFormat = INT8,
) -> dict[str, np.ndarray]:
    """Return the bias corrections for nodes with rounded weights, for `qdq.insert`.

    Args:
        model: Folded FP32 model.
        histograms: From calibration. Nodes that read another tensor get no correction.
        number_format: Number format of the weights.

    Returns:
        Node to float64 [out channels].
    """
    index, corrections = GraphIndex(model), {}
    for node in index.nodes:
        if node.op_type not in WEIGHTED or len(node.input) < 3:
            continue
        if node.input[0] not in histograms:
            continue
        weight = index.constant(node.input[1])
        assert weight is not None
        means = histograms[node.input[0]].means
        if len(means) != weight.shape[1]:  # a grouped convolution reads only some of the channels
            continue
        scales = number_formats.weight_scales(weight, number_format)
        rounded = number_formats.quantize_weight(weight, scales, number_format).astype(np.float64)
        error = rounded * scales.reshape((-1,) + (1,) * (weight.ndim - 1)) - weight
        corrections[node.name] = error.reshape(*weight.shape[:2], -1).sum(2) @ means
    return corrections
