"""Read ONNX files from any source: a file that cannot be decoded is rejected at once.

Imports onnx when called. Does not interpret graphs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rtresnet.core.errors import ArtifactError, missing_package

if TYPE_CHECKING:
    import onnx

SLIDING = ("Conv", "MaxPool", "AveragePool")
WINDOW = {"kernel_shape": 1, "strides": 1, "dilations": 1, "pads": 0}  # smallest values
LARGEST = 1 << 16
FIX = "export it again: rtresnet export"


def load(
    path: str | os.PathLike[str], *, checked: bool = False, fix: str | None = FIX
) -> onnx.ModelProto:
    """Read a model, with weights that are kept in other files.

    Args:
        path: The ONNX file.
        checked: Whether it must also pass onnx's checker and strict type and shape inference.
        fix: The end of the error message.

    Returns:
        A model with nodes, inputs and outputs, all of whose constants can be decoded.

    Raises:
        UnavailableError: The package onnx is not installed.
        ArtifactError: It is no such file.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise missing_package("onnx", "reading an ONNX file") from None
    try:
        model = onnx.load(os.fspath(path))
        if not (model.graph.node and model.graph.input and model.graph.output):
            raise ValueError("it has no graph")
        if not any(entry.domain in ("", "ai.onnx") for entry in model.opset_import):
            raise ValueError("it has no opset")
        if not all(isinstance(name, str) for name in _names(model.graph)):
            raise ValueError("a name is not UTF-8")
        for node in model.graph.node:
            _require_sound(node, {entry.domain: entry.version for entry in model.opset_import})
        for tensor in (*model.graph.initializer, *_constants(model)):
            numpy_helper.to_array(tensor)
        if checked:
            onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # protobuf, the checker and inference share no base class
        reason = str(error).strip().split("\n")[0][:120]
        raise ArtifactError(
            f"{path}: not a valid ONNX file, or truncated ({reason})", fix=fix
        ) from error
    return model


def _names(graph: onnx.GraphProto) -> Iterator[str | bytes]:
    """Yield names and operations; protobuf returns those that are not UTF-8 as bytes."""
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    for entry in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        yield entry.name


def _require_sound(node: onnx.NodeProto, opsets: Mapping[str, int]) -> None:
    """Reject a node without outputs or with too few inputs, and absurd windows.

    Shape inference, onnx's and ONNX Runtime's, ends the process where sizes overflow.
    """
    import onnx

    least = 0
    with contextlib.suppress(onnx.defs.SchemaError):  # an operator that onnx does not define
        least = onnx.defs.get_schema(
            node.op_type, opsets.get(node.domain, 1), node.domain
        ).min_input
    if len(node.input) < least or not node.output:
        raise ValueError(
            f"{node.op_type} {node.name!r} has {len(node.input)} inputs and {len(node.output)} "
            "outputs"
        )
    for attribute in node.attribute if node.op_type in SLIDING else ():
        smallest = WINDOW.get(attribute.name, -LARGEST)
        if not all(smallest <= value <= LARGEST for value in attribute.ints):
            raise ValueError(f"{node.name!r} has {attribute.name} {list(attribute.ints)}")


def _constants(model: onnx.ModelProto) -> list[Any]:
    return [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
