"""Insert QuantizeLinear and DequantizeLinear pairs, INT8 or FP8, where TensorRT fuses them.

Before: a folded FP32 model. After: the same graph with these changes and no others.

 1. The data input of every Conv and Gemm is quantized: their kernels then run in INT8.
 2. Only the shortcut's input of a residual Add is quantized. Then there is no pair between the
    convolution that ends the other branch, the addition and the ReLU, so a builder can fuse them
    (TensorRT-RTX 1.7.1 fuses none in INT8). Quantizing both inputs adds rounding and gains nothing.
 3. A tensor is quantized once for all its readers by rules 1 and 2.
 4. There is no pair between a convolution or Add and its ReLU, and the logits stay float.
 5. Activations are symmetric int8 with one scale per tensor. The zero point is written out:
    without it TensorRT reads int8 and ONNX Runtime uint8.
 6. Scales of activations have rank 0. A scale of shape [1] passes every check, and TensorRT then
    silently runs the convolution in float.
 7. Weights are int8 constants behind a DequantizeLinear alone, with one scale per output channel
    (axis 0 of [out, in, h, w] and of [classes, features]), in [-127, 127].
 8. Biases stay float: TensorRT rejects an int32 bias behind a DequantizeLinear.

In FP8 the same rules apply with FLOAT8E4M3FN instead of int8. Its largest value is 448, the file's
opset is 21 or later, and the first convolution should stay in float: TensorRT has no FP8 kernel for
three channels (`fp8_float_nodes`).

Rules 1 to 3 need names only and are in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import helper

from rtresnet.core.errors import ArtifactError
from rtresnet.onnxlib.graph import GraphIndex, checked, copied, with_opset
from rtresnet.quantization import number_formats
from rtresnet.quantization import placement as placement_rules
from rtresnet.quantization.number_formats import INT8, NumberFormat
from rtresnet.quantization.placement import WEIGHTED, Use, place_quantizers


def placement(
    model: onnx.ModelProto, nodes_to_exclude: Collection[str] = ()
) -> dict[str, list[Use]]:
    """Return the activations to quantize, in graph order, and the inputs that read them quantized.

    Args:
        model: Folded FP32 model.
        nodes_to_exclude: Names of nodes that stay in float.

    Raises:
        ArtifactError: The graph has no Conv, is already quantized, or has an Add that does not
            belong to a residual block.
    """
    nodes = model.graph.node
    if any(node.op_type == "DequantizeLinear" for node in nodes):
        raise ArtifactError(
            f"{model.graph.name}: already quantized", fix="start from the FP32 file"
        )
    if not any(node.op_type == "Conv" for node in nodes):
        raise ArtifactError(f"{model.graph.name}: has no convolution")
    constants = {tensor.name for tensor in model.graph.initializer}
    return place_quantizers(nodes, constants, nodes_to_exclude)


def fp8_float_nodes(
    model: onnx.ModelProto, *, stem: bool = False, min_channels: int = 1
) -> tuple[str, ...]:
    """Return the nodes that FP8 always leaves in float.

    These are the first convolution, convolutions with few input channels (per group), and the Adds
    that only such convolutions feed.

    Args:
        model: Folded FP32 model.
        stem: Whether the first convolution is quantized.
        min_channels: Smallest number of input channels of any other quantized convolution.
    """
    index = GraphIndex(model)
    first = placement_rules.stem(index.nodes)
    excluded = set(() if stem else first)
    for node in index.nodes:
        if node.op_type == "Conv" and node.name not in first:
            if index.initializers[node.input[1]].dims[1] < min_channels:
                excluded.add(node.name)
        elif node.op_type == "Add":
            producers = [index.producers[name] for name in node.input if name in index.producers]
            convolutions = {producer.name for producer in producers if producer.op_type == "Conv"}
            if convolutions and convolutions <= excluded:
                excluded.add(node.name)
    return tuple(node.name for node in index.nodes if node.name in excluded)


def insert(
    model: onnx.ModelProto,
    scales: Mapping[str, float],
    nodes_to_exclude: Collection[str] = (),
    bias_corrections: Mapping[str, np.ndarray] | None = None,
    low_bit: bool = False,
    number_format: NumberFormat = INT8,
    int8_nodes: Collection[str] = (),
) -> onnx.ModelProto:
    """Insert the Q/DQ pairs.

    Args:
        model: Folded FP32 model. Not changed.
        scales: Activation tensor to scale, for every tensor of `placement`.
        nodes_to_exclude: Names of nodes that stay in float with their weights.
        bias_corrections: Correction subtracted from the bias of each node with rounded weights
            (`equalization.bias_corrections`); float64 [out channels].
        low_bit: Whether scales and biases are rounded so that sums are exact (`number_formats.py`).
        number_format: INT8 or FP8; `scales` belong to it.
        int8_nodes: Names of nodes that are INT8 in an FP8 file, with the same clipping points.

    Returns:
        The quantized model, checked. Weights are stored in a quarter of the bytes.

    Raises:
        ArtifactError: A scale is missing, not positive or not finite.
    """
    quantized = with_opset(copied(model), number_format.opset)
    index = GraphIndex(quantized)
    by_name = {node.name: node for node in index.nodes}

    def kind_of(node: str) -> NumberFormat:
        return INT8 if node in int8_nodes else number_format

    if low_bit:
        scales = {name: number_formats.low_bit_scale(scale) for name, scale in scales.items()}
    pairs: dict[str, list[onnx.NodeProto]] = {}
    for tensor, uses in placement(model, nodes_to_exclude).items():
        scale = scales.get(tensor)
        if (
            scale is None or not number_formats.SMALLEST <= scale <= number_formats.LARGEST
        ):  # also rejects NaN
            raise ArtifactError(f"{tensor}: unusable scale {scale}", fix="calibrate again")
        for kind in dict.fromkeys(kind_of(use.node) for use in uses):
            own = scale * number_format.largest / kind.largest
            name = tensor if kind is number_format else f"{tensor}.{kind.name}"
            pairs.setdefault(tensor, []).extend(_pair(index, tensor, name, float(own), kind))
            for use in uses:
                if kind_of(use.node) is kind:
                    by_name[use.node].input[use.index] = f"{name}.dq"
    corrections = {} if bias_corrections is None else bias_corrections
    weights = {
        node.output[0]: _quantize_weight(
            index,
            node,
            # Corrections apply to the rounding of `number_format` only.
            None if node.name in int8_nodes else corrections.get(node.name),
            scales if low_bit else None,
            kind_of(node.name),
        )
        for node in index.nodes
        if node.op_type in WEIGHTED and node.name not in nodes_to_exclude
    }
    index.insert(before=weights, after=pairs)
    return checked(quantized)


def _pair(
    index: GraphIndex, tensor: str, name: str, scale: float, kind: NumberFormat
) -> list[onnx.NodeProto]:
    constants = [
        index.add_constant(f"{name}.scale", np.array(scale, np.float32)),
        index.add_constant(f"{name}.zero_point", np.zeros((), kind.dtype)),
    ]
    quantized, result = f"{name}.q", f"{name}.dq"
    return [
        helper.make_node("QuantizeLinear", [tensor, *constants], [quantized], name=quantized),
        helper.make_node("DequantizeLinear", [quantized, *constants], [result], name=result),
    ]


def _quantize_weight(
    index: GraphIndex,
    node: onnx.NodeProto,
    correction: np.ndarray | None,
    low_bit_scales: Mapping[str, float] | None,
    kind: NumberFormat,
) -> list[onnx.NodeProto]:
    name = node.input[1]
    weight = index.constant(name)
    assert weight is not None  # canonicalize() guarantees it
    scales = number_formats.weight_scales(weight, kind)
    if low_bit_scales is not None:
        scales = number_formats.low_bit_weight_scales(scales)
    if len(node.input) > 2 and (correction is not None or low_bit_scales is not None):
        bias = index.constant(node.input[2])
        assert bias is not None
        values = bias - (0 if correction is None else correction)
        if low_bit_scales is not None:
            source = node.input[0].removesuffix(".dq")
            values = number_formats.low_bit_bias(values, low_bit_scales[source], scales)
        index.set_constant(node.input[2], values.astype(np.float32))
    index.set_constant(name, number_formats.quantize_weight(weight, scales, kind))
    inputs = [
        name,
        index.add_constant(f"{name}.scale", scales),
        index.add_constant(f"{name}.zero_point", np.zeros(len(weight), kind.dtype)),
    ]
    node.input[1] = result = f"{name}.dq"
    return [helper.make_node("DequantizeLinear", inputs, [result], name=result, axis=0)]
