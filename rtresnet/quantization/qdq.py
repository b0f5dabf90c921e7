"""Where INT8 enters: QuantizeLinear and DequantizeLinear pairs, placed as TensorRT fuses them.

Before: a folded FP32 model. After: the same graph with these changes and no other.

 1. The data input of every Conv and Gemm is quantized: their kernels then run in INT8.
 2. Of a residual Add only the shortcut's input is quantized. Nothing then stands between the
    convolution that ends the other branch, the addition and ReLU, and a builder may fuse them
    (TensorRT-RTX 1.7.1 fuses none in INT8); quantizing both inputs adds rounding and wins nothing.
 3. A tensor is quantized once and shared by all that rules 1 and 2 make read it.
 4. Nothing stands between a convolution or Add and its ReLU, and the logits stay float.
 5. Activations are symmetric, int8, one scale a tensor. The zero point is written out: left
    out, TensorRT reads int8 and ONNX Runtime uint8.
 6. Scales have rank 0. A scale of shape [1] passes every check, and TensorRT then runs the
    convolution in float without a word.
 7. Weights are int8 constants behind a DequantizeLinear alone, one scale an output channel
    (axis 0 of [out, in, h, w] and of [classes, features]), in [-127, 127].
 8. Biases stay float: TensorRT rejects an int32 bias behind a DequantizeLinear.

Rules 1 to 3 need names only and stand in `places.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rtresnet.core.errors import ArtifactError
from rtresnet.quantization import low_bit_scales
from rtresnet.quantization.placement import WEIGHTED, Use, places

# What a float32 scale can be without becoming zero, a subnormal or infinity.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def placement(model: onnx.ModelProto, keep: Collection[str] = ()) -> dict[str, list[Use]]:
    """The activations to quantize, in graph order, and the inputs that read them quantized.

    Args:
        model: Folded FP32 model.
        keep: Names of nodes that stay in float.

    Raises:
        ArtifactError: The graph has no Conv, is quantized already, or has an Add of no block.
    """
    nodes = model.graph.node
    if any(node.op_type == "DequantizeLinear" for node in nodes):
        raise ArtifactError(
            f"{model.graph.name}: quantized already", fix="start from the FP32 file"
        )
    if not any(node.op_type == "Conv" for node in nodes):
        raise ArtifactError(f"{model.graph.name}: holds no convolution")
    return places(nodes, {tensor.name for tensor in model.graph.initializer}, keep)


def insert(
    model: onnx.ModelProto,
    scales: Mapping[str, float],
    keep: Collection[str] = (),
    shifts: Mapping[str, np.ndarray] | None = None,
    exactly: bool = False,
) -> onnx.ModelProto:
    """Writes the Q/DQ pairs.

    Args:
        model: Folded FP32 model. Not changed.
        scales: Activation tensor to scale, for every tensor of `placement(model, keep)`.
        keep: Names of nodes that stay in float, weights and all.
        shifts: Node to what is taken off its bias, where its weights are rounded
            (`correct.py`); float64 [out channels].
        exactly: With scales and biases as `exact.py` wants them.

    Returns:
        The quantized model, checked; weights are stored as int8, a quarter of the bytes.

    Raises:
        ArtifactError: A scale is missing, not positive or not finite.
    """
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    if exactly:
        scales = {name: low_bit_scales.scale(scale) for name, scale in scales.items()}
    by_name = {node.name: node for node in graph.node}
    pairs: dict[str, list[onnx.NodeProto]] = {}
    for tensor, uses in placement(model, keep).items():
        scale = scales.get(tensor)
        if scale is None or not SMALLEST <= scale <= LARGEST:  # also refuses NaN
            raise ArtifactError(f"{tensor}: scale {scale} cannot be used", fix="calibrate again")
        pairs[tensor] = _pair(graph, tensor, float(scale))
        for use in uses:
            by_name[use.node].input[use.index] = f"{tensor}.dq"
    weights = _quantize_weights(graph, keep, shifts or {}, scales if exactly else None)
    ordered = [*pairs.get(graph.input[0].name, ())]
    for node in graph.node:
        ordered += weights.get(node.name, [])
        ordered.append(node)
        for out in node.output:
            ordered += pairs.get(out, ())
    del graph.node[:]
    graph.node.extend(ordered)
    del graph.value_info[:]
    onnx.checker.check_model(quantized, full_check=True)
    return onnx.shape_inference.infer_shapes(quantized, strict_mode=True, data_prop=True)


def weight_scales(weight: np.ndarray) -> np.ndarray:
    """One float32 scale an output channel (axis 0): largest magnitude over 127.

    A channel of zeros, or of less than a float32 scale can say, gets scale 1 and becomes zeros.
    """
    steps = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64) / 127
    scales: np.ndarray = np.where(steps >= SMALLEST, steps, 1).astype(np.float32)
    return scales


def quantize_weight(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rounds half to even, as QuantizeLinear does, into int8 [-127, 127]."""
    shape = (-1,) + (1,) * (weight.ndim - 1)
    quantized: np.ndarray = np.clip(np.rint(weight / scales.reshape(shape)), -127, 127)
    return quantized.astype(np.int8)


def _constant(graph: onnx.GraphProto, name: str, value: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _pair(graph: onnx.GraphProto, tensor: str, scale: float) -> list[onnx.NodeProto]:
    constants = [
        _constant(graph, f"{tensor}.scale", np.array(scale, np.float32)),
        _constant(graph, f"{tensor}.zero_point", np.array(0, np.int8)),
    ]
    quantize = helper.make_node(
        "QuantizeLinear", [tensor, *constants], [f"{tensor}.q"], name=f"{tensor}.q"
    )
    dequantize = helper.make_node(
        "DequantizeLinear", [f"{tensor}.q", *constants], [f"{tensor}.dq"], name=f"{tensor}.dq"
    )
    return [quantize, dequantize]


def _quantize_weights(
    graph: onnx.GraphProto,
    keep: Collection[str],
    shifts: Mapping[str, np.ndarray],
    exact_scales: Mapping[str, float] | None,
) -> dict[str, list[onnx.NodeProto]]:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {}
    for node in graph.node:
        if node.op_type not in WEIGHTED or node.name in keep:
            continue
        name = node.input[1]
        weight = numpy_helper.to_array(constants[name])
        scales = weight_scales(weight)
        if exact_scales is not None:
            scales = low_bit_scales.weight_scales(scales)
        if len(node.input) > 2 and (node.name in shifts or exact_scales is not None):
            bias = constants[node.input[2]]
            values = numpy_helper.to_array(bias) - shifts.get(node.name, 0)
            if exact_scales is not None:
                source = node.input[0].removesuffix(".dq")
                values = low_bit_scales.bias(values, exact_scales[source], scales)
            bias.CopyFrom(numpy_helper.from_array(values.astype(np.float32), bias.name))
        constants[name].CopyFrom(numpy_helper.from_array(quantize_weight(weight, scales), name))
        inputs = [
            name,
            _constant(graph, f"{name}.scale", scales),
            _constant(graph, f"{name}.zero_point", np.zeros(len(weight), np.int8)),
        ]
        node.input[1] = f"{name}.dq"
        nodes[node.name] = [
            helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], name=f"{name}.dq", axis=0)
        ]
    return nodes
