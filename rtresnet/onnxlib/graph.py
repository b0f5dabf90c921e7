"""Index of an ONNX graph: producers and consumers of tensors, constants, shortcuts, blocks.

Works on files of any tool: constants may be initializers or Constant nodes, names may be missing,
and a Cast may be anywhere. Imports onnx when it is needed, so that `branch_depths` and
`assign_blocks`, which need names only, also work without it. Contains no rules for quantized
graphs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rtresnet.core.errors import ArtifactError

if TYPE_CHECKING:
    import onnx

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = ("Conv", "Gemm", "MatMul")
CASTS = ("Cast", "Identity")
# Operators that pass values on unchanged; TensorRT moves a Q/DQ pair across them.
MOVES = (
    *CASTS, "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "Slice", "Pad",
    "Dropout",
)  # fmt: skip

STAGE = re.compile(r"(?:layer|stage)_?(\d+)(?:[._/](\d+)(?=[._/]|$))?", re.IGNORECASE)
STEM, HEAD = "stem", "head"
HEAD_OPERATORS = ("globalaveragepool", "reducemean", "mean", "gemm", "matmul")
CONSTANT_OPERATORS = ("dequantizelinear", "dequantize", "weights", "constant")
AFTER_ADD = ("relu", "quantize", "dequantize", "quantizelinear", "dequantizelinear", "cast")


class Node(Protocol):
    """An operation with the names of its inputs and outputs, like onnx.NodeProto."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def op_type(self) -> str:
        """ONNX's name of the operator."""

    @property
    def input(self) -> Sequence[str]:
        """Tensors that it reads, the data first."""

    @property
    def output(self) -> Sequence[str]:
        """Names of its outputs."""


def label(node: onnx.NodeProto) -> str:
    """Return a node's name, or its first output's name if it has none."""
    return node.name or next(iter(node.output), "") or node.op_type


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """Return an integer attribute."""
    entry = next((a for a in node.attribute if a.name == name), None)
    return default if entry is None else int(entry.i)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a deep copy of a model."""
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def with_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Raise a model to an opset, if it is older; change the model where nothing else changed.

    From 18 on, the operators of convolutional nets have only gained data types.
    """
    present = GraphIndex(model).opset
    if present >= opset:
        return model
    if present < 18:
        from onnx import version_converter

        properties = list(model.metadata_props)
        model = version_converter.convert_version(model, opset)
        if not model.metadata_props:
            model.metadata_props.extend(properties)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    model.ir_version = max(model.ir_version, 10)  # the one of opset 21
    return model


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Replace all nodes of a graph; `nodes` may contain its own."""
    nodes = list(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """Check a changed model and infer its types and shapes again.

    Raises:
        onnx.checker.ValidationError: The model is not valid ONNX.
    """
    import onnx

    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


class GraphIndex:
    """The edges and constants of a graph.

    The index is a snapshot: make another one after a change, except after `add_constant`.

    Args:
        model: An onnx.ModelProto.

    Attributes:
        nodes: In the graph's order.
        producers: Tensor to the node that computes it.
        readers: Tensor to the inputs that read it, as (node, index).
        inputs: Entries of the graph's inputs that are not initializers.
        outputs: Names of the graph's outputs.
        initializers: Name to tensor.
        opset: Version of the standard operators; 0 if the file names none.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.producers = {out: node for node in self.nodes for out in node.output if out}
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        for node in self.nodes:
            for index, name in enumerate(node.input):
                self.readers[name].append((node, index))
        self.initializers: dict[str, onnx.TensorProto] = {
            tensor.name: tensor for tensor in model.graph.initializer
        }
        self.inputs: list[onnx.ValueInfoProto] = [
            entry for entry in model.graph.input if entry.name not in self.initializers
        ]
        self.outputs = {value.name for value in model.graph.output}
        self.opset = max(
            (o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0
        )
        self._arrays: dict[str, np.ndarray | None] = {}

    @cached_property
    def types(self) -> dict[str, int]:
        """Element types by tensor name, as far as ONNX can infer them; 0 is unknown.

        Raises:
            ArtifactError: The types contradict each other.
        """
        import onnx

        try:
            graph = onnx.shape_inference.infer_shapes(self.model).graph
        except onnx.shape_inference.InferenceError as error:
            reason = " ".join(str(error).split())[:120]
            raise ArtifactError(
                f"the types of its tensors contradict each other ({reason})",
                fix="export it again",
            ) from None
        values = [*graph.input, *graph.output, *graph.value_info]
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        return types | {tensor.name: tensor.data_type for tensor in graph.initializer}

    def quantizers(self) -> list[onnx.NodeProto]:
        """Return every QuantizeLinear and DequantizeLinear, in graph order."""
        return [node for node in self.nodes if node.op_type in (QUANTIZE, DEQUANTIZE)]

    def operator(self, name: str) -> str:
        """Return the operator that produces a tensor; empty for inputs and initializers."""
        return self.producers[name].op_type if name in self.producers else ""

    def constant(self, name: str) -> np.ndarray | None:
        """Return the value of a tensor that is known before the graph runs, else None."""
        if name not in self._arrays:
            self._arrays[name] = self._constant(name)
        return self._arrays[name]

    def scalar(self, name: str) -> np.ndarray | None:
        """Return a constant of rank 0, else None."""
        value = self.constant(name)
        return value if value is not None and value.ndim == 0 else None

    def _constant(self, name: str) -> np.ndarray | None:
        import onnx
        from onnx import helper, numpy_helper

        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.producers.get(name)
        if node is not None and node.op_type == "Constant" and node.attribute:
            value = helper.get_attribute_value(node.attribute[0])
            if isinstance(value, onnx.TensorProto):
                return numpy_helper.to_array(value)
            return np.array(value, np.float32 if "float" in node.attribute[0].name else None)
        if node is not None and node.op_type == "Identity":
            return self.constant(node.input[0])
        return None

    def add_constant(self, name: str, value: np.ndarray) -> str:
        """Add an initializer and return its name.

        An equal one of that name is used again; if it differs, the new one gets the next free name.
        """
        from onnx import numpy_helper

        base, count = name, 1
        while name in self.initializers:
            present = numpy_helper.to_array(self.initializers[name])
            if present.dtype == value.dtype and np.array_equal(present, value):
                return name
            name, count = f"{base}.{count}", count + 1
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        self.initializers[name] = self.graph.initializer[-1]
        self._arrays.pop(name, None)
        return name

    def set_constant(self, name: str, value: np.ndarray) -> None:
        """Replace the value of an initializer."""
        from onnx import numpy_helper

        self.initializers[name].CopyFrom(numpy_helper.from_array(value, name))
        self._arrays.pop(name, None)

    def insert(
        self,
        *,
        before: Mapping[str, Sequence[onnx.NodeProto]] | None = None,
        after: Mapping[str, Sequence[onnx.NodeProto]] | None = None,
        removed: Collection[str] = (),
    ) -> None:
        """Insert nodes before and after others, named by their first output, and remove some.

        Nodes after a graph's input come first.
        """
        before, after = before or {}, after or {}
        ordered = [node for entry in self.graph.input for node in after.get(entry.name, ())]
        for node in self.graph.node:
            key = node.output[0]  # names of nodes may be missing
            ordered += before.get(key, ())
            if key not in removed:
                ordered += [node, *after.get(key, ())]
        replace_nodes(self.graph, ordered)

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """Return the one node that reads a tensor; None if there are more, or it is an output."""
        readers = self.readers[name]
        return readers[0][0] if len(readers) == 1 and name not in self.outputs else None

    def origin(self, name: str, through: Collection[str] = CASTS) -> str:
        """Follow first inputs backwards through the operators of `through`."""
        while (node := self.producers.get(name)) is not None and node.op_type in through:
            name = node.input[0]
        return name

    def maker(self, name: str, through: Collection[str] = CASTS) -> onnx.NodeProto | None:
        """Return the node that computes a tensor, before the operators of `through`."""
        return self.producers.get(self.origin(name, through))

    def dequantized(self, name: str, through: Collection[str] = CASTS) -> onnx.NodeProto | None:
        """Return the DequantizeLinear that produces a tensor, if there is one."""
        node = self.maker(name, through)
        return node if node is not None and node.op_type == DEQUANTIZE else None

    def quantizer(self, dequantize: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return the QuantizeLinear before a DequantizeLinear; None before a stored constant."""
        node = self.producers.get(dequantize.input[0])
        return node if node is not None and node.op_type == QUANTIZE else None

    def uses(
        self, name: str, through: Collection[str] = CASTS
    ) -> Iterator[tuple[onnx.NodeProto, int]]:
        """Yield the inputs that read a tensor, after the operators of `through`."""
        for node, index in self.readers.get(name, ()):
            if node.op_type in through and index == 0:
                yield from self.uses(node.output[0], through)
            else:
                yield node, index

    def reaches_output(self, name: str, through: Collection[str] = MOVES) -> bool:
        """Return whether a tensor is an output of the graph, after operators of `through`."""
        return name in self.outputs or any(
            self.reaches_output(node.output[0], through)
            for node, index in self.readers.get(name, ())
            if node.op_type in through and index == 0
        )

    def blocks(self) -> list[tuple[str, str]]:
        """Return the stage and block of each node by `assign_blocks`, with the shapes recorded."""
        heights = {
            value.name: value.type.tensor_type.shape.dim[2].dim_value
            for value in self.graph.value_info
            if len(value.type.tensor_type.shape.dim) == 4
        }

        def operator(node: onnx.NodeProto) -> str:
            stored = any(
                name in self.initializers or self.operator(name) == "Constant"
                for name in node.input
            )
            return "bias" if node.op_type == "Add" and stored else node.op_type

        return assign_blocks(
            [(node.name, operator(node), heights.get(node.output[0], 0)) for node in self.nodes]
        )


def branch_depths(producers: Mapping[str, Any], add: Node) -> tuple[int, int] | None:
    """Count the convolutions behind both inputs of an Add, back to where the branches part.

    The shortcut of a residual block is the input with fewer of them.

    Args:
        producers: Tensor to the `Node` that makes it.
        add: The addition.

    Returns:
        The two numbers; None if the inputs have no common origin.
    """

    def path(tensor: str) -> dict[str, int]:
        """Follow first inputs back from `tensor`; counts the convolutions before each tensor."""
        depths, convolutions = {tensor: 0}, 0
        while (node := producers.get(tensor)) is not None and node.input:
            convolutions += node.op_type == "Conv"
            tensor = node.input[0]
            depths[tensor] = convolutions
        return depths

    first, second = path(add.input[0]), path(add.input[1])
    fork = next((tensor for tensor in first if tensor in second), None)
    return None if fork is None else (first[fork], second[fork])


def assign_blocks(nodes: Sequence[tuple[str, str, int]]) -> list[tuple[str, str]]:
    """Assign each node of a residual net to a stage and a block.

    Names such as layer1.0.conv1 or stage2_conv3 state both. In a net whose convolutions have no
    such names a block ends at each residual Add, and a stage ends where the output gets smaller.

    Args:
        nodes: (name, operator, height of the output or 0) in the graph's order. Operators are
            ONNX's or TensorRT's, in any case; "add" must be given for residual additions only.

    Returns:
        (stage, block) of each: ("layer1", "layer1.0"), ("stem", "stem"), ("head", "head").
    """
    plain = [(name, "conv" if op.lower().endswith("conv") else op.lower(), height)
             for name, op, height in nodes]  # fmt: skip
    named = any(op == "conv" and STAGE.search(name) for name, op, _ in plain)
    return _blocks_by_name(plain) if named else _blocks_by_additions(plain)


def _blocks_by_name(nodes: list[tuple[str, str, int]]) -> list[tuple[str, str]]:
    # The last match of "/layer1/layer1.0/conv1" names the block.
    matches = [next(reversed([*STAGE.finditer(name)]), None) for name, _, _ in nodes]
    computes = [op not in CONSTANT_OPERATORS for _, op, _ in nodes]
    numbers = sorted({int(match[1]) for match in matches if match})  # some tools count from 0
    last = max(i for i, match in enumerate(matches) if match and computes[i])
    blocks, current = [], (STEM, STEM)
    for index, ((_, op, _), match) in enumerate(zip(nodes, matches, strict=True)):
        block = (HEAD, HEAD) if index > last or op in HEAD_OPERATORS else current
        if match:
            stage = f"layer{numbers.index(int(match[1])) + 1}"
            block = (stage, f"{stage}.{match[2]}" if match[2] else stage)
            current = block if computes[index] else current
        blocks.append(block)
    return blocks


def _blocks_by_additions(nodes: list[tuple[str, str, int]]) -> list[tuple[str, str]]:
    adds = [index for index, (_, op, _) in enumerate(nodes) if op == "add"]
    convolutions = [index for index, (_, op, _) in enumerate(nodes) if op == "conv"]
    ends = adds or convolutions[1:]
    if not ends:
        return [(HEAD, HEAD) if op in HEAD_OPERATORS else (STEM, STEM) for _, op, _ in nodes]
    heights = [height for _, _, height in nodes]
    names: list[tuple[str, str]] = []
    stage, number = 0, 0
    for before, end in zip([None, *ends], ends, strict=False):
        smaller = before is None or heights[end] != heights[before]
        stage, number = (stage + 1, 0) if smaller else (stage, number + 1)
        names.append((f"layer{stage}", f"layer{stage}.{number}"))
    # The stem ends before the first other convolution that is no larger than the first Add.
    inside = [i for i in convolutions[1:] if heights[i] <= heights[ends[0]]]
    start = min([*inside, ends[0]])
    blocks: list[tuple[str, str]] = []
    current = 0
    for index, (_, op, _) in enumerate(nodes):
        begins = op not in AFTER_ADD  # an activation after an Add still belongs to its block
        if begins and index > ends[-1]:
            return [*blocks, *[(HEAD, HEAD)] * (len(nodes) - index)]
        if begins and index > ends[current]:
            current += 1
        blocks.append((STEM, STEM) if index < start else names[current])
    return blocks
