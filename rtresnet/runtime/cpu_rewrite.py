"""Rewrite a Q/DQ file in memory for integer kernels of CPUs. The file on disk does not change.

TensorRT needs signed activations that are quantized after the ReLU. CPU kernels need unsigned
ones, quantized right after the convolution, and on x86 without VNNI their sums must also fit in 16
bits: `vpmaddubsw` adds two u8 x s8 products and saturates silently. Before: a Q/DQ file,
folded, symmetric int8. After:

 1. An int8 activation with zero point 0 becomes uint8. One that can be negative gets zero point
    128: q + 128 for every q. One that cannot, because a ReLU makes it, keeps its integers 0 to
    127 with zero point 0; a Clip at 127 steps before the QuantizeLinear replaces the
    range of int8. The rounding, the clipping and the numbers after dequantization stay the same.
    Two products of such an activation add up to 2 * 127 * 127 = 32,258 at most, so that 8-bit
    weights cannot saturate. No rounding of weights to 7 bits is needed.
 2. Where products could still saturate (the image is signed; files of other tools use all
    of uint8), a Conv or Gemm gets its weights as float constants and runs in float: the same
    numbers. Only on CPUs whose kernels saturate.
 3. The convolution that ends a residual branch adds into a float tensor, and ONNX Runtime would
    run it in float: a third of a net's work. Its output is quantized as well, to uint8 over
    [-127 shortcut steps, 127 result steps]. Lower values become zero in the ReLU, and higher
    values are clipped by the result's quantization, for any shortcut. No image is
    needed for this. The sum is rounded twice instead of once, and its quantized result
    changes by at most one step. Where it could change by more, or nothing is quantized behind
    the addition (the last block; one before an option A shortcut), the branch stays in float.
    Where the file has the branch's range in calibration (`onnxlib/metadata.py`), only that range
    and a quarter more is covered, in finer steps; values beyond it are clipped.
 4. A QuantizeLinear behind ReLU, max pool and Clip moves up to the convolution, and they work on
    integers. Rounding keeps order and zero stays zero, so the result is bitwise equal, and the
    ReLU itself is the lower end of uint8.

ONNX Runtime's own provider gets rules 1 to 4, OpenVINO rules 1 and 2 and only where its kernels
saturate. Rules 1, 2 and 4 change no number of the graph (tested without the provider's
optimizer). ONNX Runtime's integer kernels then round the bias to their own step.

A BF16 file is rewritten as well, because ONNX Runtime's CPU provider has no BF16 convolutions:
its weights become float32, and Cast pairs round every result to BF16 (`emulate_bf16`).

The rewrite needs the package onnx. If it is not installed, the file is not changed, and the
caller keeps the provider from forming integer kernels (`CpuModel.needs_float`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rtresnet.core import hardware
from rtresnet.core.errors import ArtifactError
from rtresnet.onnxlib import io, metadata
from rtresnet.onnxlib.graph import (
    DEQUANTIZE,
    QUANTIZE,
    WEIGHTED,
    GraphIndex,
    attribute,
    replace_nodes,
)

if TYPE_CHECKING:
    import onnx

# Zero points of rule 1, by the name of their constant: of tensors that can be negative, and of
# those that a Clip keeps in [0, 127].
SIGNED, CLIPPED = "rtresnet.zero_point_128", "rtresnet.zero_point_0"
ZERO_POINTS = {SIGNED: 128, CLIPPED: 0}
INT8_MAX = 127
INT16_MAX = 32767
BRANCH_MARGIN = 1.25  # range of a residual branch, relative to its range in calibration
# Operations whose results are among their inputs.
SELECTING = ("Relu", "MaxPool", "Flatten", "Reshape", "Squeeze", "Slice", "Pad", "Transpose")
# Operations whose output is not negative if their first input is not negative.
SIGN_PRESERVING = (
    "QuantizeLinear", "DequantizeLinear", "MaxPool", "AveragePool", "GlobalAveragePool",
    "ReduceMean", "Flatten", "Reshape", "Squeeze", "Slice", "Pad",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CpuModel:
    """A model as a CPU provider loads it.

    Attributes:
        model: The serialized model, or the file's path if nothing changed.
        quantized: Whether the file has quantized activations.
        float_layers: Quantized layers that run in float because the CPU's integer sums would
            saturate (rule 2).
        needs_float: Whether the file is quantized and was not rewritten, because the package onnx
            is not installed: every layer has to run in float.
        fp8: Whether it has FP8 tensors; unknown, and so no, without the package onnx.
        emulates_bf16: Whether the file is BF16 and runs in float32 with results rounded to BF16.
    """

    model: str | bytes
    quantized: bool = False
    float_layers: tuple[str, ...] = ()
    needs_float: bool = False
    fp8: bool = False
    emulates_bf16: bool = False


def rewrite_for_cpu(
    path: str | os.PathLike[str],
    graph: onnx.ModelProto | None = None,
    *,
    saturates: bool,
    integer_chains: bool = True,
    preserve_numerics: bool = False,
) -> CpuModel:
    """Rewrite a file for a CPU provider.

    Args:
        path: The ONNX file.
        graph: Its content, if it has been read; the rules change it.
        saturates: Whether the CPU's kernels add u8 x s8 products in saturating 16 bits.
        integer_chains: Apply rules 3 and 4, which ONNX Runtime's own provider needs.
        preserve_numerics: Skip rule 3, the one that changes results.

    Raises:
        ArtifactError: Not an ONNX file, or its record of residual branches is damaged.
    """
    if not hardware.installed("onnx"):
        quantized = is_quantized(path)
        return CpuModel(model=os.fspath(path), quantized=quantized, needs_float=quantized)
    model = io.load(path) if graph is None else graph
    if emulated := emulate_bf16(model):
        return CpuModel(model=bytes(emulated.SerializeToString()), emulates_bf16=True)
    fp8 = has_fp8(model)
    changed = to_unsigned(model)
    float_layers = dequantize_saturating(model) if saturates else ()
    if not changed and not float_layers:
        quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        return CpuModel(model=os.fspath(path), quantized=quantized, fp8=fp8)
    if integer_chains and changed:
        if not preserve_numerics:
            try:
                quantize_branches(model)
            except ArtifactError as error:
                raise ArtifactError(f"{path}: {error.message}", fix=error.fix) from None
        quantize_early(model)
    serialized = bytes(model.SerializeToString())
    return CpuModel(model=serialized, quantized=True, float_layers=float_layers, fp8=fp8)


def is_quantized(path: str | os.PathLike[str]) -> bool:
    """Return whether an ONNX file names QuantizeLinear or DequantizeLinear. Needs no onnx."""
    return b"uantizeLinear" in Path(path).read_bytes()


def emulate_bf16(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return a BF16 model as float32 operations whose results are rounded to BF16.

    Products of BF16 are exact in float32, and sums are float32, as on GPUs. An operation that
    only moves or selects numbers is not rounded again.

    Args:
        model: Any model. Not changed.

    Returns:
        A new model; None if this one has no BF16 constants.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    if all(tensor.data_type != TensorProto.BFLOAT16 for tensor in model.graph.initializer):
        return None
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    narrow = {
        entry.name
        for entry in (*graph.value_info, *graph.output)
        if entry.type.tensor_type.elem_type == TensorProto.BFLOAT16
    }
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type in SELECTING or node.output[0] not in narrow:
            continue
        name = node.output[0]
        if node.op_type == "Cast":  # to BF16
            node.output[0] = f"{name}.bf16"
        else:
            node.output[0] = f"{name}.float"
            cast = helper.make_node("Cast", [node.output[0]], [f"{name}.bf16"],
                                    to=TensorProto.BFLOAT16)  # fmt: skip
            nodes.append(cast)
        nodes.append(helper.make_node("Cast", [f"{name}.bf16"], [name], to=TensorProto.FLOAT))
    replace_nodes(graph, nodes)
    del graph.value_info[:]
    return model


def has_bf16(path: str | os.PathLike[str]) -> bool:
    """Return whether an ONNX file has BF16 constants; False if the package onnx is missing."""
    if not hardware.installed("onnx"):
        return False
    from onnx import TensorProto

    constants = io.load(path).graph.initializer
    return any(tensor.data_type == TensorProto.BFLOAT16 for tensor in constants)


def read_quantized(path: str | os.PathLike[str]) -> onnx.ModelProto | None:
    """Return the graph of a quantized file; None of another one, and without the package onnx."""
    return io.load(path) if is_quantized(path) and hardware.installed("onnx") else None


def has_fp8(model: onnx.ModelProto | None) -> bool:
    """Return whether a graph has FP8 tensors."""
    if model is None:
        return False
    from onnx import TensorProto

    fp8 = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2)
    return any(tensor.data_type in fp8 for tensor in model.graph.initializer)


def to_unsigned(model: Any) -> int:
    """Apply rule 1 in place.

    Returns:
        Number of activations that became unsigned.
    """
    from onnx import helper

    graph = _CpuIndex(model)
    clips: dict[str, list[Any]] = {}
    moved = 0
    for quantize in model.graph.node:
        if quantize.op_type != QUANTIZE or not graph.is_int8(quantize):
            continue
        name, integers = quantize.input[0], quantize.output[0]
        readers = [reader for reader, _ in graph.readers[integers]]
        if integers in graph.outputs or any(n.op_type != "DequantizeLinear" for n in readers):
            continue
        moved += 1
        zero_point = SIGNED
        if graph.never_negative(name):
            zero_point, scale = CLIPPED, graph.scalar(quantize.input[1])
            assert scale is not None  # is_int8
            graph.add_constant(f"{integers}.limit", (INT8_MAX * scale).astype(scale.dtype))
            inputs, clipped = [name, "", f"{integers}.limit"], f"{integers}.clipped"
            clips[integers] = [helper.make_node("Clip", inputs, [clipped], name=clipped)]
            quantize.input[0] = clipped
        graph.add_constant(zero_point, np.array(ZERO_POINTS[zero_point], np.uint8))
        for node in (quantize, *readers):
            del node.input[2:]
            node.input.append(zero_point)
    if moved:
        graph.insert(before=clips)
        del model.graph.value_info[:]  # its entries still have type int8
    return moved


def dequantize_saturating(model: Any) -> tuple[str, ...]:
    """Apply rule 2 in place.

    Returns:
        Names of the layers that now run in float.
    """
    from onnx import helper

    graph = _CpuIndex(model)
    float_layers: list[str] = []
    casts: dict[str, list[Any]] = {}
    for node in model.graph.node:
        activation, weight = (graph.producers.get(name) for name in (*node.input, "", "")[:2])
        if node.op_type not in WEIGHTED or weight is None or activation is None:
            continue
        if {activation.op_type, weight.op_type} != {"DequantizeLinear"}:
            continue
        constant = graph.dequantized_weight(weight)
        if constant is None:
            continue
        largest, values = constant
        if 2 * (INT8_MAX if graph.is_clipped(activation) else 255) * largest > INT16_MAX:
            node.input[1] = f"{weight.output[0]}.float"
            graph.add_constant(node.input[1], values)
            # No DequantizeLinear: behind one, ONNX Runtime quantizes float weights again, with
            # one scale for all channels (its WeightBiasQuantization).
            name, (integers, scale, *zero_point) = f"{node.output[0]}.input", activation.input
            to = helper.np_dtype_to_tensor_dtype(values.dtype)
            casts[node.output[0]] = [helper.make_node("Cast", [integers], [f"{name}.int"], to=to)]
            steps = f"{name}.int"
            if zero_point:
                casts[node.output[0]] += [
                    helper.make_node("Cast", zero_point, [f"{name}.zero"], to=to),
                    helper.make_node("Sub", [steps, f"{name}.zero"], [f"{name}.steps"]),
                ]
                steps = f"{name}.steps"
            casts[node.output[0]].append(helper.make_node("Mul", [steps, scale], [name]))
            node.input[0] = name
            float_layers.append(node.name or node.output[0])
    graph.insert(before=casts)
    return tuple(float_layers)


def quantize_branches(model: Any) -> int:
    """Apply rule 3 in place, on a model that rule 1 has changed.

    Returns:
        Number of quantized branches.
    """
    from onnx import helper

    graph = _CpuIndex(model)
    ranges = metadata.BRANCH_RANGES.read(metadata.properties_of(model)) or {}
    pairs: dict[str, list[Any]] = {}
    for add in model.graph.node:
        branch = _branch(graph, add, ranges)
        if branch is None:
            continue
        index, scale, zero = branch
        name = add.input[index]
        constants = [f"{name}.branch_scale", f"{name}.branch_zero_point"]
        for label, value in zip(constants, (scale, zero), strict=True):
            graph.add_constant(label, value)
        add.input[index] = f"{name}.branch"
        steps = f"{name}.branch_steps"
        pairs[name] = [
            helper.make_node("QuantizeLinear", [name, *constants], [steps], name=steps),
            helper.make_node("DequantizeLinear", [steps, *constants], [f"{name}.branch"],
                             name=f"{name}.branch"),
        ]  # fmt: skip
    graph.insert(after=pairs)
    return len(pairs)


def _branch(
    graph: _CpuIndex, add: Any, ranges: metadata.BranchRanges
) -> tuple[int, np.ndarray, np.ndarray] | None:
    """Return the float input of a residual addition, its scale and its zero point."""
    kinds = [graph.operator(name) for name in add.input]
    if add.op_type != "Add" or sorted(kinds) != ["Conv", "DequantizeLinear"]:
        return None
    index = kinds.index("Conv")
    dequantize = graph.producers[add.input[1 - index]]
    relu = graph.only_reader(add.output[0])
    quantize = graph.only_reader(relu.output[0]) if relu and relu.op_type == "Relu" else None
    if quantize is not None and quantize.op_type == "Clip":
        quantize = graph.only_reader(quantize.output[0])
    if quantize is None or graph.only_reader(add.input[index]) is None:
        return None
    if not graph.is_int8_range(quantize) or not graph.is_int8_range(dequantize):
        return None
    if not graph.ends_in_integers(add.input[index]):
        return None
    step, shortcut_step = (graph.scalar(node.input[1]) for node in (quantize, dequantize))
    assert step is not None and shortcut_step is not None  # is_int8_range
    result, shortcut = float(step), float(shortcut_step)
    lowest = -INT8_MAX * shortcut
    highest = INT8_MAX * result + (0 if graph.is_clipped(dequantize) else 128 * shortcut)
    if add.input[index] in ranges:
        low, high = (BRANCH_MARGIN * end for end in ranges[add.input[index]])
        lowest, highest = max(lowest, min(0.0, low)), min(highest, max(0.0, high))
    scale = (highest - lowest) / 255
    if not 0 < scale / 2 < result * (1 - 1e-6):  # rounding to the nearest errs by half of it
        return None
    zero = np.array(np.rint(-lowest / scale), np.uint8)
    return index, np.array(scale, step.dtype), zero


def quantize_early(model: Any) -> int:
    """Apply rule 4 in place, after rule 1; also up to additions of rule 3.

    Returns:
        Number of moved QuantizeLinear nodes.
    """
    from onnx import helper

    graph = _CpuIndex(model)
    removed: set[str] = set()
    moved: dict[str, list[Any]] = {}
    for quantize in model.graph.node:
        if quantize.op_type != QUANTIZE or not graph.is_clipped(quantize):
            continue
        chain: list[Any] = []
        name = quantize.input[0]
        while graph.operator(name) in ("Relu", "MaxPool", "Clip") and graph.only_reader(name):
            chain.insert(0, graph.producers[name])
            name = chain[0].input[0]
        if not graph.only_reader(name) or not graph.ends_in_integers(name):
            continue
        result = quantize.output[0]
        source = f"{result}.early"
        quantize.input[0], quantize.output[0] = name, source
        links: list[Any] = []
        for link in chain:
            removed.add(link.output[0])
            if link.op_type == "Relu":  # the zero point is the lowest integer
                continue
            link_output = f"{result}.{link.name}"
            if link.op_type == "Clip":
                graph.add_constant("activation.max", np.array(INT8_MAX, np.uint8))
                inputs = [source, "", "activation.max"]
                links.append(helper.make_node("Clip", inputs, [link_output], name=link.name))
            else:
                links.append(helper.make_node("MaxPool", [source], [link_output], name=link.name))
                links[-1].attribute.extend(link.attribute)
            source = link_output
        links[-1].output[0] = result
        moved[quantize.output[0]] = links
    if moved:
        graph.insert(after=moved, removed=removed)
    return len(moved)


class _CpuIndex(GraphIndex):
    """A graph index with the pairs of rule 1, built before nodes are moved."""

    def dequantized_weight(self, node: Any) -> tuple[int, np.ndarray] | None:
        """Return a weight behind a DequantizeLinear: its largest integer and its values.

        None if it is not an 8-bit constant.
        """
        quantize = self.quantizer(node)
        weight = self.constant(node.input[0] if quantize is None else quantize.input[0])
        scale = self.constant(node.input[1])
        if weight is None or scale is None:
            return None
        axis = attribute(node, "axis", 1) % max(1, weight.ndim)
        shape = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
        zero = self.constant(node.input[2]) if len(node.input) > 2 else None
        if zero is None:
            zero = np.array(0, weight.dtype if quantize is None else np.uint8)
        if zero.dtype not in (np.int8, np.uint8):
            return None
        limits = np.iinfo(zero.dtype)
        zero, scale = (
            value.reshape(shape) if value.ndim else value
            for value in (zero.astype(np.int64), scale)
        )
        if quantize is not None:
            weight = np.clip(np.rint(weight / scale) + zero, limits.min, limits.max)
        steps = weight.astype(np.int64) - zero
        return int(np.abs(steps).max(initial=0)), steps.astype(scale.dtype) * scale

    def is_int8(self, quantize: Any) -> bool:
        """Return whether it quantizes to int8 with one scale and zero point 0."""
        scale, zero = (self.scalar(name) for name in (*quantize.input[1:3], "", "")[:2])
        return scale is not None and zero is not None and zero.dtype == np.int8 and zero == 0

    def is_int8_range(self, node: Any) -> bool:
        """Return whether it is half of a pair of rule 1: uint8 that covers the range of int8."""
        pair = node.op_type in (QUANTIZE, DEQUANTIZE) and len(node.input) > 2
        return pair and node.input[2] in ZERO_POINTS

    def is_clipped(self, node: Any) -> bool:
        """Return whether it is half of a pair of rule 1 with integers from 0 to 127."""
        return self.is_int8_range(node) and node.input[2] == CLIPPED

    def never_negative(self, name: str) -> bool:
        """Return whether a ReLU produces a tensor, before operations that keep its sign."""
        node = self.producers.get(name)
        while node is not None and node.op_type in SIGN_PRESERVING:
            padding = node.input[2] if node.op_type == "Pad" and len(node.input) > 2 else ""
            if padding:
                value = self.scalar(padding)
                if value is None or not value >= 0:
                    return False
            node = self.producers.get(node.input[0])
        return node is not None and node.op_type == "Relu"

    def ends_in_integers(self, name: str) -> bool:
        """Return whether a kernel that writes integers produces a tensor.

        A QuantizeLinear directly behind a float convolution would make ONNX Runtime quantize its
        weights again (its WeightBiasQuantization), with a saturating kernel.
        """
        node = self.producers.get(name)
        return (
            node is not None
            and node.op_type in ("Conv", "Add")
            and all(self.operator(part) == DEQUANTIZE for part in node.input[:2])
        )
