"""Whether two ONNX models compute the same, bit for bit, in ONNX Runtime without its optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from rtresnet.core.errors import missing_package

# For sizes that the file leaves open: the batch, and any other.
BATCH, SIDE = 2, 64


def same_bits(first: onnx.ModelProto, second: onnx.ModelProto) -> bool:
    """Runs both on the same random input, drawn from a normal distribution with a fixed seed.

    False also where ONNX Runtime refuses either: what cannot be run is not known to be the same.
    """
    feed = _feed(first)
    if feed is None:
        return False
    found = [_run(model, feed) for model in (first, second)]
    if found[0] is None or found[1] is None:
        return False
    return all(a.tobytes() == b.tobytes() for a, b in zip(*found, strict=True))


def _feed(model: onnx.ModelProto) -> dict[str, np.ndarray] | None:
    constants = {tensor.name for tensor in model.graph.initializer}
    rng, feed = np.random.default_rng(0), {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        shape = [
            dim.dim_value or (SIDE if index else BATCH)
            for index, dim in enumerate(tensor.shape.dim)
        ]
        kind = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if kind.kind == "f":
            feed[value.name] = rng.standard_normal(shape).astype(kind)
        elif kind.kind in "iu":
            feed[value.name] = rng.integers(0, 128, shape).astype(kind)
        else:
            return None
    return feed


def _run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "repairing a file") from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what it refuses is told by the rules
    try:
        made = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return made.run(None, feed)
    except Exception:  # ONNX Runtime's errors share no base of its own
        return None
