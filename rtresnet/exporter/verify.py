"""Check that an exported file computes what the net computes.

The reference is the net in float64: the file may differ from it by a factor times the difference of
torch's own float32. A fixed tolerance would be too wide or too narrow, because the rounding of
float32 is 1e-6 on a trained ResNet-20 and 3e-4 on an untrained ResNet-152 (measured).
"""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnx
import torch
from torch import nn

from rtresnet.core import metrics
from rtresnet.core.errors import CheckFailedError
from rtresnet.core.sidecar import Parity

FACTOR = 10
FLOOR = 1e-5


def operations(model: onnx.ModelProto) -> Counter[str]:
    """Count the nodes of each operator."""
    return Counter(node.op_type for node in model.graph.node)


def check_folded(model: onnx.ModelProto) -> None:
    """Raise CheckFailedError if a batch norm or a convolution without bias is left."""
    for node in model.graph.node:
        if node.op_type == "BatchNormalization" or (
            node.op_type == "Conv" and len(node.input) != 3
        ):
            raise CheckFailedError(
                f"{node.name}: a {node.op_type} whose batch norm was not folded",
                fix="please report it with the checkpoint",
            )


def check_parity(net: nn.Module, candidate: metrics.Forward, *, size: int, n: int = 3) -> Parity:
    """Run the net in float64 and float32 and the candidate on the same random images.

    Args:
        net: The torch net, before folding.
        candidate: Runs the exported file.
        size: Side of the input in pixels.
        n: Number of images, run as a batch of one and a batch of the others: this detects a batch
            size that is fixed in the file.

    Returns:
        n, the largest and the relative difference from the float32 net, and the relative difference
        between that net in float32 and float64 (`rounding`), for the sidecar.

    Raises:
        CheckFailedError: The difference is above 1e-5 relative and ten times the rounding, or
            a logit is not finite.
    """
    images = np.random.default_rng(0).standard_normal((n, 3, size, size)).astype(np.float32)
    with torch.inference_mode():
        single = net.eval()(torch.from_numpy(images)).numpy()
        double = copy.deepcopy(net).double()(torch.from_numpy(images).double()).numpy()
    got = np.concatenate([candidate(images[:1]), candidate(images[1:])])
    rounding = metrics.parity(double, single).relative
    error = metrics.parity(double, got).relative
    within = error <= max(FLOOR, FACTOR * rounding)  # False if either is NaN
    if not within or not np.isfinite(rounding):
        raise CheckFailedError(
            f"the ONNX file differs from torch in float64 by {error:.1e} relative, torch's own "
            f"float32 only by {rounding:.1e}",
            fix="please report it with the checkpoint",
        )
    parity = metrics.parity(single, got)
    return {"n": n, "largest": parity.largest, "relative": parity.relative, "rounding": rounding}
