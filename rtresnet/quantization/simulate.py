"""Simulate a quantized net without writing the file.

Scales are inputs of the graph that `qdq.insert` makes, run in ONNX Runtime without its optimizer:
quantized values are integers, sums are float32, as in TensorRT's kernels except for their order.
One session runs every choice of scales, so that dozens can be compared on the same images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from rtresnet.core.errors import missing_package
from rtresnet.core.preprocess import pieces
from rtresnet.onnxlib.graph import DEQUANTIZE, QUANTIZE, GraphIndex, copied, replace_nodes
from rtresnet.quantization import qdq
from rtresnet.quantization.number_formats import INT8, NumberFormat


class Simulation:
    """A net with quantized activations and weights.

    Args:
        model: Folded FP32 model. Not changed.
        nodes_to_exclude: Names of nodes that stay in float.
        bias_corrections: See `qdq.insert`.
        number_format: INT8 or FP8.
        int8_nodes: See `qdq.insert`.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        nodes_to_exclude: Collection[str] = (),
        bias_corrections: Mapping[str, np.ndarray] | None = None,
        number_format: NumberFormat = INT8,
        int8_nodes: Collection[str] = (),
    ) -> None:
        self.tensors = list(qdq.placement(model, nodes_to_exclude))
        ones = dict.fromkeys(self.tensors, 1.0)
        quantized = qdq.insert(
            model, ones, nodes_to_exclude, bias_corrections, number_format=number_format,
            int8_nodes=int8_nodes,
        )  # fmt: skip
        graph = quantized.graph
        self.input = graph.input[0].name
        inputs = {f"{tensor}.scale": (tensor, 1.0) for tensor in self.tensors}
        if int8_nodes:
            ratio = number_format.largest / INT8.largest
            inputs |= {f"{tensor}.int8.scale": (tensor, ratio) for tensor in self.tensors}
        self.scales: dict[str, tuple[str, float]] = {}
        for tensor in [tensor for tensor in graph.initializer if tensor.name in inputs]:
            self.scales[tensor.name] = inputs[tensor.name]
            graph.initializer.remove(tensor)
            graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, []))
        _dequantize_weights(quantized)
        self.session, self.batch = make_session(quantized), fixed_batch(model)

    def logits(self, batches: Sequence[np.ndarray], scales: Mapping[str, float]) -> np.ndarray:
        """Return float32 [N, classes] of the images of all batches.

        Args:
            batches: float32 [N, 3, S, S] each.
            scales: Scale of every tensor in `tensors`.
        """
        feed = {
            name: np.array(scales[tensor] * factor, np.float32)
            for name, (tensor, factor) in self.scales.items()
        }
        logits = [
            self.session.run(None, feed | {self.input: part})[0][:rows]
            for images in batches
            for part, rows in pieces(images, self.batch)
        ]
        return np.concatenate(logits)


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """Return the only batch size that a model takes; None if it is open."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return dims[0].dim_value or None if dims else None


def make_session(
    model: onnx.ModelProto,
    outputs: Sequence[str] = (),
    extra_nodes: Sequence[onnx.NodeProto] = (),
) -> Any:
    """Make an ONNX Runtime session that computes the graph as it is written.

    Args:
        model: Any model.
        outputs: Tensors to return instead of the model's outputs.
        extra_nodes: Nodes that compute outputs that are not in the model.

    Raises:
        UnavailableError: The package onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "calibration") from None
    if outputs:
        model = copied(model)
        model.graph.node.extend(extra_nodes)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; the log prints names unescaped
    if any(node.op_type == QUANTIZE for node in model.graph.node):
        # Otherwise Q/DQ pairs would become integer kernels, which also round the bias.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def noise_ratio(reference: np.ndarray, quantized: np.ndarray) -> float:
    """Return the signal to quantization noise of logits, in dB."""
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(reference.astype(np.float64) - quantized).sum())
    return float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else float("inf")


def _dequantize_weights(model: onnx.ModelProto) -> None:
    """Dequantize weights once instead of in every run."""
    index, nodes = GraphIndex(model), []
    for node in index.nodes:
        weight = index.constant(node.input[0]) if node.op_type == DEQUANTIZE else None
        if weight is None:
            nodes.append(node)
            continue
        scales = index.constant(node.input[1])
        assert scales is not None
        shape = (-1,) + (1,) * (weight.ndim - 1)
        index.add_constant(node.output[0], weight.astype(np.float32) * scales.reshape(shape))
    replace_nodes(model.graph, nodes)
