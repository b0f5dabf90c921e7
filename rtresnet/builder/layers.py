"""The fused layers of an engine, and the data types of its convolutions.

TensorRT-RTX logs the layers at VERBOSE while it builds, with or without a GPU; `tensorrt` describes
them afterwards (`inspector.py`). A plan cannot be opened without a GPU, so the layers are stored in
a file next to it, `X.plan.layers.json`, whose hash is in the plan's sidecar. `rtresnet inspect
X.plan --layers` prints them.

A layer names the ONNX nodes that it was made from, but only kernels compute: other layers that name
a convolution scale, add or convert around it. A kernel runs in the type of its first input, unless
the inspector reports wider weights. A convolution that no kernel names, or whose type is not
recorded, is UNKNOWN. An Add that no kernel names runs in a separate layer, so its inputs go
through memory.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rtresnet.builder.nodes import ADD, CONVOLUTION, MATMUL, ORIGIN, WEIGHTS, NetworkNode
from rtresnet.core import atomic_io, serialization
from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.precisions import PRECISIONS
from rtresnet.core.serialization import from_json
from rtresnet.core.sidecar import Attestation, Sidecar
from rtresnet.onnxlib.graph import STEM

SCHEMA = 1
KERNELS = (CONVOLUTION, MATMUL)  # roles
# Myelin computes a convolution as `correlation`, and some of 1x1 as a matrix product.
MYELIN_KERNELS = ("correlation", "gemm", "runtime_fusion")
# Synchronization of streams and shapes: they move no data.
IDLE = ("shape_call", "signal", "wait", "NoOp")
UNKNOWN = "unknown"
QUANTIZED = tuple(spec.tensorrt for spec in PRECISIONS.values() if spec.calibrated)
# The first of several types counts, so that an unknown type is not attested.
WIDEST_FIRST = (UNKNOWN, "Float", "BFloat16", "Half")
BYTES = {spec.tensorrt: spec.bits / 8 for spec in PRECISIONS.values()} | {
    "UInt8": 1.0, "Bool": 1.0, "Int32": 4.0, "Int64": 8.0, "Int4": 0.5, "FP4": 0.5
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
class LayerTensor:
    """A tensor that a layer reads or writes; -1 in its shape is the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def bytes(self, batch: int) -> int | None:
        """Return its size in bytes at a batch; None if the width of its type is unknown."""
        width = BYTES.get(self.dtype)
        if width is None:
            return None
        return int(width * math.prod(batch if side < 0 else side for side in self.shape))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of the engine.

    Attributes:
        kind: TensorRT's layer type: correlation, gemm, kgen, maxpool, ...
        role: conv, matmul, pool, pointwise, requantize (pointwise from a wider type to a
            quantized one), reformat (moves and converts only), idle (moves no data).
        operation: Its operations, as in "conv 3x3 + add + relu".
        profile: Index of its optimization profile.
        nodes: The ONNX nodes that it was made from.
        rounds: Quantizers among them whose result does not leave the layer: they cost accuracy and
            save nothing.
        weights: Bytes of its constants.
        computes: Type that a kernel multiplies in; None if it is the type of its first input.
        multiply_adds: Multiply-adds for one image; None in files of older versions.
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
    inputs: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    weights: int
    computes: str | None = None
    multiply_adds: int | None = None

    @property
    def dtype(self) -> str:
        """The type that it computes in."""
        return self.computes or (self.inputs[0].dtype if self.inputs else UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Content of `X.plan.layers.json`.

    Attributes:
        batches: The optimal batch of each optimization profile.
        activations: Bytes of activation memory of each profile.
        convolutions: Names of the net's convolutions.
        adds: Names of its residual Adds.
    """

    batches: tuple[int, ...]
    activations: tuple[int, ...]
    convolutions: tuple[str, ...]
    adds: tuple[str, ...]
    layers: tuple[Layer, ...]
    schema: int = SCHEMA


def read_dump(text: str, nodes: Mapping[str, NetworkNode]) -> tuple[Layer, ...]:
    """Parse the log message that begins with "Layers:"; empty if the text is no such message.

    Args:
        text: The message.
        nodes: The nodes of the parsed network by name.
    """
    lines = [match.groupdict() for match in LAYER.finditer(text)]
    profiles = _profiles(lines)
    layers = []
    for line in lines:
        graph = GRAPH.search(line["name"])
        layers.append(
            raw_layer(
                name=line["name"],
                kind=line["kind"],
                profile=profiles.get(graph[1], 0) if graph else 0,
                nodes=tuple(dict.fromkeys(ORIGIN.findall(line["metadata"] or ""))),
                inputs=_tensors(line["inputs"]),
                outputs=_tensors(line["outputs"]),
                weights=sum(t.bytes(1) or 0 for t in _tensors(line["constants"])),
                is_kernel=line["kind"] in MYELIN_KERNELS,
            )
        )
    return classify(layers, nodes)


def raw_layer(
    *,
    name: str,
    kind: str,
    profile: int,
    nodes: tuple[str, ...],
    inputs: tuple[LayerTensor, ...],
    outputs: tuple[LayerTensor, ...],
    weights: int,
    is_kernel: bool,
    computes: str | None = None,
) -> Layer:
    """Create a layer from an entry of a log or the inspector, for `classify`.

    Args:
        is_kernel: Whether it computes a convolution or a matrix product.
        Others: See `Layer`.
    """
    return Layer(
        name=name, kind=kind, role=MATMUL if is_kernel else "", operation="", stage="", block="",
        profile=profile, nodes=nodes, rounds=(), inputs=inputs, outputs=outputs, weights=weights,
        computes=computes if is_kernel else None,
    )  # fmt: skip


def classify(layers: Sequence[Layer], nodes: Mapping[str, NetworkNode]) -> tuple[Layer, ...]:
    """Find role, operation and block of each layer.

    Args:
        layers: Results of `raw_layer`, in the order of execution.
        nodes: The nodes of the parsed network by name.
    """
    stage, block, classified = STEM, STEM, []
    order = {name: index for index, name in enumerate(nodes)}
    done: dict[int, set[str]] = {}  # the convolutions that have run, by profile
    for layer in layers:
        names = sorted((n for n in layer.nodes if n in nodes), key=order.__getitem__)
        layer_nodes = [nodes[name] for name in names if nodes[name].operation != WEIGHTS]
        ran = done.setdefault(layer.profile, set())
        role = _role(layer, layer_nodes)
        rounds = _rounds(layer_nodes, layer.outputs)
        main = _main(layer_nodes, role, ran)
        if main is not None:
            stage, block = main.stage, main.block
        operation = _operation(role, layer.kind, layer.name, layer_nodes, rounds, ran)
        multiply_adds = 0
        if role in KERNELS:
            computed = {node.name: node for node in layer_nodes if node.operation in KERNELS}
            multiply_adds = sum(n.multiply_adds for name, n in computed.items() if name not in ran)
            ran.update(computed)
        classified.append(
            replace(
                layer, role=role, operation=operation, stage=stage, block=block,
                rounds=rounds, multiply_adds=multiply_adds,
            )
        )  # fmt: skip
    return tuple(_with_unnamed(classified, nodes, done))


def _with_unnamed(
    layers: list[Layer], nodes: Mapping[str, NetworkNode], done: Mapping[int, set[str]]
) -> list[Layer]:
    """Add the multiply-adds of nodes that no kernel names to the last layer that names them.

    At batch 1, TensorRT-RTX generates a kernel for a small matrix product.
    """
    last: dict[tuple[int, str], int] = {}
    for index, layer in enumerate(layers):
        for name in layer.nodes:
            if name not in done[layer.profile] and name in nodes and nodes[name].multiply_adds:
                last[layer.profile, name] = index
    for (_, name), index in last.items():
        added = (layers[index].multiply_adds or 0) + nodes[name].multiply_adds
        layers[index] = replace(layers[index], multiply_adds=added)
    return layers


def _profiles(lines: list[dict[str, str]]) -> dict[str, int]:
    """Return the profile of each compiled graph (`_myl1_` in the names of its layers)."""
    profiles: dict[str, int] = {}
    for line in lines:
        graph, profile = (
            GRAPH.search(line["name"]),
            PROFILE.search(" ".join(map(str, line.values()))),
        )
        if graph and profile:
            profiles[graph[1]] = int(profile[1])
    return profiles


def _tensors(text: str) -> tuple[LayerTensor, ...]:
    return tuple(
        LayerTensor(
            name=match["name"],
            shape=tuple(int(side) for side in match["shape"].split(",") if side),
            dtype=match["dtype"],
        )
        for match in TENSOR.finditer(text)
    )


def _tokens(name: str) -> list[str]:
    """Split `__myl_MulAddRelu_myl0_3` into Mul, Add, Relu: the steps of a generated kernel."""
    match = re.match(r"__myl_(\w+?)_myl", name)
    return re.findall(r"[A-Z][a-z]*", match[1]) if match else []


def _role(layer: Layer, layer_nodes: Sequence[NetworkNode]) -> str:
    operations = {node.operation for node in layer_nodes}
    if layer.kind in IDLE:
        return "idle"
    if layer.role == MATMUL:
        return MATMUL if CONVOLUTION not in operations else CONVOLUTION
    if "pool" in layer.kind.lower():
        return "pool"
    wide = any(tensor.dtype not in (*QUANTIZED, UNKNOWN) for tensor in layer.inputs)
    requantizes = wide and any(tensor.dtype in QUANTIZED for tensor in layer.outputs)
    if layer.kind == "Reformat":  # TensorRT's; also a QuantizeLinear that is a separate layer
        return "requantize" if requantizes else "reformat"
    tokens = _tokens(layer.name)
    moves = bool(tokens) and set(tokens) <= {*MOVES, "Repl"}
    if moves or "reformat" in (layer.kind + layer.name).lower():
        return "reformat"
    return "requantize" if requantizes else "pointwise"


def _rounds(
    layer_nodes: Sequence[NetworkNode], outputs: tuple[LayerTensor, ...]
) -> tuple[str, ...]:
    if any(tensor.dtype == UNKNOWN for tensor in outputs):
        return ()
    quantizers = {node.name for node in layer_nodes if node.operation == "quantize"}
    lost = len(quantizers) - sum(tensor.dtype in QUANTIZED for tensor in outputs)
    back = [n.source for n in layer_nodes if n.operation == "dequantize" and n.source in quantizers]
    return tuple(back[: max(lost, 0)])


def _operation(
    role: str,
    kind: str,
    name: str,
    layer_nodes: Sequence[NetworkNode],
    rounds: tuple[str, ...],
    ran: set[str],
) -> str:
    if role == "idle":
        return kind
    if role == "reformat":
        moves = [MOVES[token] for token in _tokens(name) if token in MOVES]
        return " + ".join(dict.fromkeys(moves)) or "reformat"
    words = []
    for node in layer_nodes:
        word = f"{node.operation} {node.detail}".strip()
        if node.operation in KERNELS and role not in KERNELS:
            # Scale and bias of a kernel that has run, or the input of one that has not.
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


def _main(layer_nodes: Sequence[NetworkNode], role: str, ran: set[str]) -> NetworkNode | None:
    """Return the node whose block a layer belongs to: one that it computes, if there is one."""
    if role not in KERNELS:
        layer_nodes = [n for n in layer_nodes if n.operation != "dequantize"] or layer_nodes
        for node in layer_nodes:
            if node.operation == ADD or node.name in ran:
                return node
    for node in layer_nodes:
        if node.operation in KERNELS:
            return node
    return layer_nodes[0] if layer_nodes else None


def path_for(plan: str | os.PathLike[str]) -> Path:
    """Return the layer file of a plan: `engines/resnet50.plan.layers.json`."""
    return Path(f"{os.fspath(plan)}.layers.json")


def load(plan: str | os.PathLike[str], sidecar: Sidecar | None) -> Layers:
    """Read the layer file of a plan.

    Raises:
        InputError: The plan has no layer file.
        ArtifactError: The file does not belong to this plan, or is damaged.
    """
    command = sidecar.made_by.get("command") if sidecar else None
    again = f"build it again: {command or 'rtresnet build MODEL.onnx'}"
    link = sidecar.plan.layers if sidecar and sidecar.plan else None
    if link is None:
        why = "it has no sidecar" if sidecar is None else "its sidecar names no layer file"
        raise InputError(f"{plan}: its layer record is not available: {why}", fix=again)
    layers_path = Path(plan).parent / link.file
    atomic_io.require_file(layers_path, fix=again)
    if atomic_io.sha256(layers_path) != link.sha256:
        raise ArtifactError(f"{layers_path}: does not belong to {plan}", fix=again)
    data = serialization.load(layers_path, fix=again, error=ArtifactError)
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ArtifactError(
            f"{layers_path}: has schema {schema}, but this version of rtresnet reads {SCHEMA}",
            fix=again,
        )
    try:
        layers = from_json(Layers, data)
        if not layers.batches or any(layer.profile < 0 for layer in layers.layers):
            raise TypeError("no batches, or a profile below 0")
    except TypeError as error:
        raise ArtifactError(f"{layers_path}: damaged ({error})", fix=again) from None
    return layers


def verify_precision(
    layers: Sequence[Layer], nodes: Mapping[str, NetworkNode], activations: Sequence[int] = ()
) -> Attestation | None:
    """Count the data types of convolutions, and operators that were not fused.

    Args:
        layers: The engine's layers; empty if the builder described none.
        nodes: The nodes of the parsed network by name.
        activations: Bytes of activation memory of each profile.

    Returns:
        The counts; None without layers.
    """
    if not layers:
        return None
    types = kernel_types(layers, nodes)
    stages: dict[str, Counter[str]] = {}
    for name, dtype in types.items():
        stages.setdefault(nodes[name].stage, Counter())[dtype] += 1
    profiles = sorted({layer.profile for layer in layers})
    kernels = [layer for layer in layers if layer.role in KERNELS]
    fused = [{n for layer in kernels if layer.profile == p for n in layer.nodes} for p in profiles]
    adds = [node.name for node in nodes.values() if node.operation == ADD]
    first = [layer for layer in layers if layer.profile == 0]
    roles = Counter(layer.role for layer in first)
    return Attestation(
        convolutions=len(types),
        dtypes=dict(Counter(types.values())),
        layers=len(first) - roles["idle"],
        stages={stage: dict(counts) for stage, counts in stages.items()},
        adds=len(adds),
        unfused_adds=tuple(name for name in adds if not all(name in f for f in fused)),
        requantizes=roles["requantize"],
        reformats=roles["reformat"],
        rounds=tuple(name for layer in first for name in layer.rounds),
        activations=tuple(activations),
    )


def kernel_types(layers: Sequence[Layer], nodes: Mapping[str, NetworkNode]) -> dict[str, str]:
    """Map each convolution's name to its kernel's type, the widest of all profiles."""
    types: dict[str, set[str]] = {}
    for layer in layers:
        if layer.role in KERNELS and layer.inputs:
            for name in layer.nodes:
                types.setdefault(name, set()).add(layer.dtype)
    return {
        node.name: widest(types.get(node.name, {UNKNOWN}))
        for node in nodes.values()
        if node.operation == CONVOLUTION
    }


def widest(dtypes: set[str]) -> str:
    """Return the widest of several types; UNKNOWN counts as wider than any."""
    return next((dtype for dtype in WIDEST_FIRST if dtype in dtypes), min(dtypes))
