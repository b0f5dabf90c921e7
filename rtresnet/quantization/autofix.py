"""Repair findings of `lint.py` if the outputs stay bitwise equal.

 1. An activation scale of shape [1] gets rank 0, with its zero point.
 2. An omitted zero point is written where its type is known: int8 data, output_dtype. Elsewhere
    ONNX Runtime reads uint8, and an int8 zero point would change the values.
 3. uint8 with zero point 128 becomes int8 with zero point 0: the same steps.
 4. A quantized bias becomes the float constant that its DequantizeLinear computes.
 5. Pairs and halves of pairs that nothing reads are removed.

Each repair is made on a copy. The copy and the file run in ONNX Runtime without its optimizer on
random input. If one bit of one output differs, the repair is discarded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from rtresnet.core.errors import missing_package
from rtresnet.core.serialization import json_name
from rtresnet.onnxlib.graph import DEQUANTIZE, GraphIndex, copied, label
from rtresnet.quantization.lint import lint, role, stored_type, zero_point
from rtresnet.quantization.lint_rules import Finding

# Sizes that the file leaves open: the batch, and any other.
BATCH, SIDE = 2, 64


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A repair of one node, and the rule that the node violated."""

    rule: str
    node: str
    change: str = json_name("what")


def fix(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Repair], list[Finding]]:
    """Repair the findings that have an exact repair.

    Args:
        model: Any ONNX model that ONNX Runtime runs. Not changed.

    Returns:
        The repaired model, the repairs, and the remaining findings.

    Raises:
        UnavailableError: onnxruntime is not installed.
    """
    repairs: list[Repair] = []
    for step in STEPS:
        candidate = copied(model)
        made = step(GraphIndex(candidate))
        if not made:
            continue
        _remove_unread_constants(candidate)
        if bitwise_equal(model, candidate):
            model, repairs = candidate, repairs + made
    return model, repairs, lint(model)


def bitwise_equal(first: onnx.ModelProto, second: onnx.ModelProto) -> bool:
    """Return whether two models compute the same bits from random input.

    The input is drawn from a normal distribution with a fixed seed. False also if ONNX Runtime
    rejects either model.
    """
    feed = _random_input(first)
    if feed is None:
        return False
    outputs = [_run(model, feed) for model in (first, second)]
    if outputs[0] is None or outputs[1] is None:
        return False
    return all(a.tobytes() == b.tobytes() for a, b in zip(*outputs, strict=True))


def _random_input(model: onnx.ModelProto) -> dict[str, np.ndarray] | None:
    rng, feed = np.random.default_rng(0), {}
    for value in GraphIndex(model).inputs:
        tensor = value.type.tensor_type
        shape = [
            dim.dim_value or (SIDE if index else BATCH)
            for index, dim in enumerate(tensor.shape.dim)
        ]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype.kind == "f":
            feed[value.name] = rng.standard_normal(shape).astype(dtype)
        elif dtype.kind in "iu":
            feed[value.name] = rng.integers(0, 128, shape).astype(dtype)
        else:
            return None
    return feed


def _run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "repairing a file") from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # lint rules explain rejected files
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        outputs: list[np.ndarray] = session.run(None, feed)
    except Exception:  # the errors of ONNX Runtime have no common base class
        return None
    return outputs


def _make_scales_scalar(index: GraphIndex) -> list[Repair]:
    repairs = []
    for node in index.quantizers():
        scale = index.constant(node.input[1])
        if role(index, node) != "activation" or scale is None or scale.shape != (1,):
            continue
        node.input[1] = index.add_constant(f"{node.input[1]}.scalar", scale.reshape(()))
        zero = index.constant(zero_point(node))
        if zero is not None:
            node.input[2] = index.add_constant(f"{node.input[2]}.scalar", zero.reshape(()))
        repairs.append(Repair(rule="scale-shape", node=label(node), change="scale of rank 0"))
    return repairs


def _write_zero_points(index: GraphIndex) -> list[Repair]:
    repairs = []
    for node in index.quantizers():
        scale = index.constant(node.input[1])
        if zero_point(node) or scale is None or stored_type(index, node) != TensorProto.INT8:
            continue
        name = index.add_constant(f"{label(node)}.zero_point", np.zeros(scale.shape, np.int8))
        node.input[:] = [*node.input[:2], name]
        repairs.append(Repair(rule="no-zero-point", node=label(node), change="int8 zero point 0"))
    return repairs


def _make_signed(index: GraphIndex) -> list[Repair]:
    repairs = []

    def has_zero_point_128(node: onnx.NodeProto) -> bool:
        zero = index.constant(zero_point(node))
        return zero is not None and zero.dtype == np.uint8 and bool((zero == 128).all())

    def change(node: onnx.NodeProto) -> None:
        zero = index.constant(zero_point(node))
        assert zero is not None  # has_zero_point_128
        node.input[2] = index.add_constant(f"{node.input[2]}.int8", np.zeros(zero.shape, np.int8))
        repairs.append(Repair(rule="zero-point", node=label(node), change="int8 with zero point 0"))

    for node in index.quantizers():
        if node.op_type == DEQUANTIZE:
            values = index.constant(node.input[0])
            if values is not None and has_zero_point_128(node):
                change(node)
                shifted = (values.astype(np.int16) - 128).astype(np.int8)
                node.input[0] = index.add_constant(f"{node.input[0]}.int8", shifted)
            continue
        readers = [reader for reader, _ in index.readers[node.output[0]]]
        in_pairs = all(reader.op_type == DEQUANTIZE for reader in readers)
        if (
            in_pairs
            and node.output[0] not in index.outputs
            and all(map(has_zero_point_128, [node, *readers]))
        ):
            for half in (node, *readers):
                change(half)
    return repairs


def _make_biases_float(index: GraphIndex) -> list[Repair]:
    repairs = []
    for node in index.quantizers():
        values, scale = index.constant(node.input[0]), index.constant(node.input[1])
        if node.op_type != DEQUANTIZE or role(index, node) != "bias":
            continue
        if values is None or scale is None:
            continue
        zero = index.constant(zero_point(node)) if zero_point(node) else np.zeros((), values.dtype)
        if zero is None:
            continue
        steps = (values.astype(np.int64) - zero.astype(np.int64)).astype(scale.dtype)
        name = index.add_constant(f"{label(node)}.float", steps * scale)
        for reader, position in index.readers[node.output[0]]:
            reader.input[position] = name
        index.graph.node.remove(node)
        repairs.append(Repair(rule="quantized-bias", node=label(node), change="a float constant"))
    return repairs


def _remove_unread(index: GraphIndex) -> list[Repair]:
    unread = [
        node
        for node in index.quantizers()
        if not index.readers[node.output[0]] and node.output[0] not in index.outputs
    ]
    repairs = [Repair(rule="dangling", node=label(node), change="removed") for node in unread]
    for node in unread:
        index.graph.node.remove(node)
    return repairs + _remove_unread(GraphIndex(index.model)) if repairs else []


STEPS: tuple[Callable[[GraphIndex], list[Repair]], ...] = (
    _make_scales_scalar, _write_zero_points, _make_signed, _make_biases_float, _remove_unread,
)  # fmt: skip


def _remove_unread_constants(model: onnx.ModelProto) -> None:
    """Remove constants that nothing reads any more, and recorded types."""
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    used |= {value.name for value in (*graph.input, *graph.output)}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        if node.output[0] not in used:
            graph.node.remove(node)
    del graph.value_info[:]
