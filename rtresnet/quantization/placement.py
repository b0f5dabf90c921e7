"""Which activations are quantized, and who reads them: rules 1 to 3 of `qdq.py`.

Pure Python over names. An ONNX graph's nodes go in as they are, and so do the operations of a net
in training (`train/qat.py`): fake quantization stands where the file's Q/DQ pairs will.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from rtresnet.core.errors import ArtifactError

WEIGHTED = ("Conv", "Gemm")


class Node(Protocol):
    """An operation with the names of what it reads and makes, as onnx.NodeProto has them."""

    @property
    def name(self) -> str:
        """Its own."""

    @property
    def op_type(self) -> str:
        """ONNX's word for what it does."""

    @property
    def input(self) -> Sequence[str]:
        """What it reads, the data first."""

    @property
    def output(self) -> Sequence[str]:
        """What it makes."""


N = TypeVar("N", bound=Node)


@dataclass(frozen=True, kw_only=True)
class Use:
    """One input of one node."""

    node: str
    index: int


def places(
    nodes: Iterable[N], constants: Collection[str] = (), keep: Collection[str] = ()
) -> dict[str, list[Use]]:
    """The activations to quantize, in graph order, and the inputs that read them quantized.

    Args:
        nodes: Of a folded net, in order of execution.
        constants: Tensors that are known before it runs.
        keep: Names of nodes that stay in float.

    Raises:
        ArtifactError: An Add is not of a residual block.
    """
    nodes, constants = list(nodes), set(constants)
    producers = {out: node for node in nodes for out in node.output}
    found: dict[str, list[Use]] = {}
    for node in nodes:
        if node.name in keep:
            continue
        if node.op_type in WEIGHTED:
            index = 0
        elif node.op_type == "Add" and not constants.intersection(node.input):
            index = shortcut_input(producers, node)
        else:
            continue
        found.setdefault(node.input[index], []).append(Use(node=node.name, index=index))
    return found


def branches(
    nodes: Iterable[N], constants: Collection[str] = (), keep: Collection[str] = ()
) -> list[str]:
    """What is added to each quantized shortcut, where a convolution makes it; it stays float.

    Args:
        nodes: As `places` takes them.
        constants: The same.
        keep: The same.
    """
    nodes = list(nodes)
    makers = {out: node.op_type for node in nodes for out in node.output}
    found = places(nodes, constants, keep).values()
    shortcuts = {(use.node, use.index) for uses in found for use in uses}
    return [
        name
        for node in nodes
        if node.op_type == "Add"
        for index, name in enumerate(node.input)
        if (node.name, 1 - index) in shortcuts and makers.get(name) == "Conv"
    ]


def shortcut_input(producers: Mapping[str, N], add: N) -> int:
    """Which input of a residual Add is the shortcut: the one with fewer convolutions behind it.

    Counted back to the tensor where the two branches part.
    """

    def path(tensor: str) -> dict[str, int]:
        """Tensors behind `tensor` along first inputs, with convolutions passed on the way."""
        seen, convolutions = {tensor: 0}, 0
        while (node := producers.get(tensor)) is not None and node.input:
            convolutions += node.op_type == "Conv"
            tensor = node.input[0]
            seen[tensor] = convolutions
        return seen

    first, second = path(add.input[0]), path(add.input[1])
    fork = next((tensor for tensor in first if tensor in second), None)
    if fork is None:
        raise ArtifactError(f"the inputs of {add.name} have no common origin: not a residual Add")
    return 0 if first[fork] < second[fork] else 1
