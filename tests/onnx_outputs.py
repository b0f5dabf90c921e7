"""Outputs of ONNX models in ONNX Runtime, on the CPU."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

ort = pytest.importorskip("onnxruntime")


def run_model(
    model: onnx.ModelProto,
    feeds: dict[str, np.ndarray],
    outputs: list[str] | None = None,
    *,
    optimize: bool = True,
) -> list[np.ndarray]:
    """Return the named outputs of a model, or all.

    Args:
        model: The model.
        feeds: Inputs by name.
        outputs: Names of the outputs.
        optimize: Whether ONNX Runtime may fuse and rewrite nodes.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values: list[np.ndarray] = session.run(outputs, feeds)
    return values


def run_logits(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Return the logits of a classifier."""
    return run_model(model, {"images": images}, ["logits"])[0]
