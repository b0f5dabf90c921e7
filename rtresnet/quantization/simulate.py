"""What a net computes when it is quantized, without making the file: scales go in as inputs.

The nodes of `qdq.insert`, run in ONNX Runtime without its optimizer: quantized values are whole
steps, sums are float32, as in TensorRT's kernels but for their order. One session serves every
choice of scales, so that dozens of them can be compared on the same images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from rtresnet.core.errors import missing_package
from rtresnet.core.preprocess import pieces
from rtresnet.quantization import qdq


class Simulation:
    """A net with quantized activations and weights.

    Args:
        model: Folded FP32 model. Not changed.
        keep: Names of nodes that stay in float.
        shifts: See `qdq.insert`.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        keep: Collection[str] = (),
        shifts: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.tensors = list(qdq.placement(model, keep))
        quantized = qdq.insert(model, dict.fromkeys(self.tensors, 1.0), keep, shifts)
        graph = quantized.graph
        self.input = graph.input[0].name
        scales = {f"{tensor}.scale" for tensor in self.tensors}
        constants = [tensor for tensor in graph.initializer if tensor.name not in scales]
        del graph.initializer[:]
        graph.initializer.extend(constants)
        for tensor in self.tensors:
            graph.input.append(
                helper.make_tensor_value_info(f"{tensor}.scale", TensorProto.FLOAT, [])
            )
        _weights_in_float(graph)
        self.session, self.batch = session(quantized), fixed_batch(model)

    def logits(self, batches: Sequence[np.ndarray], scales: Mapping[str, float]) -> np.ndarray:
        """float32 [N, classes] of all the batches' images.

        Args:
            batches: float32 [N, 3, S, S] each.
            scales: Of every tensor in `tensors`.
        """
        feed = {f"{name}.scale": np.array(scales[name], np.float32) for name in self.tensors}
        found = [
            self.session.run(None, feed | {self.input: part})[0][:rows]
            for images in batches
            for part, rows in pieces(images, self.batch)
        ]
        return np.concatenate(found)


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """The only batch size that a model takes; None where it is open."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return dims[0].dim_value or None if dims else None


def session(
    model: onnx.ModelProto, outputs: Sequence[str] = (), more: Sequence[onnx.NodeProto] = ()
) -> Any:
    """An ONNX Runtime session that computes the graph as it is written.

    Args:
        model: Any.
        outputs: Tensors to give instead of the model's own outputs.
        more: Nodes to compute them with, where the model has none.
    """
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "calibration") from None
    if outputs:
        watched = onnx.ModelProto()
        watched.CopyFrom(model)
        watched.graph.node.extend(more)
        del watched.graph.output[:]
        watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        model = watched
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; the log prints names unescaped
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if quantized:  # else Q/DQ pairs would become integer kernels, which round the bias too
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def noise_ratio(reference: np.ndarray, quantized: np.ndarray) -> float:
    """Signal to quantization noise of logits, in dB."""
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(reference.astype(np.float64) - quantized).sum())
    return float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else float("inf")


def _weights_in_float(graph: onnx.GraphProto) -> None:
    """Dequantizes weights once instead of in every run."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in constants:
            nodes.append(node)
            continue
        values, scales = (onnx.numpy_helper.to_array(constants[name]) for name in node.input[:2])
        shape = (-1,) + (1,) * (values.ndim - 1)
        weight = values.astype(np.float32) * scales.reshape(shape)
        graph.initializer.append(onnx.numpy_helper.from_array(weight, node.output[0]))
    del graph.node[:]
    graph.node.extend(nodes)
