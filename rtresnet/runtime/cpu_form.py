"""A Q/DQ file as ONNX Runtime's CPU provider runs it fast: the same quantization, another form.

The provider has fast integer convolutions for unsigned activations that are quantized right after
the convolution. TensorRT wants signed ones, quantized after the ReLU. Before: a Q/DQ file, folded,
symmetric int8. After, in memory only:

 1. An int8 activation with zero point 0 becomes uint8 with zero point 128: q + 128 for every q,
    the same rounding, the same clipping, the same numbers after dequantization.
 2. A QuantizeLinear behind a ReLU, or a ReLU and a max pool, moves up to the convolution, and they
    work on the quantized tensor: ReLU is a Clip at 128. Rounding never changes an order and zero
    stays zero, so what comes out is the same, bit for bit.

Both change nothing in what the graph says (tested without the provider's optimizer). Its integer
kernels then round the bias to a step of their own, which is part of running INT8 at all.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import numpy as np

from rtresnet.errors import ArtifactError, missing_package

ZERO = 128


def for_cpu(path: str | os.PathLike[str]) -> str | bytes:
    """The serialized model in its CPU form, or the path itself where nothing is quantized.

    Raises:
        ArtifactError: Not an ONNX file.
        EnvironmentLack: The package onnx is not installed.
    """
    model = unsigned(path)
    if model is None:
        return os.fspath(path)
    quantize_at_convolutions(model)
    return bytes(model.SerializeToString())


def unsigned(path: str | os.PathLike[str]) -> Any | None:
    """The model after rule 1; None where it has no int8 activation."""
    try:
        import onnx
    except ImportError:
        raise missing_package("onnx", "the CPU provider on an INT8 file") from None
    try:
        model = onnx.load(os.fspath(path))
    except Exception as error:  # protobuf's DecodeError is not one type across versions
        raise ArtifactError(
            f"{path}: not an ONNX file, or truncated", fix="export it anew"
        ) from error
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    quantized = {n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    moved: dict[str, str] = {}
    for node in model.graph.node:
        is_pair = node.op_type == "QuantizeLinear" or (
            node.op_type == "DequantizeLinear" and node.input[0] in quantized
        )
        if not is_pair or len(node.input) < 3:
            continue
        zero = constants.get(node.input[2])
        if zero is None or zero.data_type != onnx.TensorProto.INT8:
            continue
        values = onnx.numpy_helper.to_array(zero)
        if zero.name not in moved:
            moved[zero.name] = f"{zero.name}.unsigned"
            shifted = (values.astype(np.int16) + ZERO).astype(np.uint8)
            model.graph.initializer.append(onnx.numpy_helper.from_array(shifted, moved[zero.name]))
        node.input[2] = moved[zero.name]
    if not moved:
        return None
    del model.graph.value_info[:]  # it still calls the moved tensors int8
    return model


def quantize_at_convolutions(model: Any) -> int:
    """Rule 2, in place, on a model that rule 1 has changed.

    Returns:
        How many QuantizeLinear nodes were moved.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    producers = {out: node for node in graph.node for out in node.output}
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    outputs = {out.name for out in graph.output}
    zeros = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.UINT8 and not tensor.dims
        if int(numpy_helper.to_array(tensor)) == ZERO
    }
    gone: set[str] = set()
    behind: dict[str, list[Any]] = {}
    for quantize in graph.node:
        if quantize.op_type != "QuantizeLinear" or quantize.input[2] not in zeros:
            continue
        chain: list[Any] = []
        name = quantize.input[0]
        while (node := producers.get(name)) is not None and node.op_type in ("Relu", "MaxPool"):
            if len(readers[name]) != 1 or name in outputs:
                break
            chain.insert(0, node)
            name = node.input[0]
        if not chain or node is None or node.op_type != "Conv" or len(readers[name]) != 1:
            continue
        final = quantize.output[0]
        quantize.input[0], quantize.output[0] = name, f"{final}.{chain[0].name}"
        for index, link in enumerate(chain):
            last = index == len(chain) - 1
            out = final if last else f"{final}.{chain[index + 1].name}"
            source = f"{final}.{link.name}"
            if link.op_type == "Relu":
                moved = helper.make_node("Clip", [source, "activation.zero"], [out], name=link.name)
            else:
                moved = helper.make_node("MaxPool", [source], [out], name=link.name)
                moved.attribute.extend(link.attribute)
            behind.setdefault(quantize.name, []).append(moved)
            gone.add(link.name)
    if not gone:
        return 0
    graph.initializer.append(numpy_helper.from_array(np.array(ZERO, np.uint8), "activation.zero"))
    ordered: list[Any] = []
    for node in graph.node:
        if node.name not in gone:
            ordered += [node, *behind.get(node.name, ())]
    del graph.node[:]
    graph.node.extend(ordered)
    return len(behind)
