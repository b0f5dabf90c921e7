"""The kernels of an ONNX graph: multiply-adds, and bytes read and written by each.

A kernel is a convolution, a matrix product or a pooling with the elementwise nodes after it
(activation, addition, Q/DQ, casts), as TensorRT fuses them; the tensors inside a kernel are never
stored. Each kernel reads its inputs and weights once and writes its output once, in the data type
they are stored in: a tensor between QuantizeLinear and DequantizeLinear takes one byte per element.
That is the minimum that any implementation moves; this module measures nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from rtresnet.core.errors import InputError
from rtresnet.core.precisions import CALIBRATED, PRECISIONS
from rtresnet.onnxlib import io
from rtresnet.onnxlib.graph import WEIGHTED, GraphIndex

POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean")
# The same elements, stored once: a node that reads the output of a view reads its input.
VIEWS = ("DequantizeLinear", "Flatten", "Reshape", "Identity", "Squeeze", "Slice", "Pad")
MAX_CONSTANT = 1024  # elements: shapes and axes are smaller; values of weights are not needed
INTEGERS = (6, 7)  # ONNX's INT32 and INT64
UNKNOWN = "unknown"  # data type of a product, which may run at the device's fastest rate
# Names and bits of a value by ONNX data type, a value of TensorProto.DataType.
DTYPES = {spec.onnx: spec.name for spec in PRECISIONS.values()} | {2: "int8", 11: "fp32"}
BITS = {spec.onnx: spec.bits for spec in PRECISIONS.values()} | {
    2: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 11: 64, 12: 32, 13: 64,  # integers, BOOL, DOUBLE
    18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4,  # other formats of FP8, UINT4, INT4, FP4 (E2M1)
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel, for one image. Weights are read once for the whole batch.

    Attributes:
        block: "stem", "layer1.0" and so on, "head"; see `onnxlib.graph.assign_blocks`.
        stage: "stem", "layer1" and so on, "head": blocks with one output size.
        op: Operator of the node that the kernel is named after.
        nodes: Names of all its nodes, and of their output tensors.
        dtype: Data type of the product, a name of `core.precisions`, or UNKNOWN.
        multiply_adds: Per image; 0 for a pooling.
        weights: Bytes of weights and biases.
        read: Bytes of activations that it reads, one entry per tensor.
        written: Bytes of activations that it writes.
    """

    name: str
    block: str
    stage: str
    op: str
    nodes: tuple[str, ...]
    dtype: str
    multiply_adds: int
    weights: int
    read: tuple[int, ...]
    written: int

    def moved(self, batch: int) -> int:
        """Return the bytes read and written for a batch, weights included."""
        return batch * (sum(self.read) + self.written) + self.weights


@dataclass(frozen=True, kw_only=True)
class Counted:
    """The kernels of a graph, in its order.

    Attributes:
        blocks: The block of every node and of every output tensor: runtimes name fused nodes after
            either.
        size: Side of the images, in pixels.
        batch: The only batch size that the graph takes; None if it is open.
    """

    kernels: list[Kernel]
    blocks: dict[str, str]
    size: int
    batch: int | None = None


def count(source: str | os.PathLike[str] | Any, name: str = "model") -> Counted:
    """Count an ONNX file or a model in memory, which is called `name` in errors.

    Raises:
        ArtifactError: Not a valid ONNX file.
        UnavailableError: The package onnx is not installed.
        InputError: The shapes are unknown, or there is no convolution.
    """
    model, batch = _read(source)
    graph = _Kernels(model, str(source) if isinstance(source, str | os.PathLike) else name)
    blocks = {name: block for name, (_, block) in graph.block_of.items()}
    return Counted(kernels=graph.kernels(), blocks=blocks, size=graph.size, batch=batch)


def at(kernels: list[Kernel], precision: str) -> list[Kernel]:
    """Return the kernels as if stored and multiplied in another precision; images stay float32.

    For INT8 and FP8: weights, and activations between kernels, take a byte; logits stay float32.
    """

    def converted(kernel: Kernel, size: int) -> int:
        stored = PRECISIONS.get(kernel.dtype, PRECISIONS["fp32"])
        return size * PRECISIONS[precision].bits // stored.bits

    return [
        replace(
            kernel,
            dtype=precision,
            weights=converted(kernel, kernel.weights),
            read=tuple(
                size if first and index == 0 else converted(kernel, size)
                for index, size in enumerate(kernel.read)
            ),
            written=kernel.written if last else converted(kernel, kernel.written),
        )
        for kernel, first, last in (
            (kernel, position == 0, position == len(kernels) - 1)
            for position, kernel in enumerate(kernels)
        )
    ]


def precision_of(kernels: list[Kernel]) -> str:
    """Return the data type of most multiply-adds."""
    totals: dict[str, int] = {}
    for kernel in kernels:
        totals[kernel.dtype] = totals.get(kernel.dtype, 0) + kernel.multiply_adds
    return max(totals, key=lambda dtype: totals[dtype])


def _read(source: str | os.PathLike[str] | Any) -> tuple[Any, int | None]:
    """Return the model with shapes inferred for its fixed batch, or for 1; and that fixed batch."""
    model = io.load(source) if isinstance(source, str | os.PathLike) else source
    import onnx

    small = onnx.ModelProto()
    small.CopyFrom(model)
    for tensor in small.graph.initializer:
        if prod(tensor.dims) > MAX_CONSTANT:  # shape inference needs no weights
            for field in ("raw_data", "float_data", "int32_data"):
                tensor.ClearField(field)
    fixed = None
    if small.graph.input:
        dims = small.graph.input[0].type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = 1
        elif dims:
            fixed = dims[0].dim_value
    del small.graph.value_info[:]
    for out in small.graph.output:
        out.type.tensor_type.ClearField("shape")
    for index, node in enumerate(small.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    _fold_integers(small)
    return onnx.shape_inference.infer_shapes(small, data_prop=True), fixed


def _fold_integers(model: Any) -> None:
    """Replace small integer tensors that are computed from constants with constants.

    TorchScript computes the pads of a zero-padded shortcut in the graph (ConstantOfShape, Concat,
    Slice, Transpose), which onnx's shape inference does not follow.
    """
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    values = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if prod(tensor.dims) <= MAX_CONSTANT and tensor.data_type in INTEGERS
    }
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    for node in model.graph.node:
        if node.domain or any(name and name not in values for name in node.input):
            continue
        if any(attribute.HasField("g") for attribute in node.attribute):
            continue
        evaluator: Any = ReferenceEvaluator(node, opsets=opsets)
        (value, *others) = evaluator.run(None, {name: values[name] for name in node.input if name})
        if others or value.dtype not in (np.int32, np.int64) or value.size > MAX_CONSTANT:
            continue
        values[node.output[0]] = value
        if node.op_type != "Constant":
            tensor = numpy_helper.from_array(value)
            outputs, name = list(node.output), node.name
            node.CopyFrom(helper.make_node("Constant", [], outputs, name=name, value=tensor))


class _Kernels:
    def __init__(self, model: Any, where: str) -> None:
        self.index = index = GraphIndex(model)
        self.where = where
        graph = model.graph
        self.constants = {t.name: (tuple(t.dims), t.data_type) for t in graph.initializer}
        typed = [*graph.value_info, *graph.output, *graph.input]
        self.tensors = {v.name: _shape(v) for v in typed}
        shape = self.tensors[index.inputs[0].name][0] if index.inputs else ()
        if len(shape) != 4 or min(shape) < 1:
            raise InputError(
                f"{where}: its input is {list(shape)}, not [N, 3, S, S] with a fixed S",
                fix="export it with a fixed image size",
            )
        self.images, self.size = shape[0], shape[2]  # [N, 3, S, S] or [N, S, S, 3]
        self.block_of: dict[str, tuple[str, str]] = {}
        for node, stage_and_block in zip(index.nodes, index.blocks(), strict=True):
            self.block_of |= dict.fromkeys((*node.output, node.name), stage_and_block)

    def elements(self, tensor: str) -> int:
        shape, _ = self.tensors.get(tensor, ((), 0))
        if not shape or min(shape) < 1:
            raise InputError(
                f"{self.where}: the shape of {tensor} is unknown",
                fix="export it with a fixed image size",
            )
        return prod(shape) // self.images

    def is_constant(self, tensor: str) -> bool:
        """Return whether a tensor depends on weights only."""
        node = self.index.producers.get(tensor)
        if node is None:
            return tensor in self.constants or not tensor
        return all(map(self.is_constant, node.input))

    def stored(self, tensor: str) -> tuple[str, int]:
        """Return the stored tensor behind a tensor's views, and the elements read per image."""
        elements = self.elements(tensor)
        node = self.index.producers.get(tensor)
        if node is not None and self.is_view(node):
            name, before = self.stored(node.input[0])
            # Only the elements that a Slice takes are read, and no zeros of a Pad.
            return name, min(elements, before)
        return tensor, elements

    def is_view(self, node: Any) -> bool:
        if node is None:
            return False
        if node.op_type in VIEWS or node.op_type == "Constant":
            return True
        source = self.index.producers.get(node.input[0])
        # Quantizes the images, or casts back to a float type.
        if node.op_type in ("QuantizeLinear", "Cast"):
            return source is None or (node.op_type == "Cast" and self.is_view(source))
        return False

    def weights(self, node: Any) -> tuple[int, tuple[int, ...], str]:
        """Return the bytes of weights and biases, the weight's shape, and its stored type."""
        total, first = 0, ((), 0)
        for name in node.input[1:]:
            if not name or not self.is_constant(name):
                continue
            while name not in self.constants and name in self.index.producers:
                name = self.index.producers[name].input[0]
            shape, kind = self.constants.get(name, ((), 0))
            first = first if first[0] else (shape, kind)
            total += _bytes(prod(shape), kind)
        return total, first[0], _dtype(first[1])

    def kernels(self) -> list[Kernel]:
        owner = self._owners()
        groups: dict[int, list[Any]] = {}
        for index, node in enumerate(self.index.nodes):
            if index in owner:
                groups.setdefault(owner[index], []).append(node)
        makers = {
            out: group for group, members in groups.items() for n in members for out in n.output
        }
        reads: dict[int, list[tuple[str, int]]] = {}
        stored: dict[str, int] = {}
        for group, members in groups.items():
            sizes: dict[str, int] = {}
            for name in (name for node in members for name in node.input):
                if name and not self.is_constant(name) and makers.get(name) != group:
                    stored_name, elements = self.stored(name)
                    if makers.get(stored_name) != group:
                        sizes[stored_name] = max(sizes.get(stored_name, 0), elements)
                        stored[stored_name] = self.elements(stored_name)
            reads[group] = list(sizes.items())
        for name in self.index.outputs:
            if makers.get(self.stored(name)[0]) is not None:
                stored[self.stored(name)[0]] = self.elements(name)
        result = [
            self._kernel(self.index.nodes[group], members, reads[group], stored)
            for group, members in groups.items()
        ]
        if not any(kernel.multiply_adds for kernel in result):
            raise InputError(f"{self.where}: has no convolution")
        return result

    def _owners(self) -> dict[int, int]:
        """Return each node's kernel as the index of the node that names it; views have none."""
        owner: dict[int, int] = {}
        kernel_of: dict[str, int] = {}
        for index, node in enumerate(self.index.nodes):
            constant = all(map(self.is_constant, node.input))
            if not constant and node.op_type in WEIGHTED + POOLS:
                owner[index] = index
            elif not constant and not self.is_view(node):
                inputs = [name for name in node.input if name and not self.is_constant(name)]
                # An addition is fused into the branch whose output it reads directly.
                direct = [kernel_of[name] for name in inputs if name in kernel_of]
                before = [kernel_of[p] for p, _ in map(self.stored, inputs) if p in kernel_of]
                if direct or before:
                    owner[index] = max(direct or before)
            if index in owner:
                kernel_of.update(dict.fromkeys(node.output, owner[index]))
        return owner

    def _kernel(
        self,
        node: Any,
        members: list[Any],
        read: list[tuple[str, int]],
        stored: Mapping[str, int],
    ) -> Kernel:
        weights, shape, dtype = self.weights(node)
        macs = 0
        if node.op_type in WEIGHTED and shape:
            out = self.elements(node.output[0])
            per = prod(shape[1:]) if node.op_type == "Conv" else prod(shape)
            macs = out * per if node.op_type == "Conv" else per
        if node.op_type in POOLS:
            dtype, weights = _dtype(self.tensors[self.stored(node.input[0])[0]][1]), 0
        elif dtype in CALIBRATED and not self.is_view(self.index.producers.get(node.input[0])):
            dtype = "fp32"  # only the weights are quantized
        outputs = {out for member in members for out in member.output}
        return Kernel(
            name=node.name,
            block=self.block_of[node.name][1],
            stage=self.block_of[node.name][0],
            op=node.op_type,
            nodes=tuple(dict.fromkeys(name for m in members for name in (m.name, *m.output))),
            dtype=dtype,
            multiply_adds=macs,
            weights=weights,
            read=tuple(_bytes(elements, self.tensors[name][1]) for name, elements in read),
            written=sum(_bytes(stored[t], self.tensors[t][1]) for t in outputs if t in stored),
        )


def _shape(value: Any) -> tuple[tuple[int, ...], int]:
    tensor = value.type.tensor_type
    return tuple(dim.dim_value for dim in tensor.shape.dim), tensor.elem_type


def _bytes(elements: int, kind: int) -> int:
    """Return the bytes of elements of an ONNX type; 0 if its width is unknown: still a bound."""
    return -(-elements * BITS.get(kind, 0) // 8)


def _dtype(kind: int) -> str:
    return DTYPES.get(kind, UNKNOWN)
