"""Ranges without images: from the statistics that batch norm kept of every convolution's output.

Each channel has batch norm's mean and deviation (Nagel et al., 2019, section 4.1), and is taken as
independent of the others. Its distribution is taken as logistic, not normal: what trained
convolutions put out has longer tails, and ranges from normal values clip too much of them. ReLU
cuts a channel off at zero, an addition adds means and variances, pooling is taken to change
nothing, which errs on the wide side. The values so described are drawn, and go through the same
histograms as an image's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from rtresnet.core.errors import ArtifactError
from rtresnet.onnxlib import metadata
from rtresnet.quantization.histogram import Histogram

DRAWN = 4096  # values a channel
UNIT = np.sqrt(3) / np.pi  # scale of a logistic distribution of deviation 1


def ranges(
    model: onnx.ModelProto, tensors: Sequence[str], low: np.ndarray, high: np.ndarray
) -> dict[str, Histogram]:
    """What the tensors' values would be like.

    Args:
        model: Folded FP32 model that rtresnet exported.
        tensors: From `qdq.placement`.
        low, high: Smallest and largest value of the input, a channel.

    Raises:
        ArtifactError: The file says nothing of its batch norms, or has an operation that is not
            a residual net's.
    """
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if metadata.NORM_STATISTICS.key not in properties:
        raise ArtifactError(
            f"{model.graph.name}: says nothing of its batch norms, so ranges need images",
            fix="give images: --calib SPEC",
        )
    known = metadata.NORM_STATISTICS.decode(properties[metadata.NORM_STATISTICS.key])
    rng = np.random.default_rng(0)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    values = {model.graph.input[0].name: rng.uniform(low, high, (DRAWN, len(low)))}
    found = {}
    for node in model.graph.node:
        given = [values[name] for name in node.input if name in values]
        if node.op_type == "Conv":
            mean, std = known[node.name]
            out = mean + std * rng.logistic(scale=UNIT, size=(DRAWN, len(mean)))
        elif node.op_type == "Relu":
            out = np.maximum(given[0], 0)
        elif node.op_type == "Add":
            # Shuffled, since the two were drawn from the same source of chance.
            out = given[0] + rng.permutation(given[1])
        elif node.op_type == "Pad":
            pads = numpy_helper.to_array(constants[node.input[1]])
            out = np.pad(given[0], ((0, 0), (int(pads[1]), int(pads[5]))))
        elif node.op_type in ("MaxPool", "Slice", "GlobalAveragePool", "Flatten", "Reshape"):
            out = given[0]
        elif node.op_type == "Gemm":
            continue
        else:
            raise ArtifactError(f"{node.name}: {node.op_type} is not a residual net's operation")
        values[node.output[0]] = out
    for name in tensors:
        found[name] = Histogram(name)
        found[name].add(values[name].astype(np.float32))
    return found
