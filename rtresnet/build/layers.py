"""The builder's own layer dump, read: which fused layers the engine consists of.

TensorRT-RTX writes it to its log at VERBOSE while it builds, GPU or not. A plan cannot be opened
without a GPU, so the layers are kept in a file beside it, `X.plan.layers.json`, whose hash stands
in the plan's sidecar. `rtresnet inspect X.plan --layers` shows them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rtresnet import storage, typed_json
from rtresnet.build.nodes import ADD, CONVOLUTION, MATMUL, ORIGIN, STEM, WEIGHTS, Node
from rtresnet.errors import ArtifactError, InputError
from rtresnet.records import from_json
from rtresnet.sidecar import Sidecar

SCHEMA = 1
# What computes a convolution: `correlation`, or for some of 1x1 a matrix product.
KERNELS = ("correlation", "gemm", "runtime_fusion")
# Bookkeeping between streams and for dynamic shapes: no data passes.
IDLE = ("shape_call", "signal", "wait")
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
    place, found = (STEM, STEM), []
    order = {name: index for index, name in enumerate(nodes)}
    done: dict[int, set[str]] = {}  # the convolutions that have run, a profile
    for line in lines:
        names = tuple(dict.fromkeys(ORIGIN.findall(line["metadata"] or "")))
        known = sorted((n for n in names if n in nodes), key=order.__getitem__)
        mine = [nodes[name] for name in known if nodes[name].operation != WEIGHTS]
        graph = GRAPH.search(line["name"])
        profile = profiles.get(graph[1], 0) if graph else 0
        inputs, outputs = _tensors(line["inputs"]), _tensors(line["outputs"])
        ran = done.setdefault(profile, set())
        role = _role(line["kind"], line["name"], mine, inputs, outputs)
        rounds = _rounds(mine, outputs)
        operation = _operation(role, line["kind"], line["name"], mine, rounds, ran)
        main = _main(mine, role, ran)
        if main is not None:
            place = (main.stage, main.block)
        if role in (CONVOLUTION, MATMUL):
            ran |= {node.name for node in mine if node.operation in (CONVOLUTION, MATMUL)}
        found.append(
            Layer(
                name=line["name"],
                kind=line["kind"],
                role=role,
                operation=operation,
                stage=place[0],
                block=place[1],
                profile=profile,
                nodes=names,
                rounds=rounds,
                inputs=inputs,
                outputs=outputs,
                weights=sum(t.bytes(1) or 0 for t in _tensors(line["constants"])),
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


def _role(
    kind: str,
    name: str,
    mine: list[Node],
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
) -> str:
    operations = {node.operation for node in mine}
    if kind in IDLE:
        return "idle"
    if kind in KERNELS:
        return MATMUL if CONVOLUTION not in operations else CONVOLUTION
    if "pool" in kind:
        return "pool"
    tokens = _tokens(name)
    if (tokens and set(tokens) <= {*MOVES, "Repl"}) or "reformat" in (kind + name).lower():
        return "reformat"
    wide = any(tensor.dtype != "Int8" for tensor in inputs)
    return "requantize" if wide and any(t.dtype == "Int8" for t in outputs) else "pointwise"


def _rounds(mine: list[Node], outputs: tuple[Tensor, ...]) -> tuple[str, ...]:
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
    """Reads the layers that were kept beside a plan.

    Raises:
        InputError: None were kept.
        ArtifactError: The file is not the one that the sidecar names.
    """
    command = sidecar.made_by.get("command") if sidecar else None
    anew = f"build it anew: {command or 'rtresnet build MODEL.onnx'}"
    link = sidecar.plan.layers if sidecar and sidecar.plan else None
    if link is None:
        why = "it has no sidecar" if sidecar is None else "its sidecar names no layer file"
        raise InputError(f"{plan}: the layers are not known, {why}", fix=anew)
    place = Path(plan).parent / link.file
    storage.require_file(place, fix=anew)
    if storage.sha256(place) != link.sha256:
        raise ArtifactError(f"{place}: not the file that belongs to {plan}", fix=anew)
    data = typed_json.load(place, fix=anew, error=ArtifactError)
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ArtifactError(f"{place}: schema {schema}, not {SCHEMA}", fix=anew)
    try:
        layers = from_json(Layers, data)
        if not layers.batches or any(layer.profile < 0 for layer in layers.layers):
            raise TypeError("no batches, or a profile below 0")
    except TypeError as error:
        raise ArtifactError(f"{place}: broken ({error})", fix=anew) from None
    return layers
