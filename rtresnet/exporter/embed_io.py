"""What goes into an ONNX file and what comes out of it, changed after everything else is done.

Before: an FP32, FP16 or Q/DQ file from normalized float32 [batch, 3, S, S] to logits
[batch, classes]. After, as asked for:

 1. `images` is uint8 [batch, S, S, 3]. It is cast, brought to planes, multiplied and shifted as
    `Preprocess.normalize` does it, in the same order and type: bit for bit the same numbers, so
    that serving cannot differ from training. The net reads `normalized`, and so does the first
    QuantizeLinear. A quarter of the bytes cross the bus.
 2. `indices` int64 and `probabilities` float32 [batch, K] come out instead of `logits`: softmax,
    then the K largest, the largest first.

The rest of the graph stays as it is, so precision, scales and placement do. `check` runs both files
on the same images. `rtresnet export` and `rtresnet build` reach this with --input and --topk.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rtresnet.core import metrics
from rtresnet.core.errors import ArtifactError, CheckFailedError, InputError
from rtresnet.core.preprocess import Preprocess, resize
from rtresnet.core.sidecar import EmbeddingParity

OLDEST = 13  # Softmax along one axis
NORMALIZED, LOGITS = "normalized", "logits"
INDICES, PROBABILITIES = "indices", "probabilities"

FACTOR = 1e-5
"""How far apart logits may be, relative: nothing of the net has changed."""


def rewrite(
    model: onnx.ModelProto, preprocess: Preprocess, *, pixels: bool, topk: int | None
) -> onnx.ModelProto:
    """The same net with other ends.

    Args:
        model: Not changed.
        preprocess: Mean and std of its input.
        pixels: Rule 1.
        topk: K of rule 2; None leaves the logits.

    Raises:
        InputError: K is not between 1 and the number of classes.
        ArtifactError: The file has such an end already, or is not a net from images to logits.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    _require_plain(changed)
    if pixels:
        _take_pixels(graph, preprocess)
    if topk is not None:
        _give_topk(graph, topk)
    del graph.value_info[:]
    onnx.checker.check_model(changed, full_check=True)
    return onnx.shape_inference.infer_shapes(changed, strict_mode=True, data_prop=True)


def _require_plain(model: onnx.ModelProto) -> None:
    graph = model.graph
    opset = next((entry.version for entry in model.opset_import if entry.domain == ""), 0)
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in constants]
    ends = [entry.type.tensor_type for entry in (*inputs, *graph.output)]
    told = ", ".join(f"{entry.name} {_type(entry)}" for entry in (*inputs, *graph.output))
    if any(end.elem_type == TensorProto.UINT8 for end in ends) or len(graph.output) > 1:
        raise ArtifactError(
            f"{graph.name}: its ends are changed already ({told})",
            fix="start from the file it was made from",
        )
    square = len(inputs) == 1 and [d.dim_value for d in ends[0].shape.dim][1:2] == [3]
    flat = len(ends) == 2 and len(ends[1].shape.dim) == 2 and ends[1].shape.dim[1].dim_value > 0
    if not square or not flat or {end.elem_type for end in ends} != {TensorProto.FLOAT}:
        raise ArtifactError(f"{graph.name}: not a net from float32 images to logits: {told}")
    if opset < OLDEST:
        raise ArtifactError(
            f"{graph.name}: opset {opset}, and this needs {OLDEST} or later",
            fix="convert it with onnx.version_converter",
        )


def _type(entry: onnx.ValueInfoProto) -> str:
    tensor = entry.type.tensor_type
    dims = [str(dim.dim_value or dim.dim_param or "?") for dim in tensor.shape.dim]
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()} [{', '.join(dims)}]"


def _take_pixels(graph: onnx.GraphProto, preprocess: Preprocess) -> None:
    constants = {tensor.name for tensor in graph.initializer}
    (images,) = (entry for entry in graph.input if entry.name not in constants)
    name = images.name
    for node in graph.node:
        for index, read in enumerate(node.input):
            if read == name:
                node.input[index] = NORMALIZED
    dims = images.type.tensor_type.shape.dim
    batch, height, width = (dims[i].dim_value or dims[i].dim_param or None for i in (0, 2, 3))
    images.CopyFrom(
        helper.make_tensor_value_info(name, TensorProto.UINT8, [batch, height, width, 3])
    )
    scale, shift = (factor.reshape(3, 1, 1) for factor in preprocess.factors())
    graph.initializer.append(numpy_helper.from_array(scale, f"{NORMALIZED}.scale"))
    graph.initializer.append(numpy_helper.from_array(shift, f"{NORMALIZED}.shift"))
    levels, planes, scaled = (f"{NORMALIZED}.{part}" for part in ("levels", "planes", "scaled"))
    first = [
        helper.make_node("Cast", [name], [levels], name=levels, to=TensorProto.FLOAT),
        helper.make_node("Transpose", [levels], [planes], name=planes, perm=[0, 3, 1, 2]),
        helper.make_node("Mul", [planes, f"{NORMALIZED}.scale"], [scaled], name=scaled),
        helper.make_node("Add", [scaled, f"{NORMALIZED}.shift"], [NORMALIZED], name=NORMALIZED),
    ]
    nodes = [*first, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _give_topk(graph: onnx.GraphProto, topk: int) -> None:
    logits = graph.output[0]
    batch, classes = (d.dim_value or d.dim_param for d in logits.type.tensor_type.shape.dim)
    if not 1 <= topk <= classes:
        raise InputError(f"--topk {topk}: {graph.name} has {classes} classes")
    graph.initializer.append(numpy_helper.from_array(np.array([topk], np.int64), "topk.k"))
    graph.node.extend(
        [
            helper.make_node("Softmax", [logits.name], ["softmax"], name="softmax", axis=1),
            helper.make_node(
                "TopK", ["softmax", "topk.k"], [PROBABILITIES, INDICES], name="topk", axis=1
            ),
        ]
    )
    del graph.output[:]
    graph.output.extend(
        [
            helper.make_tensor_value_info(INDICES, TensorProto.INT64, [batch, topk]),
            helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, [batch, topk]),
        ]
    )


def check(
    plain: metrics.Forward,
    changed: Callable[[np.ndarray], Any],
    preprocess: Preprocess,
    *,
    pixels: bool,
    topk: int | None,
    n: int = 4,
    seed: int = 0,
) -> EmbeddingParity:
    """Runs both files on the same images, smooth and noisy ones.

    Args:
        plain: The file as it was: normalized images to logits.
        changed: The file with its ends changed.
        preprocess: Of the file as it was.
        pixels: Whether `changed` takes uint8 images.
        topk: How many classes it gives.
        n: Images, as a batch of one and a batch of the rest.
        seed: Of the images.

    Returns:
        n and the relative difference of logits, or of the probabilities, for the sidecar.

    Raises:
        CheckFailedError: They differ by more than 1e-5 relative, or in the classes that come out.
    """
    images = _images(n, preprocess.size, seed)
    normalized = preprocess.normalize(images)
    given = images if pixels else normalized
    expected = np.concatenate([plain(normalized[:1]), plain(normalized[1:])])
    parts = [changed(given[:1]), changed(given[1:])]
    if topk is None:
        error = metrics.parity(expected, np.concatenate(parts)).relative
    else:
        indices, found = (np.concatenate(part) for part in zip(*parts, strict=True))
        rows = metrics.softmax(expected.astype(np.float64))
        largest = -np.sort(-rows, axis=1)[:, :topk]
        # By value as well as by class: of two classes as probable as each other either may come.
        error = max(
            metrics.parity(largest, found).relative,
            metrics.parity(np.take_along_axis(rows, indices, axis=1), found).relative,
        )
    if not error <= FACTOR:
        raise CheckFailedError(
            f"with its ends changed the file is off by {error:.1e} relative from what it was",
            fix="please report it with the file",
        )
    return {"n": n, "relative": error}


def _images(n: int, size: int, seed: int) -> np.ndarray:
    """uint8 [n, size, size, 3]: every second one smooth as a photograph, the others noise."""
    rng = np.random.default_rng(seed)
    small = min(8, size)
    smooth = [rng.integers(0, 256, (small, small, 3), dtype=np.uint8) for _ in range(n)]
    noisy = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return np.stack([resize(smooth[i], size, size) if i % 2 == 0 else noisy[i] for i in range(n)])
