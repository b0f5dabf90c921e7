"""Input, output and precision of an ONNX file, read from the file alone.

Decides whether the other commands can use a file that another tool exported. Does not read sidecars
or preprocessing. Imports onnx when called.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core.errors import ArtifactError
from rtresnet.onnxlib.graph import GraphIndex

if TYPE_CHECKING:
    import onnx

TOPK = ("indices", "probabilities")  # outputs of a file that returns the most probable classes
NEEDED = "float32 [N, 3, S, S] or uint8 [N, S, S, 3] to logits float32 [N, classes]"
PASS_ON = ("Identity", "Cast", "Reshape", "Flatten", "Squeeze")


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Input, output and precision of an image classifier.

    Attributes:
        pixels: Whether the input is uint8 pixels [N, S, S, 3] rather than normalized float32
            planes [N, 3, S, S].
        size: Side of the input in pixels; None if it is dynamic.
        batch: The only batch size that the file accepts; None if it accepts any.
        classes: Number of classes; None if the file does not state it.
        topk: How many of the most probable classes the file returns; None if it returns logits.
        precision: "fp32", "fp16", "bf16", "int8", "fp8" or "unknown".
    """

    pixels: bool
    size: int | None
    batch: int | None
    classes: int | None
    topk: int | None
    precision: str


def read_interface(model: onnx.ModelProto, path: Path) -> Interface:
    """Read the interface of a model.

    Args:
        model: The file's content.
        path: The file's path, for messages.

    Raises:
        ArtifactError: Not an image classifier with one input of float32 [N, 3, S, S] or
            uint8 [N, S, S, 3], and logits [N, classes] or the most probable classes.
    """
    from onnx import TensorProto

    inputs = GraphIndex(model).inputs
    unfit = ArtifactError(
        f"{path}: its input is {_described(inputs)} and its output "
        f"{_described(model.graph.output)}, but rtresnet needs {NEEDED}",
        fix="export it with such an input and output",
    )
    if len(inputs) != 1:
        raise unfit
    kind, dims = inputs[0].type.tensor_type.elem_type, _dims(inputs[0])
    if kind not in (TensorProto.FLOAT, TensorProto.UINT8) or len(dims) != 4:
        raise unfit
    pixels = kind == TensorProto.UINT8
    channels, sides = (dims[3], dims[1:3]) if pixels else (dims[1], dims[2:])
    if channels not in (3, None) or (None not in sides and sides[0] != sides[1]):
        raise unfit
    classes, topk = _read_output(model, unfit)
    if topk is None:
        _require_logits(model, path)
    return Interface(
        pixels=pixels,
        size=sides[0] or sides[1],
        batch=dims[0],
        classes=classes,
        topk=topk,
        precision=precision_of(model),
    )


def precision_of(model: onnx.ModelProto) -> str:
    """Return a model's precision: "fp32", "fp16", "bf16", "int8", "fp8" or "unknown"."""
    from onnx import TensorProto

    graph = model.graph
    fp8 = {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2}
    if any(tensor.data_type in fp8 for tensor in graph.initializer):  # weights or zero points
        return "fp8"
    if any("Quantize" in node.op_type or "Integer" in node.op_type for node in graph.node):
        return "int8"
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
    types = {tensor.data_type for tensor in graph.initializer} & floats
    if TensorProto.FLOAT16 in types and TensorProto.BFLOAT16 not in types:
        return "fp16"  # even if some of its constants are FP32
    if types == {TensorProto.BFLOAT16}:
        return "bf16"
    return "fp32" if types == {TensorProto.FLOAT} else "unknown"


def _read_output(model: onnx.ModelProto, unfit: ArtifactError) -> tuple[int | None, int | None]:
    """Return the number of classes, and K of a file that returns the K most probable ones."""
    from onnx import TensorProto

    outputs = {entry.name: entry for entry in model.graph.output}
    if set(TOPK) <= set(outputs):
        dims = _dims(outputs[TOPK[0]])
        if len(dims) != 2 or dims[1] is None:
            raise unfit
        return None, dims[1]
    logits = model.graph.output[0]
    dims = _dims(logits)
    if len(dims) != 2 or dims[1] is None:
        dims = _inferred_dims(model)
    if logits.type.tensor_type.elem_type != TensorProto.FLOAT or len(dims) not in (0, 2):
        raise unfit
    return dims[1] if dims else None, None


def _inferred_dims(model: onnx.ModelProto) -> list[int | None]:
    """Infer the first output's dimensions, which the file does not state."""
    import onnx

    try:
        return _dims(onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output[0])
    except ValueError:  # more than protobuf's 2 GB
        return _dims(model.graph.output[0])


def _require_logits(model: onnx.ModelProto, path: Path) -> None:
    """Reject a model that ends in a softmax: its probabilities would be used as logits."""
    last = GraphIndex(model).maker(model.graph.output[0].name, PASS_ON)
    if last is not None and last.op_type in ("Softmax", "LogSoftmax"):
        raise ArtifactError(
            f"{path}: ends in {last.op_type}, but rtresnet needs logits",
            fix=f"export it without the last {last.op_type}",
        )


def _dims(entry: onnx.ValueInfoProto) -> list[int | None]:
    return [dim.dim_value or None for dim in entry.type.tensor_type.shape.dim]


def _described(entries: Iterable[onnx.ValueInfoProto]) -> str:
    from onnx import TensorProto

    parts = []
    for entry in entries:
        tensor = entry.type.tensor_type
        dims = ", ".join(str(dim.dim_value or dim.dim_param or "?") for dim in tensor.shape.dim)
        parts.append(f"{TensorProto.DataType.Name(tensor.elem_type).lower()} [{dims}]")
    return " and ".join(parts) or "nothing"
