"""Which activations are quantized, and which inputs read them quantized: rules 1 to 3 of `qdq.py`.

Pure Python over names. It takes the nodes of an ONNX graph, and also the operations of a net in
training (`training/qat.py`), so that fake quantization matches the Q/DQ pairs of the exported file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from rtresnet.core.errors import ArtifactError
from rtresnet.onnxlib.graph import Node, branch_depths

WEIGHTED = ("Conv", "Gemm")

N = TypeVar("N", bound=Node)


@dataclass(frozen=True, kw_only=True)
class Use:
    """One input of one node."""

    node: str
    index: int


def place_quantizers(
    nodes: Iterable[N], constants: Collection[str] = (), nodes_to_exclude: Collection[str] = ()
) -> dict[str, list[Use]]:
    """Return the activations to quantize, in graph order, and the inputs that read them quantized.

    Args:
        nodes: Nodes of a folded net, in order of execution.
        constants: Tensors whose values are known before execution.
        nodes_to_exclude: Names of nodes that stay in float.

    Raises:
        ArtifactError: An Add does not belong to a residual block.
    """
    nodes, constants = list(nodes), set(constants)
    producers = {out: node for node in nodes for out in node.output}
    uses: dict[str, list[Use]] = {}
    for node in nodes:
        if node.name in nodes_to_exclude:
            continue
        if node.op_type in WEIGHTED:
            index = 0
        elif node.op_type == "Add" and not constants.intersection(node.input):
            depths = branch_depths(producers, node)
            if depths is None:
                raise ArtifactError(
                    f"{node.name}: its inputs have no common origin, so this is not a residual Add"
                )
            index = 0 if depths[0] < depths[1] else 1
        else:
            continue
        uses.setdefault(node.input[index], []).append(Use(node=node.name, index=index))
    return uses


def stem(nodes: Iterable[N]) -> tuple[str, ...]:
    """Return the names of the convolutions that none stands before, which FP8 leaves in float.

    Args:
        nodes: As for `place_quantizers`.
    """
    behind: set[str] = set()
    first = []
    for node in nodes:
        later = not behind.isdisjoint(node.input)
        if node.op_type == "Conv" and not later:
            first.append(node.name)
        if later or node.op_type in WEIGHTED:
            behind.update(node.output)
    return tuple(first)


def residual_branches(nodes: Iterable[N], constants: Collection[str] = ()) -> list[str]:
    """Return the float outputs of convolutions that are added to a quantized shortcut.

    Args:
        nodes: As for `place_quantizers`.
        constants: As for `place_quantizers`.
    """
    nodes = list(nodes)
    operators = {out: node.op_type for node in nodes for out in node.output}
    placed = place_quantizers(nodes, constants).values()
    shortcuts = {(use.node, use.index) for uses in placed for use in uses}
    return [
        name
        for node in nodes
        if node.op_type == "Add"
        for index, name in enumerate(node.input)
        if (node.name, 1 - index) in shortcuts and operators.get(name) == "Conv"
    ]
