"""An ONNX graph as the rules about Q/DQ look at it: who makes a tensor, who reads it, constants.

For files by anybody: constants may be initializers or Constant nodes, names may be missing, and
a Cast may stand anywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rtresnet.core.errors import ArtifactError

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = ("Conv", "Gemm", "MatMul")
CASTS = ("Cast", "Identity")
# What TensorRT moves a Q/DQ pair across: these hand values on as they are.
MOVES = (
    *CASTS, "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "Slice", "Pad",
    "Dropout",
)  # fmt: skip

Use = tuple[onnx.NodeProto, int]


def label(node: onnx.NodeProto) -> str:
    """What to call a node: its name, or its first output's where it has none."""
    return node.name or next(iter(node.output), "") or node.op_type


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else int(found.i)


class GraphIndex:
    """A graph with its edges; a snapshot, so make another after a change."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.nodes = list(model.graph.node)
        self.opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
                         default=0)  # fmt: skip
        self.producers = {out: node for node in self.nodes for out in node.output if out}
        self.outputs = {value.name for value in model.graph.output}
        self.readers: dict[str, list[Use]] = defaultdict(list)
        for node in self.nodes:
            for index, name in enumerate(node.input):
                self.readers[name].append((node, index))
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._arrays: dict[str, np.ndarray] = {}
        self.types = _types(model)

    def quantizers(self) -> list[onnx.NodeProto]:
        """Every QuantizeLinear and DequantizeLinear, in graph order."""
        return [node for node in self.nodes if node.op_type in (QUANTIZE, DEQUANTIZE)]

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a tensor that is known before the graph runs."""
        if name in self._arrays:
            return self._arrays[name]
        node = self.producers.get(name)
        if name in self._tensors:
            value = numpy_helper.to_array(self._tensors[name])
        elif node is not None and node.op_type == "Constant" and node.attribute:
            held = helper.get_attribute_value(node.attribute[0])
            if isinstance(held, onnx.TensorProto):
                value = numpy_helper.to_array(held)
            else:
                value = np.array(held, np.float32 if "float" in node.attribute[0].name else None)
        elif node is not None and node.op_type == "Identity":
            return self.constant(node.input[0])
        else:
            return None
        self._arrays[name] = value
        return value

    def origin(self, name: str, through: Collection[str] = CASTS) -> str:
        """The tensor behind `name` when operators of `through` are passed along first inputs."""
        while (node := self.producers.get(name)) is not None and node.op_type in through:
            name = node.input[0]
        return name

    def maker(self, name: str, through: Collection[str] = CASTS) -> onnx.NodeProto | None:
        """The node that computes `name`, passing operators of `through`."""
        return self.producers.get(self.origin(name, through))

    def dequantized(self, name: str, through: Collection[str] = CASTS) -> onnx.NodeProto | None:
        """The DequantizeLinear behind a tensor, if there is one."""
        node = self.maker(name, through)
        return node if node is not None and node.op_type == DEQUANTIZE else None

    def quantizer(self, dequantize: onnx.NodeProto) -> onnx.NodeProto | None:
        """The QuantizeLinear that feeds a DequantizeLinear; None in front of a stored constant."""
        node = self.producers.get(dequantize.input[0])
        return node if node is not None and node.op_type == QUANTIZE else None

    def uses(self, name: str, through: Collection[str] = CASTS) -> Iterator[Use]:
        """The inputs that read `name`, passing operators of `through`."""
        for node, index in self.readers.get(name, ()):
            if node.op_type in through and index == 0:
                yield from self.uses(node.output[0], through)
            else:
                yield node, index

    def reaches_output(self, name: str, through: Collection[str] = MOVES) -> bool:
        """Whether a tensor is an output of the graph, passing operators of `through`."""
        return name in self.outputs or any(
            self.reaches_output(node.output[0], through)
            for node, index in self.readers.get(name, ())
            if node.op_type in through and index == 0
        )

    def shortcut(self, add: onnx.NodeProto) -> int | None:
        """Which input of an Add has fewer convolutions behind it, up to where the branches part.

        None where the Add has a constant or its inputs do not part from one tensor: no shortcut.
        """
        if any(self.constant(name) is not None for name in add.input):
            return None
        first, second = (self._path(name) for name in add.input)
        fork = next((name for name in first if name in second), None)
        if fork is None or first[fork] == second[fork]:
            return None
        return 0 if first[fork] < second[fork] else 1

    def _path(self, name: str) -> dict[str, int]:
        """Tensors behind `name` along first inputs, with convolutions passed on the way."""
        seen, convolutions = {name: 0}, 0
        while (node := self.producers.get(name)) is not None and node.input:
            convolutions += node.op_type == "Conv"
            name = node.input[0]
            seen[name] = convolutions
        return seen


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types by tensor name, as far as ONNX can tell; 0 is unknown."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except onnx.shape_inference.InferenceError as error:
        reason = " ".join(str(error).split())[:120]
        raise ArtifactError(
            f"its tensors' types do not fit ({reason})", fix="export it again"
        ) from None
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}
