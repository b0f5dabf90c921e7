"""Checks before a build: nodes that the parser does not support, and targets that lack a type.

The parser stops at the first node that it does not support. When it is asked about the whole file,
it lists all of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtresnet.builder.nodes import CONVOLUTION, MATMUL, NetworkNode
from rtresnet.core import gpu_targets
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.precisions import PRECISIONS, unsupported

SHOWN = 5
# TensorRT-RTX 1.7: the parser rejects the first and the last, and the build fails for the second.
BOX_OPERATORS = ("RoiAlign", "NonMaxSuppression", "NonZero")
BOX_FIX = (
    "export the detector as plain operations, as rtresnet train --task detect and rtresnet export "
    "do; or let the net end before them and run them on the CPU"
)


def parse(trt: Any, maker: Any, network: Any, log: Any, source: Path) -> None:
    """Parse an ONNX file into a network.

    Raises:
        ArtifactError: TensorRT cannot parse it, and the message lists every unsupported node; or
            TensorRT would compute different values than the file specifies.
    """
    data = source.read_bytes()
    parser = trt.OnnxParser(network, log)
    # The path is for weights in a file next to it.
    if not parser.parse(data, path=str(source)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        # `supports_model_v2` crashes on a truncated file.
        complete = any(error.node_operator() for error in errors)
        raise (complete and _unsupported(trt, maker, log, source, data)) or ArtifactError(
            f"{source}: TensorRT cannot parse it "
            f"({('; '.join(map(_describe, errors)) or log.reason())[:500]})"
        )
    if not network.num_inputs or not network.num_outputs:  # the result for some invalid files
        raise ArtifactError(f"{source}: not an ONNX file, or a graph without input or output")
    _require_buildable(trt, network, source)
    if any("UINT8 zero_point" in warning for warning in log.warnings):
        raise ArtifactError(
            f"{source}: quantized to uint8, which TensorRT reads as int8 with only a warning: it "
            "would compute different values than ONNX Runtime",
            fix=f"see: rtresnet lint {source}",
        )


def _require_buildable(trt: Any, network: Any, source: Path) -> None:
    """Reject NonMaxSuppression for TensorRT-RTX, which parses it but fails in the build.

    Raises:
        ArtifactError: The network has such a layer.
    """
    kind = getattr(getattr(trt, "LayerType", None), "NMS", None)
    if kind is None or not hasattr(trt, "ComputeCapability"):
        return
    layers = (network.get_layer(index) for index in range(network.num_layers))
    names = [layer.name for layer in layers if layer.type == kind]
    if names:
        raise ArtifactError(
            f"{source}: TensorRT-RTX cannot build NonMaxSuppression: {', '.join(names[:SHOWN])}",
            fix=BOX_FIX,
        )


def require_fixed_size(source: Path, network: Any, size: int | None) -> None:
    """Set the sides of a dynamic input to the size in the file's sidecar.

    Args:
        source: The ONNX file, for the message.
        network: The parsed network; its input may be changed.
        size: Side in pixels; None if no sidecar has it.

    Raises:
        ArtifactError: A dimension other than the batch is still dynamic.
    """
    images = network.get_input(0)
    shape = list(images.shape)
    if len(shape) == 4 and size is not None:
        sides = (1, 2) if shape[3] == 3 else (2, 3)
        if any(shape[axis] < 1 for axis in sides):
            images.shape = [size if axis in sides else dim for axis, dim in enumerate(shape)]
            shape = list(images.shape)
    if min(shape[1:], default=0) < 1:
        raise ArtifactError(
            f"{source}: its input is {shape}, but a plan needs [N, 3, S, S] with a fixed S",
            fix=f"state its size with: rtresnet adopt {source} --size S",
        )


def _unsupported(trt: Any, maker: Any, log: Any, source: Path, data: bytes) -> ArtifactError | None:
    supports = getattr(trt.OnnxParser, "supports_model_v2", None)
    if supports is None:  # before TensorRT 10.1
        return None
    network = maker.create_network(0)  # must outlive the parser
    parser = trt.OnnxParser(network, log)
    if parser.supports_model_v2(data):
        return None
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    errors = [error for error in errors if error.node_operator()]
    if not errors:
        return None
    rest = sum(len(parser.get_subgraph_nodes(i)) for i in range(parser.num_subgraphs))
    named = [_describe(error) for error in errors[:SHOWN]]
    if len(errors) > SHOWN:
        named.append(f"and {len(errors) - SHOWN} more")
    one = len(errors) == 1
    fix = f"export the net without {'it' if one else 'them'}: rtresnet export, rtresnet quantize"
    operators = {error.node_operator() for error in errors}
    return ArtifactError(
        f"{source}: TensorRT does not support {len(errors)} of its {rest + len(errors)} nodes: "
        + "; ".join(named),
        fix=BOX_FIX if operators & set(BOX_OPERATORS) else fix,
    )


def _describe(error: Any) -> str:
    """Return node, operator and reason of a parser's error; the reason may be just `false`."""
    node = f"{error.node_name() or 'a node'} ({error.node_operator()})"
    where = node if error.node_operator() else "file"
    reason = "" if error.desc() == "false" else f" {error.desc()}"
    return f"{where}: {error.code().name}{reason}"


def precisions(nodes: Mapping[str, NetworkNode]) -> list[str]:
    """Return the precisions among a net's types that not every GPU has."""
    types = {node.dtype for node in nodes.values()}
    return [
        name
        for name, spec in PRECISIONS.items()
        if spec.targets is not None and name.upper() in types
    ]


def check_timing_cache(trt: Any, path: str | os.PathLike[str] | None) -> None:
    """Raise InputError if a timing cache is named for TensorRT-RTX, which fills none."""
    if path is not None and hasattr(trt, "ComputeCapability"):
        raise InputError(
            "--timing-cache: TensorRT-RTX does not measure kernels during the build",
            fix="leave it out, or use --builder tensorrt",
        )


def check_targets(source: Path, targets: Sequence[str], nodes: Mapping[str, NetworkNode]) -> None:
    """Check that the targets support the types of a net.

    Raises:
        InputError: A target does not support a type, or TensorRT-RTX would silently compute in
            another one. Observed with TensorRT-RTX 1.7.
    """
    for name in precisions(nodes):
        if lacking := unsupported(name, targets):
            gpus = {**gpu_targets.SERVED, **gpu_targets.UNSERVED}
            raise InputError(
                f"{source}: {', '.join(lacking)} does not support {name.upper()}; targets that do: "
                + ", ".join(f"{t} ({gpus[t]})" for t in PRECISIONS[name].targets or ()),
                fix=f"leave {', '.join(lacking)} out, or build a separate plan for it from: "
                "rtresnet quantize --fp16",
            )
    if "sm_75" not in targets:
        return
    half = "leave sm_75 out, or build a separate plan for it from: rtresnet quantize --fp16"
    if any(n.operation == "quantize" for n in nodes.values()):
        raise InputError(
            f"{source}: with sm_75 among the targets, TensorRT-RTX computes INT8 convolutions in "
            "FP16 on all of them",
            fix=half,
        )
    wide = [n.name for n in nodes.values() if n.operation == MATMUL and n.dtype == "FLOAT"]
    if wide:
        raise InputError(
            f"{source}: TensorRT-RTX has no FP32 matrix product for sm_75, which {wide[0]} needs",
            fix=half,
        )


def locate_node(message: str, nodes: Mapping[str, NetworkNode]) -> str:
    """Return the node that an error message names: " (at node X: conv 3x3 in layer1.0)", or ""."""
    words = message.replace("'", " ").replace('"', " ").replace("[", " ").replace("]", " ").split()
    named = [nodes[word.strip(".,;:()")] for word in words if word.strip(".,;:()") in nodes]
    if not named:
        return ""
    kernels = [node for node in named if node.operation in (CONVOLUTION, MATMUL)]
    node = (kernels or named)[0]
    description = f"{node.operation} {node.detail}".strip()
    return f" (at node {node.name}: {description} in {node.block})"
