"""Everything that can be refused before a build: what the parser does not know, what a GPU lacks.

The parser stops at the first node it cannot take; asked whether it supports the file, it names all
of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtresnet.builder.nodes import CONVOLUTION, MATMUL, Node
from rtresnet.core.errors import ArtifactError, InputError

SHOWN = 5


def parse(trt: Any, maker: Any, network: Any, log: Any, source: Path) -> None:
    """Parses an ONNX file into a network.

    Raises:
        ArtifactError: TensorRT cannot parse it, naming every node that it does not support; or
            would take it for something else.
    """
    data = source.read_bytes()
    parser = trt.OnnxParser(network, log)
    # The path is for weights that lie in a file next to it.
    if not parser.parse(data, path=str(source)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        # Asked about a file that is not whole, the parser crashes.
        whole = any(error.node_operator() for error in errors)
        raise (whole and _unsupported(trt, maker, log, source, data)) or ArtifactError(
            f"{source}: TensorRT cannot parse it "
            f"({('; '.join(map(_complaint, errors)) or log.complaints())[:500]})"
        )
    if not network.num_inputs or not network.num_outputs:  # of some other files it parses nothing
        raise ArtifactError(f"{source}: not an ONNX file, or a graph without input or output")
    if any("UINT8 zero_point" in warning for warning in log.warnings):
        raise ArtifactError(
            f"{source}: quantized to uint8, which TensorRT would read as int8 without a word, and "
            "compute other numbers than ONNX Runtime",
            fix=f"see: rtresnet lint {source}",
        )


def require_fixed_size(source: Path, network: Any, size: int | None) -> None:
    """Gives an input whose side the file leaves open the side that its sidecar states.

    Args:
        source: The ONNX file, for the message.
        network: The parsed network; its input may be changed.
        size: Side in pixels; None where no sidecar states it.

    Raises:
        ArtifactError: A dimension other than the batch is still open.
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
            f"{source}: takes {shape}, and a plan needs [N, 3, S, S], all but the batch fixed",
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
    named = [_complaint(error) for error in errors[:SHOWN]]
    if len(errors) > SHOWN:
        named.append(f"and {len(errors) - SHOWN} more")
    one = len(errors) == 1
    return ArtifactError(
        f"{source}: TensorRT cannot take {len(errors)} of its {rest + len(errors)} nodes: "
        + "; ".join(named),
        fix=f"export the net without {'it' if one else 'them'}: rtresnet export, rtresnet quantize",
    )


def _complaint(error: Any) -> str:
    """Which node, what it is, and what the parser says of it: at times no more than `false`."""
    node = f"{error.node_name() or 'a node'} ({error.node_operator()})"
    where = node if error.node_operator() else "file"
    said = "" if error.desc() == "false" else f" {error.desc()}"
    return f"{where}: {error.code().name}{said}"


def check_targets(source: Path, targets: Sequence[str], nodes: Mapping[str, Node]) -> None:
    """Holds the net against what is known of the targets.

    Raises:
        InputError: A target refuses it, or computes something else: found on TensorRT-RTX 1.7,
            which says the first after the build only and the second not at all.
    """
    if "sm_75" not in targets:
        return
    half = "leave sm_75 out, or give it a file and a plan of its own: rtresnet quantize --fp16"
    if any(n.operation == "quantize" for n in nodes.values()):
        raise InputError(
            f"{source}: with sm_75 among its targets TensorRT-RTX computes INT8 convolutions in "
            "FP16, for all of them",
            fix=half,
        )
    wide = [n.name for n in nodes.values() if n.operation == MATMUL and n.dtype == "FLOAT"]
    if wide:
        raise InputError(
            f"{source}: TensorRT-RTX has no FP32 matrix product for sm_75, which {wide[0]} is",
            fix=half,
        )


def locate_node(message: str, nodes: Mapping[str, Node]) -> str:
    """What a builder's complaint is about, as " (at layer1.0.conv1: conv 3x3 of layer1.0)"."""
    words = message.replace("'", " ").replace('"', " ").replace("[", " ").replace("]", " ").split()
    named = [nodes[word.strip(".,;:()")] for word in words if word.strip(".,;:()") in nodes]
    if not named:
        return ""
    kernels = [node for node in named if node.operation in (CONVOLUTION, MATMUL)]
    node = (kernels or named)[0]
    what = f"{node.operation} {node.detail}".strip()
    return f" (at node {node.name}: {what} in {node.block})"
