"""Embed preprocessing and top-K in an ONNX file: the last step after export and quantization.

Before: an FP32, FP16 or Q/DQ file from normalized float32 [batch, 3, S, S] to logits
[batch, classes]. After, as requested:

 1. `images` is uint8 [batch, S, S, 3]. It is cast, transposed to planes, multiplied and shifted
    as `Preprocess.normalize` does it, in the same order and type: bit for bit the same numbers,
    so that serving cannot differ from training. The net and the first QuantizeLinear read
    `normalized`. A quarter of the bytes are copied to the GPU.
 2. The outputs are `indices` int64 and `probabilities` float32 [batch, K] instead of `logits`:
    softmax, then the K largest, the largest first.

The rest of the graph is not changed, nor its precision, scales and placement. `check` runs both
files on the same images. The options --input and --topk of `rtresnet export` and `rtresnet build`
call this. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from rtresnet.core import metrics
from rtresnet.core.errors import ArtifactError, CheckFailedError, InputError
from rtresnet.core.preprocess import Preprocess, resize
from rtresnet.core.sidecar import EmbeddingParity
from rtresnet.onnxlib.graph import GraphIndex, checked, copied

IMAGES = 4  # of `check`
OLDEST = 13  # Softmax along one axis
NORMALIZED, LOGITS = "normalized", "logits"
INDICES, PROBABILITIES = "indices", "probabilities"

TOLERANCE = 1e-5
"""Largest relative difference of the logits: the net itself has not changed."""


def rewrite(
    model: onnx.ModelProto, preprocess: Preprocess, *, pixels: bool, topk: int | None
) -> onnx.ModelProto:
    """Return the same net with a different input or output.

    Args:
        model: The model, which is not changed.
        preprocess: Mean and std of its input.
        pixels: Whether to apply rule 1.
        topk: K of rule 2; None leaves the logits.

    Raises:
        InputError: K is not between 1 and the number of classes.
        ArtifactError: The file already has such an input or output, or is not a net from images to
            logits.
    """
    changed = copied(model)
    index = GraphIndex(changed)
    _require_plain(index)
    if pixels:
        _take_pixels(index, preprocess)
    if topk is not None:
        _give_topk(index, topk)
    return checked(changed)


def _require_plain(index: GraphIndex) -> None:
    name = index.graph.name
    entries = [*index.inputs, *index.graph.output]
    tensors = [entry.type.tensor_type for entry in entries]
    stated = ", ".join(f"{entry.name} {_type(entry)}" for entry in entries)
    if any(t.elem_type == TensorProto.UINT8 for t in tensors) or len(index.graph.output) > 1:
        raise ArtifactError(
            f"{name}: already has an embedded input or output ({stated})",
            fix="start from the file it was made from",
        )
    square = len(index.inputs) == 1 and [d.dim_value for d in tensors[0].shape.dim][1:2] == [3]
    flat = len(tensors) == 2 and len(tensors[1].shape.dim) == 2
    classes = flat and tensors[1].shape.dim[1].dim_value > 0
    if not square or not classes or {t.elem_type for t in tensors} != {TensorProto.FLOAT}:
        raise ArtifactError(f"{name}: expected a net from float32 images to logits, got: {stated}")
    if index.opset < OLDEST:
        raise ArtifactError(
            f"{name}: opset {index.opset}, but --input and --topk need {OLDEST} or later",
            fix="convert it with onnx.version_converter",
        )


def _type(entry: onnx.ValueInfoProto) -> str:
    tensor = entry.type.tensor_type
    dims = [str(dim.dim_value or dim.dim_param or "?") for dim in tensor.shape.dim]
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()} [{', '.join(dims)}]"


def _take_pixels(index: GraphIndex, preprocess: Preprocess) -> None:
    (images,) = index.inputs
    name = images.name
    for node, position in index.readers[name]:
        node.input[position] = NORMALIZED
    dims = images.type.tensor_type.shape.dim
    batch, height, width = (dims[i].dim_value or dims[i].dim_param or None for i in (0, 2, 3))
    images.CopyFrom(
        helper.make_tensor_value_info(name, TensorProto.UINT8, [batch, height, width, 3])
    )
    factors = [factor.reshape(3, 1, 1) for factor in preprocess.factors()]
    scale, shift = (
        index.add_constant(f"{NORMALIZED}.{part}", factor)
        for part, factor in zip(("scale", "shift"), factors, strict=True)
    )
    levels, planes, scaled = (f"{NORMALIZED}.{part}" for part in ("levels", "planes", "scaled"))
    nodes = [
        helper.make_node("Cast", [name], [levels], name=levels, to=TensorProto.FLOAT),
        helper.make_node("Transpose", [levels], [planes], name=planes, perm=[0, 3, 1, 2]),
        helper.make_node("Mul", [planes, scale], [scaled], name=scaled),
        helper.make_node("Add", [scaled, shift], [NORMALIZED], name=NORMALIZED),
    ]
    index.insert(after={name: nodes})


def _give_topk(index: GraphIndex, topk: int) -> None:
    graph, logits = index.graph, index.graph.output[0]
    batch, classes = (d.dim_value or d.dim_param for d in logits.type.tensor_type.shape.dim)
    if not 1 <= topk <= classes:
        raise InputError(f"--topk {topk}: {graph.name} has {classes} classes")
    count = index.add_constant("topk.k", np.array([topk], np.int64))
    results = [PROBABILITIES, INDICES]
    graph.node.extend(
        [
            helper.make_node("Softmax", [logits.name], ["softmax"], name="softmax", axis=1),
            helper.make_node("TopK", ["softmax", count], results, name="topk", axis=1),
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
) -> EmbeddingParity:
    """Run both files on the same images, smooth and noisy ones: one, then a batch of the others.

    Args:
        plain: The unchanged file: normalized images to logits.
        changed: The changed file.
        preprocess: Preprocessing of the unchanged file.
        pixels: Whether `changed` takes uint8 images.
        topk: Number of classes that it returns; None for logits.

    Returns:
        n and the relative difference of logits or probabilities, for the sidecar.

    Raises:
        CheckFailedError: They differ by more than 1e-5 relative, or in the classes.
    """
    images = _images(preprocess.size)
    normalized = preprocess.normalize(images)
    inputs = images if pixels else normalized
    expected = np.concatenate([plain(normalized[:1]), plain(normalized[1:])])
    results = [changed(inputs[:1]), changed(inputs[1:])]
    if topk is None:
        error = metrics.parity(expected, np.concatenate(results)).relative
    else:
        indices, probabilities = (np.concatenate(part) for part in zip(*results, strict=True))
        rows = metrics.softmax(expected.astype(np.float64))
        largest = -np.sort(-rows, axis=1)[:, :topk]
        # Compares values and classes: two classes of equal probability may come in either order.
        error = max(
            metrics.parity(largest, probabilities).relative,
            metrics.parity(np.take_along_axis(rows, indices, axis=1), probabilities).relative,
        )
    if not error <= TOLERANCE:
        raise CheckFailedError(
            f"the file with changed input or output differs by {error:.1e} relative from the "
            "original",
            fix="please report it with the file",
        )
    return {"n": IMAGES, "relative": error}


def _images(size: int) -> np.ndarray:
    """Make uint8 [IMAGES, size, size, 3]: every second image is smooth, the others are noise."""
    rng = np.random.default_rng(0)
    small = min(8, size)
    smooth = [rng.integers(0, 256, (small, small, 3), dtype=np.uint8) for _ in range(IMAGES)]
    noisy = rng.integers(0, 256, (IMAGES, size, size, 3), dtype=np.uint8)
    return np.stack(
        [resize(smooth[i], size, size) if i % 2 == 0 else noisy[i] for i in range(IMAGES)]
    )
