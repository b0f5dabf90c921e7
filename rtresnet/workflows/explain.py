"""Class activation maps: which parts of an image speak for a class (Zhou et al., 2016).

They are exact for residual nets, which end in global average pooling and one linear layer: a map is
the last feature map weighted with the class's row of the linear layer, and its mean over positions
is the class's logit minus its bias. In an INT8 file the pooled features are rounded before the
linear layer; that difference, at most half a step of each feature, is spread evenly over the map.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rtresnet.core import artifacts, atomic_io, hardware, metrics, reporter
from rtresnet.core.errors import DataError, InputError, missing_package
from rtresnet.core.preprocess import resize
from rtresnet.core.reporter import Reporter
from rtresnet.workflows.input_spec import InputConfig
from rtresnet.workflows.loading import RuntimeConfig, load_artifact
from rtresnet.workflows.predict import Paths, image_files

if TYPE_CHECKING:
    from rtresnet.runtime.session import Session

OVERLAY_SIDE = 224  # pixels; smaller crops are enlarged to it
COLD, MIDDLE, HOT = (0.2, 0.3, 0.8), (1.0, 1.0, 1.0), (0.85, 0.1, 0.1)  # RGB of the overlay


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The map of one image's most probable class.

    Attributes:
        image: The file.
        label: Name of the class.
        probability: Probability of the class, in [0, 1].
        logit: Logit of the class.
        bias: Bias of the class in the linear layer.
        map: Contribution of each position, rows from the top; the mean is `logit` - `bias`.
        overlay: The written picture: the map on the crop that the net saw, red for the class and
            blue against it.
    """

    image: str
    label: str
    probability: float
    logit: float
    bias: float
    map: tuple[tuple[float, ...], ...]
    overlay: Path


@dataclass(frozen=True, kw_only=True)
class ExplainResult:
    """Class activation maps of some images.

    Attributes:
        artifact: The net.
        images: A map for each image that could be decoded.
        skipped: Errors of the other images.
    """

    artifact: str
    images: tuple[Explanation, ...]
    skipped: tuple[str, ...]


Maps = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Input of the artifact to its last feature maps [N, C, h, w] and logits [N, classes]."""


def explain(
    images: Paths,
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    stated: InputConfig | None = None,
    reporter: Reporter = reporter.DEFAULT,
) -> ExplainResult:
    """Write class activation maps of images.

    Args:
        images: An image file or a folder of them, or several.
        artifact: A checkpoint or an ONNX file of a residual net, in any precision.
        out: Folder of the pictures.
        model: Architecture of a checkpoint from elsewhere.
        stated: Preprocessing that replaces the sidecar's, or of a file without a sidecar.
        reporter: Receives a note on every broken image.

    Returns:
        The map of each image's most probable class.

    Raises:
        InputError: The net does not end in global average pooling and one linear layer, or the
            artifact is a plan.
        DataError: No image can be decoded.
        UnavailableError: A package is not installed.
    """
    from rtresnet.data import decode, loader

    names, folder = image_files(images), atomic_io.make_folder(out)
    skipped: list[str] = []
    explanations: list[Explanation] = []

    def read(name: str) -> np.ndarray | DataError:
        try:
            return decode.decode(name)
        except DataError as error:
            return error

    session = load_artifact(artifact, RuntimeConfig(device="cpu"), stated=stated, model=model)
    try:
        maps, weight, bias = _parts(session)
        for number, (name, image) in enumerate(loader.prefetch_map(read, names)):
            if isinstance(image, DataError):
                skipped.append(image.message)
                reporter.note(f"skipped {image.message}")
                continue
            crop = session.preprocess.crop(image)
            features, logits = maps(session.prepare(crop[None]))
            best = int(logits[0].argmax())
            heat = activation_map(features[0], weight[best], float(logits[0, best] - bias[best]))
            overlay = folder / f"{number:04}-{Path(name).stem}.png"
            _draw(crop, heat, overlay)
            classes = session.classes
            explanations.append(
                Explanation(
                    image=name,
                    label=classes[best] if best < len(classes) else str(best),
                    probability=float(metrics.softmax(logits[0].astype(np.float64))[best]),
                    logit=float(logits[0, best]),
                    bias=float(bias[best]),
                    map=tuple(tuple(row) for row in heat.tolist()),
                    overlay=overlay,
                )
            )
    finally:
        session.close()
    if not explanations:
        raise DataError(f"{names[0]}: no image could be decoded")
    return ExplainResult(artifact=str(artifact), images=tuple(explanations), skipped=tuple(skipped))


def activation_map(features: np.ndarray, weight: np.ndarray, total: float) -> np.ndarray:
    """Compute a class's map.

    Args:
        features: The last feature map [C, h, w].
        weight: The class's row of the linear layer [C].
        total: Its logit minus its bias, to which the map averages; see the module's docstring.

    Returns:
        float64 [h, w].
    """
    heat = np.tensordot(weight.astype(np.float64), features.astype(np.float64), 1)
    return np.asarray(heat + (total - heat.mean()))


def _parts(session: Session) -> tuple[Maps, np.ndarray, np.ndarray]:
    """Return a function for maps and logits, and weight and bias of the linear layer."""
    kind = artifacts.kind_of(session.path)
    if kind == "checkpoint":
        return _of_net(session)
    if kind == "onnx":
        return _of_onnx(Path(session.path))
    raise InputError(
        f"{session.path}: a plan has no output for its feature maps",
        fix="explain its checkpoint or ONNX file",
    )


def _of_net(session: Session) -> tuple[Maps, np.ndarray, np.ndarray]:
    import torch

    from rtresnet.models.resnet import ResNet

    net = getattr(session.backend, "net", None)
    if not isinstance(net, ResNet):
        raise _no_pooling(session.path)

    def maps(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            features = net.features(torch.from_numpy(images))
            logits = net.fc(net.flatten(net.avgpool(features)))
        return features.numpy(), logits.numpy()

    return maps, net.fc.weight.detach().numpy(), net.fc.bias.detach().numpy()


def _of_onnx(path: Path) -> tuple[Maps, np.ndarray, np.ndarray]:
    for package in ("onnx", "onnxruntime"):
        if not hardware.installed(package):
            raise missing_package(package, "a class activation map")
    from rtresnet.onnxlib import graph, io
    from rtresnet.quantization.simulate import make_session
    from rtresnet.runtime.cpu_rewrite import emulate_bf16

    model = io.load(path)
    model = emulate_bf16(model) or model
    index = graph.GraphIndex(model)
    gemms = [node for node in index.nodes if node.op_type == "Gemm"]
    through = (*graph.MOVES, graph.QUANTIZE, graph.DEQUANTIZE)
    pool = index.maker(gemms[-1].input[0], through) if len(gemms) == 1 else None
    if pool is None or pool.op_type not in ("GlobalAveragePool", "ReduceMean"):
        raise _no_pooling(path)
    (gemm,) = gemms
    weight = _constant(index, gemm.input[1], path)
    if not graph.attribute(gemm, "transB", 0):
        weight = weight.T
    bias = np.zeros(len(weight))
    if len(gemm.input) > 2 and gemm.input[2]:
        bias = _constant(index, gemm.input[2], path)
    tensors = [pool.input[0], gemm.output[0]]
    # Q/DQ pairs are computed unfused, because fused INT8 kernels saturate on CPUs without VNNI.
    running = make_session(model, tensors)
    (entry,) = running.get_inputs()

    def maps(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        dtype = {"tensor(float16)": np.float16, "tensor(uint8)": np.uint8}.get(entry.type)
        features, logits = running.run(tensors, {entry.name: images.astype(dtype or np.float32)})
        return features.astype(np.float32), logits.astype(np.float32)

    return maps, weight, bias


def _constant(index: Any, name: str, path: Path) -> np.ndarray:
    """Return a stored tensor in float, through its DequantizeLinear if it has one."""
    value = index.constant(index.origin(name))
    node = index.dequantized(name)
    if value is None and node is not None:
        stored, scale = index.constant(node.input[0]), index.constant(node.input[1])
        if stored is None:
            stored = index.constant(index.origin(node.input[0]))
        if stored is not None and scale is not None:
            shape = (-1,) + (1,) * (stored.ndim - 1) if scale.size > 1 else ()
            value = stored.astype(np.float64) * scale.astype(np.float64).reshape(shape)
    if value is None:
        raise _no_pooling(path)
    return np.asarray(value, np.float64)


def _no_pooling(path: object) -> InputError:
    return InputError(
        f"{path}: does not end in global average pooling and one linear layer, which class "
        "activation maps need",
        fix="explain a residual net",
    )


def _draw(crop: np.ndarray, heat: np.ndarray, path: Path) -> None:
    """Write the crop with its map in colour: red for the class, blue against it."""
    from PIL import Image

    side = max(OVERLAY_SIDE, crop.shape[0])
    strongest = float(np.abs(heat).max()) or 1.0
    levels = np.round(127.5 + 127.5 * heat / strongest).astype(np.uint8)
    smooth = resize(np.repeat(levels[..., None], 3, 2), side, side)[..., :1] / 127.5 - 1
    cold, middle, hot = (np.array(colour) for colour in (COLD, MIDDLE, HOT))
    colour = middle + np.abs(smooth) * (np.where(smooth > 0, hot, cold) - middle)
    grey = resize(crop, side, side).mean(axis=2, keepdims=True) / 255
    pixels = np.clip(255 * (0.25 + 0.75 * grey) * colour, 0, 255).astype(np.uint8)
    with atomic_io.atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
