"""Repairs what `lint.py` found, where the numbers stay as they are, bit for bit.

 1. A scale of shape [1] of an activation gets rank 0, with its zero point.
 2. A zero point that was left out is written where its type is known: int8 data, output_dtype.
    Elsewhere ONNX Runtime reads uint8, and an int8 zero point would be other numbers.
 3. uint8 with zero point 128 becomes int8 with zero point 0: the same steps, named otherwise.
 4. A quantized bias becomes the float constant that its DequantizeLinear gives.
 5. Pairs and halves of pairs that nothing reads go.

Each is done to a copy, which is run in ONNX Runtime without its optimizer next to the file as it
came, on random input. If one bit of one output differs, that repair is not done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from rtresnet.onnxlib.graph import DEQUANTIZE, GraphIndex, label
from rtresnet.quantization.bitwise_equal import same_bits
from rtresnet.quantization.lint import lint
from rtresnet.quantization.lint_numbers import role, stored_type, zero_point
from rtresnet.quantization.lint_rules import Finding


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What was done to one node, and the rule that it keeps now."""

    rule: str
    node: str
    what: str


def fix(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Repair], list[Finding]]:
    """Repairs what can be repaired exactly.

    Args:
        model: Any ONNX model that ONNX Runtime runs. Not changed.

    Returns:
        The repaired model, what was done, and what is left.

    Raises:
        UnavailableError: onnxruntime is not installed.
    """
    done: list[Repair] = []
    for step in STEPS:
        candidate = onnx.ModelProto()
        candidate.CopyFrom(model)
        repaired = step(candidate)
        if not repaired:
            continue
        _tidy(candidate)
        if same_bits(model, candidate):
            model, done = candidate, done + repaired
    return model, done, lint(model)


def _scalar_scales(model: onnx.ModelProto) -> list[Repair]:
    view, done = GraphIndex(model), []
    for node in view.quantizers():
        scale = view.constant(node.input[1])
        if role(view, node) != "activation" or scale is None or scale.shape != (1,):
            continue
        node.input[1] = _constant(model, f"{node.input[1]}.scalar", scale.reshape(()))
        zero = view.constant(zero_point(node))
        if zero is not None:
            node.input[2] = _constant(model, f"{node.input[2]}.scalar", zero.reshape(()))
        done.append(Repair(rule="scale-shape", node=label(node), what="scale of rank 0"))
    return done


def _written_zero_points(model: onnx.ModelProto) -> list[Repair]:
    view, done = GraphIndex(model), []
    for node in view.quantizers():
        scale = view.constant(node.input[1])
        if zero_point(node) or scale is None or stored_type(view, node) != TensorProto.INT8:
            continue
        name = _constant(model, f"{label(node)}.zero_point", np.zeros(scale.shape, np.int8))
        node.input[:] = [*node.input[:2], name]
        done.append(Repair(rule="no-zero-point", node=label(node), what="int8 zero point 0"))
    return done


def _signed(model: onnx.ModelProto) -> list[Repair]:
    view, done = GraphIndex(model), []

    def middle(node: onnx.NodeProto) -> bool:
        zero = view.constant(zero_point(node))
        return zero is not None and zero.dtype == np.uint8 and bool((zero == 128).all())

    def move(node: onnx.NodeProto) -> None:
        zero = view.constant(zero_point(node))
        assert zero is not None  # middle() has looked
        node.input[2] = _constant(model, f"{node.input[2]}.int8", np.zeros(zero.shape, np.int8))
        done.append(Repair(rule="zero-point", node=label(node), what="int8 with zero point 0"))

    for node in view.quantizers():
        if node.op_type == DEQUANTIZE:
            values = view.constant(node.input[0])
            if values is not None and middle(node):
                move(node)
                shifted = (values.astype(np.int16) - 128).astype(np.int8)
                node.input[0] = _constant(model, f"{node.input[0]}.int8", shifted)
            continue
        others = [reader for reader, _ in view.readers[node.output[0]]]
        pairs = all(reader.op_type == DEQUANTIZE for reader in others)
        if pairs and node.output[0] not in view.outputs and all(map(middle, [node, *others])):
            for half in (node, *others):
                move(half)
    return done


def _float_biases(model: onnx.ModelProto) -> list[Repair]:
    view, done = GraphIndex(model), []
    for node in view.quantizers():
        values = view.constant(node.input[0])
        scale = view.constant(node.input[1])
        if node.op_type != DEQUANTIZE or role(view, node) != "bias":
            continue
        if values is None or scale is None:
            continue
        zero = view.constant(zero_point(node)) if zero_point(node) else np.zeros((), values.dtype)
        if zero is None:
            continue
        steps = (values.astype(np.int64) - zero.astype(np.int64)).astype(scale.dtype)
        name = _constant(model, f"{label(node)}.float", steps * scale)
        for reader in model.graph.node:
            reader.input[:] = [name if x == node.output[0] else x for x in reader.input]
        model.graph.node.remove(node)
        done.append(Repair(rule="quantized-bias", node=label(node), what="a float constant"))
    return done


def _no_dangling(model: onnx.ModelProto) -> list[Repair]:
    done: list[Repair] = []
    while True:
        view = GraphIndex(model)
        unread = [
            node
            for node in view.quantizers()
            if not view.readers[node.output[0]] and node.output[0] not in view.outputs
        ]
        if not unread:
            return done
        for node in unread:
            model.graph.node.remove(node)
            done.append(Repair(rule="dangling", node=label(node), what="removed"))


STEPS: tuple[Callable[[onnx.ModelProto], list[Repair]], ...] = (
    _scalar_scales, _written_zero_points, _signed, _float_biases, _no_dangling,
)  # fmt: skip


def _constant(model: onnx.ModelProto, wished: str, value: np.ndarray) -> str:
    """Stores a constant; the same one once, another one of that name under the next free name."""
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    name, count = wished, 1
    while name in held:
        there = numpy_helper.to_array(held[name])
        if there.dtype == value.dtype and np.array_equal(there, value):
            return name
        name, count = f"{wished}.{count}", count + 1
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _tidy(model: onnx.ModelProto) -> None:
    """Takes out constants that nothing reads any more, and types that were noted before."""
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    used |= {value.name for value in (*graph.input, *graph.output)}
    for nodes in (graph.initializer, graph.node):
        for entry in list(nodes):
            constant = entry.name if isinstance(entry, TensorProto) else None
            if constant is None and entry.op_type == "Constant":
                constant = entry.output[0]
            if constant is not None and constant not in used:
                nodes.remove(entry)
    del graph.value_info[:]
