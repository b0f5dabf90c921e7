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

 3. The convolution that ends a residual branch adds into a float tensor, and the provider would
    run it in float: a third of a net's work. Its output is quantized as well, to uint8 over
    [-127 shortcut steps, 127 result steps]; what lies below becomes zero in the ReLU and what
    lies above is clipped by the result's quantization, whatever the shortcut holds. No image is
    needed to know this. The sum is rounded twice instead of once and its quantized result
    changes by at most one step; where it could change by more, or nothing is quantized behind
    the addition (the last block; one before an option A shortcut), the branch stays in float.
    Where the file says how far the branch went in calibration (`branches.py`), only that and a
    quarter more is covered, in finer steps; what goes further still is clipped.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection
from typing import Any

import numpy as np

from rtresnet import branches
from rtresnet.errors import ArtifactError, missing_package

ZERO = 128
FURTHER = 1.25  # than in calibration


def for_cpu(path: str | os.PathLike[str], faithful: bool = False) -> str | bytes:
    """The serialized model in its CPU form, or the path itself where nothing is quantized.

    Args:
        path: The ONNX file.
        faithful: Without rule 3, the one that changes results.

    Raises:
        ArtifactError: Not an ONNX file, or what it says of its branches is damaged.
        EnvironmentLack: The package onnx is not installed.
    """
    model = unsigned(path)
    if model is None:
        return os.fspath(path)
    if not faithful:
        try:
            quantize_branches(model)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error.message}", fix=error.fix) from None
    quantize_early(model)
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


def quantize_branches(model: Any) -> int:
    """Rule 3, in place, on a model that rule 1 has changed.

    Returns:
        How many branches were quantized.
    """
    from onnx import helper, numpy_helper

    graph, known = _Graph(model), {e.key: e.value for e in model.metadata_props}
    extents = branches.unpack(known[branches.KEY]) if branches.KEY in known else {}
    pairs: dict[str, list[Any]] = {}
    for add in model.graph.node:
        found = _branch(graph, add, extents)
        if found is None:
            continue
        index, scale, zero = found
        name = add.input[index]
        constants = [f"{name}.branch_scale", f"{name}.branch_zero_point"]
        for label, value in zip(constants, (scale, zero), strict=True):
            model.graph.initializer.append(numpy_helper.from_array(value, label))
        add.input[index] = f"{name}.branch"
        steps = f"{name}.branch_steps"
        pairs[graph.makers[name].name] = [
            helper.make_node("QuantizeLinear", [name, *constants], [steps], name=steps),
            helper.make_node("DequantizeLinear", [steps, *constants], [f"{name}.branch"],
                             name=f"{name}.branch"),
        ]  # fmt: skip
    _put(model, pairs)
    return len(pairs)


def _branch(
    graph: _Graph, add: Any, extents: branches.Extents
) -> tuple[int, np.ndarray, np.ndarray] | None:
    """Which input of a residual addition is the float branch, its scale and its zero point."""
    kinds = [graph.kind(name) for name in add.input]
    if add.op_type != "Add" or sorted(kinds) != ["Conv", "DequantizeLinear"]:
        return None
    index = kinds.index("Conv")
    relu = graph.only_reader(add.output[0])
    quantize = graph.only_reader(relu.output[0]) if relu and relu.op_type == "Relu" else None
    dequantize = graph.makers[add.input[1 - index]]
    if quantize is None or graph.only_reader(add.input[index]) is None:
        return None
    if not graph.centred(quantize) or not graph.centred(dequantize):
        return None
    steps = [graph.constants[node.input[1]] for node in (quantize, dequantize)]
    result, shortcut = map(float, steps)
    lowest = -127 * shortcut
    highest = 127 * result + (0 if graph.never_negative(dequantize) else 128 * shortcut)
    if add.input[index] in extents:
        seen = [FURTHER * end for end in extents[add.input[index]]]
        lowest, highest = max(lowest, min(0.0, seen[0])), min(highest, max(0.0, seen[1]))
    scale = (highest - lowest) / 255
    if not 0 < scale / 2 < result * (1 - 1e-6):  # rounding to the nearest errs by half of it
        return None
    zero = np.array(np.rint(-lowest / scale), np.uint8)
    return index, np.array(scale, steps[0].dtype), zero


def quantize_early(model: Any) -> int:
    """Rule 2, in place, on a model that rule 1 has changed; also up to additions of rule 3.

    Returns:
        How many QuantizeLinear nodes were moved.
    """
    from onnx import helper, numpy_helper

    graph = _Graph(model)
    gone: set[str] = set()
    behind: dict[str, list[Any]] = {}
    for quantize in model.graph.node:
        if quantize.op_type != "QuantizeLinear" or not graph.centred(quantize):
            continue
        chain: list[Any] = []
        name = quantize.input[0]
        while graph.kind(name) in ("Relu", "MaxPool") and graph.only_reader(name):
            chain.insert(0, graph.makers[name])
            name = chain[0].input[0]
        if not chain or not graph.only_reader(name) or not graph.ends_in_integers(name):
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
    zero = numpy_helper.from_array(np.array(ZERO, np.uint8), "activation.zero")
    model.graph.initializer.append(zero)
    _put(model, behind, gone)
    return len(behind)


class _Graph:
    """Who makes a tensor and who reads it, before anything is moved."""

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.makers = {out: node for node in model.graph.node for out in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.outputs = {out.name for out in model.graph.output}
        self.constants = {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
            if not tensor.dims
        }

    def kind(self, name: str) -> str:
        """The operation that makes a tensor; empty for inputs and constants."""
        return self.makers[name].op_type if name in self.makers else ""

    def only_reader(self, name: str) -> Any | None:
        """The one node that reads a tensor; None where there are more, or it is an output."""
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def centred(self, node: Any | None) -> bool:
        """Whether it is half of a pair of rule 1: one scale, uint8, zero point 128."""
        if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            return False
        scale, zero = (self.constants.get(name) for name in (*node.input[1:3], "", "")[:2])
        return scale is not None and zero is not None and zero.dtype == np.uint8 and zero == ZERO

    def never_negative(self, dequantize: Any) -> bool:
        """Whether a quantized tensor comes out of a ReLU."""
        node = self.makers.get(dequantize.input[0])
        while node is not None and node.op_type in ("QuantizeLinear", "MaxPool", "Slice", "Pad"):
            padding = node.input[2] if node.op_type == "Pad" and len(node.input) > 2 else ""
            if padding and not self.constants.get(padding, np.array(-1)) >= 0:
                return False
            node = self.makers.get(node.input[0])
        return node is not None and node.op_type == "Relu"

    def ends_in_integers(self, name: str) -> bool:
        """Whether what makes a tensor has a kernel that puts out integers."""
        node = self.makers.get(name)
        return node is not None and (
            node.op_type == "Conv"
            or (
                node.op_type == "Add"
                and all(self.kind(part) == "DequantizeLinear" for part in node.input)
            )
        )


def _put(model: Any, behind: dict[str, list[Any]], gone: Collection[str] = ()) -> None:
    """Puts nodes behind others, by name, and takes some out."""
    ordered: list[Any] = []
    for node in model.graph.node:
        if node.name not in gone:
            ordered += [node, *behind.get(node.name, ())]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
