"""Activation ranges from images: which scale each quantized tensor gets.

`max` keeps the largest magnitude seen. `entropy` clips where the Kullback-Leibler divergence
between the histogram and its 128-level quantization is smallest (Migacz, GTC 2017).

The FP32 model runs in ONNX Runtime with the tensors of `qdq.placement` as extra outputs; only
running maxima and histograms are kept, so memory does not grow with the number of images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx

from rtresnet import artifacts
from rtresnet.errors import DataError, UnknownName, missing_package

METHODS = ("max", "entropy")
BINS = 2048
LEVELS = 128

Batches = Callable[[], Iterable[np.ndarray]]
"""Called once a pass; gives float32 batches [N, 3, S, S], the same ones each time."""


def calibrate(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Batches, method: str = "max"
) -> dict[str, float]:
    """Finds a scale for each tensor.

    Args:
        model: Folded FP32 model.
        tensors: From `qdq.placement`.
        batches: The calibration images, preprocessed.
        method: "max" (one pass) or "entropy" (two).

    Returns:
        Tensor to scale, float32 units a step.

    Raises:
        DataError: No images, or an activation that is not finite.
        UnknownName: No such method.
    """
    if method not in METHODS:
        raise UnknownName("calibrator", method, METHODS)
    observe = _observer(model, tensors)
    largest = dict.fromkeys(tensors, 0.0)
    count = 0
    for activations in observe(batches()):
        for name, values in activations.items():
            peak = float(np.abs(values).max())
            if not np.isfinite(peak):
                raise DataError(f"{name} is not finite on the calibration images")
            largest[name] = max(largest[name], peak)
        count += 1
    if count == 0:
        raise DataError("no calibration images")
    limits = largest
    if method == "entropy":
        histograms = {name: np.zeros(BINS) for name in tensors}
        for activations in observe(batches()):
            for name, values in activations.items():
                if largest[name] > 0:
                    histograms[name] += _histogram(values, largest[name])
        limits = {n: entropy_limit(histograms[n], largest[n]) for n in tensors}
    # A tensor that is zero on every image keeps a harmless scale instead of a division by zero.
    return {name: limit / 127 if limit > 0 else 1.0 for name, limit in limits.items()}


def _observer(
    model: onnx.ModelProto, tensors: Sequence[str]
) -> Callable[[Iterable[np.ndarray]], Iterator[dict[str, np.ndarray]]]:
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "calibration") from None
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    source = model.graph.input[0].name
    inner = [name for name in tensors if name != source]
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def observe(batches: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for images in batches:
            values = dict(zip(inner, session.run(inner, {source: images}), strict=True))
            if source in tensors:
                values[source] = images
            yield values

    return observe


def _histogram(values: np.ndarray, limit: float) -> np.ndarray:
    index = np.abs(values).ravel() * np.float32(BINS / limit)
    return np.bincount(np.minimum(index, BINS - 1).astype(np.int32), minlength=BINS)


def entropy_limit(histogram: np.ndarray, limit: float) -> float:
    """The clipping point of least divergence.

    Args:
        histogram: Counts of magnitudes in equal bins over [0, limit].
        limit: Largest magnitude seen.

    Returns:
        A magnitude in (0, limit]; `limit` itself where the histogram says nothing.
    """
    # Exact zeros (half of what a ReLU puts out) say nothing of the range and would hide the rest.
    histogram = histogram.astype(np.float64)
    histogram[0] = 0
    if histogram.sum() == 0:
        return limit
    best, best_divergence = BINS, np.inf
    for stop in range(LEVELS, BINS + 1, 16):
        reference = histogram[:stop].copy()
        inside = reference.copy()
        reference[-1] += histogram[stop:].sum()
        edges = np.arange(LEVELS) * stop // LEVELS
        width = np.diff(np.append(edges, stop))
        occupied = np.add.reduceat((inside > 0).astype(float), edges)
        mean = np.add.reduceat(inside, edges) / np.maximum(occupied, 1)
        candidate = np.repeat(mean, width) * (inside > 0)
        divergence = _divergence(reference, candidate)
        if divergence < best_divergence:
            best, best_divergence = stop, divergence
    return limit * best / BINS


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of two histograms; an empty bin of q under mass of p counts as a tiny share."""
    if q.sum() == 0:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    mass = p > 0
    return float(np.sum(p[mass] * np.log(p[mass] / np.maximum(q[mass], 1e-10))))


def write_scales(
    path: str | os.PathLike[str], scales: dict[str, float], **about: str | int
) -> Path:
    """Writes scales as JSON, a line a tensor, so that a change shows in a diff."""
    text = json.dumps({"schema": 1, **about, "scales": scales}, indent=1)
    artifacts.write_text(path, text + "\n")
    return Path(path)
