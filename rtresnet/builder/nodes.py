"""The parsed network's nodes: what each does, and which stage and block of a ResNet it is in.

Stages are stem, layer1 to layer4, fc. Names such as layer1.0.conv1 or stage2_conv3 say it
themselves; where no convolution's name does, stages are counted: one ends where the residual Adds
get smaller, a block at each Add.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
STAGE = re.compile(r"(?:layer|stage)_?(\d+)(?:[._](\d+))?", re.IGNORECASE)

STEM, HEAD = "stem", "fc"
CONVOLUTION, MATMUL, ADD, WEIGHTS = "conv", "matmul", "add", "weights"
WORDS = {
    "CONVOLUTION": CONVOLUTION,
    "MATRIX_MULTIPLY": MATMUL,
    "ACTIVATION": "relu",
    "POOLING": "pool",
    "REDUCE": "mean",
    "SHUFFLE": "reshape",
}


@dataclass(frozen=True, kw_only=True)
class Node:
    """One ONNX node.

    Attributes:
        operation: conv, matmul, add (a residual one), relu, quantize, ...; weights where it
            computes nothing but constants.
        detail: A convolution's kernel, as in 3x3.
        stage: stem, layer1, ..., fc.
        block: As in layer1.0; the stage's name in stem and fc.
        dtype: Of its output, as TensorRT names it.
        source: The node that makes its first input.
    """

    name: str
    operation: str
    detail: str = ""
    stage: str
    block: str
    dtype: str
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class _Raw:
    name: str
    operation: str
    detail: str
    height: int
    dtype: str
    source: str


def read(trt: Any, network: Any) -> dict[str, Node]:
    """Every ONNX node by name, in the order of the graph."""
    found: dict[str, _Raw] = {}
    constant: set[str] = set()
    makers: dict[str, str] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        fixed = all(tensor is None or tensor.name in constant for tensor in inputs)
        out = layer.get_output(0)
        if out is None:
            continue
        if fixed:
            constant.add(out.name)
        for name in ORIGIN.findall(layer.metadata or "") or [layer.name]:
            source = makers.get(inputs[0].name, "") if inputs and inputs[0] else ""
            raw = _raw(trt, layer, name, inputs, out, fixed, constant, source)
            makers[out.name] = name
            # The bias of a Gemm is a second layer of the same node: the first says what it is.
            found.setdefault(name, raw)
    return _placed([raw for raw in found.values() if raw.operation != "constant"])


def _raw(
    trt: Any,
    layer: Any,
    name: str,
    inputs: list[Any],
    out: Any,
    fixed: bool,
    constant: set[str],
    source: str,
) -> _Raw:
    kind = layer.type.name
    operation, detail = WORDS.get(kind, kind.lower()), ""
    shape = tuple(out.shape)
    if fixed:
        operation = "constant" if kind == "CONSTANT" else WEIGHTS
    elif kind == "CONVOLUTION":
        layer.__class__ = trt.IConvolutionLayer  # the API hands out the base class only
        detail = "x".join(str(side) for side in tuple(layer.kernel_size_nd))
    elif kind == "ELEMENTWISE":
        layer.__class__ = trt.IElementWiseLayer
        two = not any(tensor.name in constant for tensor in inputs)
        operation = layer.op.name.lower()
        if layer.op == trt.ElementWiseOperation.SUM:
            operation = ADD if two and len(shape) == 4 else "bias"
    height = shape[2] if len(shape) == 4 else 0
    return _Raw(
        name=name,
        operation=operation,
        detail=detail,
        height=height,
        dtype=out.dtype.name,
        source=source,
    )


def _placed(raws: list[_Raw]) -> dict[str, Node]:
    named = any(STAGE.search(raw.name) for raw in raws if raw.operation == CONVOLUTION)
    places = _by_name(raws) if named else _by_counting(raws)
    return {
        raw.name: Node(
            name=raw.name,
            operation=raw.operation,
            detail=raw.detail,
            stage=stage,
            block=block,
            dtype=raw.dtype,
            source=raw.source,
        )
        for raw, (stage, block) in zip(raws, places, strict=True)
    }


def _by_name(raws: list[_Raw]) -> list[tuple[str, str]]:
    matches = [list(STAGE.finditer(raw.name)) for raw in raws]
    last = max(index for index, match in enumerate(matches) if match)
    numbers: dict[str, int] = {}  # foreign names may begin at 0
    places, place = [], (STEM, STEM)
    for index, match in enumerate(matches):
        if match:  # /layer1/layer1.0/conv1: the last one knows the block
            stage = f"layer{numbers.setdefault(match[-1][1], len(numbers) + 1)}"
            place = (stage, f"{stage}.{match[-1][2]}" if match[-1][2] else stage)
        places.append((HEAD, HEAD) if index > last else place)
    return places


def _by_counting(raws: list[_Raw]) -> list[tuple[str, str]]:
    adds = [index for index, raw in enumerate(raws) if raw.operation == ADD]
    convolutions = [index for index, raw in enumerate(raws) if raw.operation == CONVOLUTION]
    ends = adds or convolutions[1:]
    if not ends:
        return [(STEM, STEM) if raw.operation != MATMUL else (HEAD, HEAD) for raw in raws]
    blocks, stage, number = [], 0, 0
    for before, end in zip([None, *ends], ends, strict=False):
        smaller = before is None or raws[end].height != raws[before].height
        stage, number = (stage + 1, 0) if smaller else (stage, number + 1)
        blocks.append((f"layer{stage}", f"layer{stage}.{number}"))
    # The stem ends before the first convolution after it that is no larger than the first Add's.
    inside = [i for i in convolutions[1:] if raws[i].height <= raws[ends[0]].height]
    start = min([*inside, ends[0]])
    places: list[tuple[str, str]] = []
    current = 0
    for index, raw in enumerate(raws):
        # What follows an Add at once still is of its block.
        ahead = raw.operation not in ("relu", "quantize", "dequantize")
        if ahead and index > ends[-1]:
            return [*places, *[(HEAD, HEAD)] * (len(raws) - index)]
        if ahead and index > ends[current]:
            current += 1
        places.append((STEM, STEM) if index < start else blocks[current])
    return places
