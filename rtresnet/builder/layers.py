"""The fused layers that an engine consists of.

TensorRT-RTX logs them at VERBOSE while it builds, with or without a GPU; `tensorrt` describes them
afterwards (`inspector.py`). A plan cannot be opened without a GPU, so the layers are kept in a file
next to it, `X.plan.layers.json`, whose hash is in the plan's sidecar.
`rtresnet inspect X.plan --layers` shows them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rtresnet.builder.nodes import ADD, CONVOLUTION, MATMUL, ORIGIN, STEM, WEIGHTS, Node
from rtresnet.core import atomic_io, serialization
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.serialization import from_json
from rtresnet.core.sidecar import Sidecar

SCHEMA = 1
# What computes a convolution in Myelin: `correlation`, or for some of 1x1 a matrix product.
MYELIN_KERNELS = ("correlation", "gemm", "runtime_fusion")
# Bookkeeping between streams and for dynamic shapes: no data passes.
IDLE = ("shape_call", "signal", "wait", "NoOp")
UNKNOWN = "unknown"
# Of several types the first counts: what is not known is not attested.
WIDEST_FIRST = (UNKNOWN, "Float", "BFloat16", "Half")
BYTES = {
    "Float": 4.0, "Half": 2.0, "BFloat16": 2.0, "Int8": 1.0, "FP8": 1.0, "UInt8": 1.0, "Bool": 1.0,
    "Int32": 4.0, "Int64": 8.0, "Int4": 0.5, "FP4": 0.5,
}  # fmt: skip
MOVES = {"Cast": "convert", "Tran": "transpose", "Conc": "pad", "Slic": "slice", "Move": "copy"}

LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: "
    r"\[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: "
    r".*?(?:, Metadata: (?P<metadata>.*))?$",
    re.MULTILINE,
)
TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d,]*)\].*?Datatype: (?P<dtype>\w+)"
)
GRAPH = re.compile(r"_myl(\d+)(?:_\d+)?$")
PROFILE = re.compile(r"\[profile (\d+)\]")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """What a layer reads or writes; -1 in a shape is the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def bytes(self, batch: int) -> int | None:
        """Its size at a batch; None for a type of unknown width."""
        width = BYTES.get(self.dtype)
        if width is None:
            return None
        return int(width * math.prod(batch if side < 0 else side for side in self.shape))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One kernel of the engine.

    Attributes:
        kind: TensorRT's word: correlation, gemm, kgen, maxpool, ...
        role: conv, matmul, pool, pointwise, requantize (pointwise to int8 from a wider type),
            reformat (moves and converts only), idle (no data passes).
        operation: What it does, as in "conv 3x3 + add + relu".
        profile: The optimization profile it belongs to.
        nodes: The ONNX nodes it came from.
        rounds: Quantizers among them whose int8 does not leave the layer: a rounding, no gain.
        weights: Bytes of its constants.
        computes: Type that a kernel multiplies in, where that is recorded apart from its inputs.
    """

    name: str
    kind: str
    role: str
    operation: str
    stage: str
    block: str
    profile: int
    nodes: tuple[str, ...]
    rounds: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: int
    computes: str | None = None


@dataclass(frozen=True, kw_only=True)
class KernelRecord:
    """One kernel as the builder's log or the inspector describes it, in the order they run.

    Attributes:
        nodes: The ONNX nodes it came from.
        weights: Bytes of its constants.
        kernel: Whether it computes a convolution or a matrix product.
        computes: See `Layer`.
    """

    name: str
    kind: str
    profile: int
    nodes: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: int
    kernel: bool
    computes: str | None = None


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What `X.plan.layers.json` holds.

    Attributes:
        batches: The best batch of each optimization profile.
        activations: Bytes of activation memory, a profile.
        convolutions: The net's convolutions by name.
        adds: Its residual Adds by name.
    """

    batches: tuple[int, ...]
    activations: tuple[int, ...]
    convolutions: tuple[str, ...]
    adds: tuple[str, ...]
    layers: tuple[Layer, ...]
    schema: int = SCHEMA


def read_dump(text: str, nodes: Mapping[str, Node]) -> tuple[Layer, ...]:
    """Reads the log message that begins with "Layers:"; empty where it is no such dump.

    Args:
        text: The message.
        nodes: The parsed network's, by name.
    """
    lines = [match.groupdict() for match in LAYER.finditer(text)]
    profiles = _profiles(lines)
    kernels = []
    for line in lines:
        graph = GRAPH.search(line["name"])
        kernels.append(
            KernelRecord(
                name=line["name"],
                kind=line["kind"],
                profile=profiles.get(graph[1], 0) if graph else 0,
                nodes=tuple(dict.fromkeys(ORIGIN.findall(line["metadata"] or ""))),
                inputs=_tensors(line["inputs"]),
                outputs=_tensors(line["outputs"]),
                weights=sum(t.bytes(1) or 0 for t in _tensors(line["constants"])),
                kernel=line["kind"] in MYELIN_KERNELS,
            )
        )
    return make_layers(kernels, nodes)


def make_layers(kernels: Sequence[KernelRecord], nodes: Mapping[str, Node]) -> tuple[Layer, ...]:
    """Finds what each kernel does, and in which block of the net.

    Args:
        kernels: In the order they run.
        nodes: The parsed network's, by name.
    """
    place, found = (STEM, STEM), []
    order = {name: index for index, name in enumerate(nodes)}
    done: dict[int, set[str]] = {}  # the convolutions that have run, a profile
    for kernel in kernels:
        known = sorted((n for n in kernel.nodes if n in nodes), key=order.__getitem__)
        mine = [nodes[name] for name in known if nodes[name].operation != WEIGHTS]
        ran = done.setdefault(kernel.profile, set())
        role = _role(kernel, mine)
        rounds = _rounds(mine, kernel.outputs)
        operation = _operation(role, kernel.kind, kernel.name, mine, rounds, ran)
        main = _main(mine, role, ran)
        if main is not None:
            place = (main.stage, main.block)
        if role in (CONVOLUTION, MATMUL):
            ran |= {node.name for node in mine if node.operation in (CONVOLUTION, MATMUL)}
        found.append(
            Layer(
                name=kernel.name,
                kind=kernel.kind,
                role=role,
                operation=operation,
                stage=place[0],
                block=place[1],
                profile=kernel.profile,
                nodes=kernel.nodes,
                rounds=rounds,
                inputs=kernel.inputs,
                outputs=kernel.outputs,
                weights=kernel.weights,
                computes=kernel.computes if kernel.kernel else None,
            )
        )
    return tuple(found)


def _profiles(lines: list[dict[str, str]]) -> dict[str, int]:
    """Which profile each compiled graph (`_myl1_` in its layers' names) belongs to."""
    profiles: dict[str, int] = {}
    for line in lines:
        graph, profile = (
            GRAPH.search(line["name"]),
            PROFILE.search(" ".join(map(str, line.values()))),
        )
        if graph and profile:
            profiles[graph[1]] = int(profile[1])
    return profiles


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(
            name=match["name"],
            shape=tuple(int(side) for side in match["shape"].split(",") if side),
            dtype=match["dtype"],
        )
        for match in TENSOR.finditer(text)
    )


def _tokens(name: str) -> list[str]:
    """`__myl_MulAddRelu_myl0_3` to Mul, Add, Relu: what a generated kernel does."""
    match = re.match(r"__myl_(\w+?)_myl", name)
    return re.findall(r"[A-Z][a-z]*", match[1]) if match else []


def _role(kernel: KernelRecord, mine: list[Node]) -> str:
    operations = {node.operation for node in mine}
    if kernel.kind in IDLE:
        return "idle"
    if kernel.kernel:
        return MATMUL if CONVOLUTION not in operations else CONVOLUTION
    if "pool" in kernel.kind.lower():
        return "pool"
    wide = any(tensor.dtype not in ("Int8", UNKNOWN) for tensor in kernel.inputs)
    requantizes = wide and any(tensor.dtype == "Int8" for tensor in kernel.outputs)
    if kernel.kind == "Reformat":  # TensorRT's: also what a QuantizeLinear of its own becomes
        return "requantize" if requantizes else "reformat"
    tokens = _tokens(kernel.name)
    moves = bool(tokens) and set(tokens) <= {*MOVES, "Repl"}
    if moves or "reformat" in (kernel.kind + kernel.name).lower():
        return "reformat"
    return "requantize" if requantizes else "pointwise"


def _rounds(mine: list[Node], outputs: tuple[Tensor, ...]) -> tuple[str, ...]:
    if any(tensor.dtype == UNKNOWN for tensor in outputs):
        return ()
    quantizers = {node.name for node in mine if node.operation == "quantize"}
    lost = len(quantizers) - sum(tensor.dtype == "Int8" for tensor in outputs)
    back = [n.source for n in mine if n.operation == "dequantize" and n.source in quantizers]
    return tuple(back[: max(lost, 0)])


def _operation(
    role: str, kind: str, name: str, mine: list[Node], rounds: tuple[str, ...], ran: set[str]
) -> str:
    if role == "idle":
        return kind
    if role == "reformat":
        moves = [MOVES[token] for token in _tokens(name) if token in MOVES]
        return " + ".join(dict.fromkeys(moves)) or "reformat"
    words = []
    for node in mine:
        word = f"{node.operation} {node.detail}".strip()
        if node.operation in (CONVOLUTION, MATMUL) and role not in (CONVOLUTION, MATMUL):
            # Scale and bias of one that ran; of one that has yet to run it is its input.
            word = "scale" if node.name in ran else ""
        if node.name in rounds:
            words.append("round")
        skipped = node.operation in ("quantize", "dequantize", "cast", "bias", "reshape")
        if word and not skipped:
            words.append(word)
    if role == "requantize":
        words.append("quantize")
    if role == "pool" and not words:
        words.append("pool")
    return " + ".join(dict.fromkeys(words)) or " ".join(_tokens(name)).lower() or kind


def _main(mine: list[Node], role: str, ran: set[str]) -> Node | None:
    """The node that says where a layer stands: what it computes, not what it prepares."""
    if role not in (CONVOLUTION, MATMUL):
        mine = [n for n in mine if n.operation != "dequantize"] or mine
        for node in mine:
            if node.operation == ADD or node.name in ran:
                return node
    for node in mine:
        if node.operation in (CONVOLUTION, MATMUL):
            return node
    return mine[0] if mine else None


def path_for(plan: str | os.PathLike[str]) -> Path:
    """`engines/resnet50.plan` to `engines/resnet50.plan.layers.json`."""
    return Path(f"{os.fspath(plan)}.layers.json")


def load(plan: str | os.PathLike[str], sidecar: Sidecar | None) -> Layers:
    """Reads the layers that were kept next to a plan.

    Raises:
        InputError: None were kept.
        ArtifactError: The file is not the one that the sidecar names.
    """
    command = sidecar.made_by.get("command") if sidecar else None
    again = f"build it again: {command or 'rtresnet build MODEL.onnx'}"
    link = sidecar.plan.layers if sidecar and sidecar.plan else None
    if link is None:
        why = "it has no sidecar" if sidecar is None else "its sidecar names no layer file"
        raise InputError(f"{plan}: the layers are not known, {why}", fix=again)
    place = Path(plan).parent / link.file
    atomic_io.require_file(place, fix=again)
    if atomic_io.sha256(place) != link.sha256:
        raise ArtifactError(f"{place}: not the file that belongs to {plan}", fix=again)
    data = serialization.load(place, fix=again, error=ArtifactError)
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ArtifactError(f"{place}: schema {schema}, not {SCHEMA}", fix=again)
    try:
        layers = from_json(Layers, data)
        if not layers.batches or any(layer.profile < 0 for layer in layers.layers):
            raise TypeError("no batches, or a profile below 0")
    except TypeError as error:
        raise ArtifactError(f"{place}: broken ({error})", fix=again) from None
    return layers
