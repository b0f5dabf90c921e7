"""Checkpoints: save, load, and check that they fit their net.

A file is a dict of tensors and plain values, read with `weights_only=True`, so that no code in it
runs. Our own files state the architecture, class names and preprocessing. A foreign one
(torchvision, timm, the public CIFAR nets) has names and shapes, by which the net is recognized, and
sometimes the net's name: see `foreign.py`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtresnet.core import artifacts, atomic_io
from rtresnet.core.errors import ArtifactError, InputError, missing_package
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.serialization import from_json
from rtresnet.core.sidecar import Calibration, Detection, Measurements, Model, Sidecar, Weights
from rtresnet.models import zoo
from rtresnet.models.foreign import (
    HEADS,
    Naming,
    adopt,
    find_naming,
    identify,
    read_hub_config,
    recognize,
)
from rtresnet.models.nets import Net
from rtresnet.onnxlib import metadata

FORMAT = 1
SAFETENSORS = ".safetensors"
METADATA_KEY = "rtresnet"  # key in a safetensors file's metadata
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # next to timm's config.json
MEAN_IMAGE = "mean_image.image"  # name of the buffer of `resnet.MeanImage`


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of a net with everything that is needed to use them.

    Attributes:
        model: Architecture, variants and class names.
        input: Preprocessing of an image.
        weights: Origin of the weights.
        state: Parameters and buffers by name.
        training: State that `train` needs to resume; empty in a foreign file.
        measured: Accuracy and the like, with n; after quantization-aware training, of the INT8 net.
        learned: Activation scales of quantization-aware training.
        assumed: Assumptions on a foreign file; see `sidecar.Sidecar`.
        detection: Settings of a detector, whose net `detection.checkpoint` makes; None for a
            classifier.
    """

    model: Model
    input: Preprocess
    weights: Weights
    state: dict[str, Tensor]
    training: Mapping[str, Any] = field(default_factory=dict)
    measured: Measurements = field(default_factory=lambda: Measurements())
    learned: metadata.TrainedScales | None = None
    assumed: tuple[str, ...] = ()
    detection: Detection | None = None

    @property
    def spec(self) -> zoo.Spec:
        """The net's entry in the zoo."""
        return spec_of(self.model)

    @property
    def mean_image(self) -> int | None:
        """Side of the mean image that the net subtracts, in pixels, or None."""
        return self.state[MEAN_IMAGE].shape[-1] if MEAN_IMAGE in self.state else None

    def net(self) -> Net:
        """Return the net with these weights, in evaluation mode, on the CPU."""
        net = zoo.build(self.spec, len(self.model.classes), mean_image=self.mean_image)
        net.load_state_dict(self.state)
        return net.eval()


def spec_of(model: Model) -> zoo.Spec:
    """Return the zoo entry that a sidecar or checkpoint names.

    Raises:
        UnknownNameError, InputError: There is no such net.
    """
    shortcut = None if model.shortcut == "none" else model.shortcut
    return zoo.spec(model.architecture, shortcut=shortcut, stride_in=model.stride_in)


def model_of(spec: zoo.Spec, classes: tuple[str, ...] | None = None) -> Model:
    """Return a net's record for sidecars; by default, classes are named by their numbers."""
    return Model(
        architecture=spec.name,
        classes=classes or tuple(str(index) for index in range(spec.num_classes)),
        shortcut=spec.shortcut or "none",
        stride_in=spec.stride_in,
    )


def untrained(spec: zoo.Spec, input: Preprocess, seed: int = 0) -> Checkpoint:
    """Return a checkpoint of newly initialized weights, for measuring latency.

    The statistics of batch norm come from one batch of noise. With mean 0 and variance 1, the
    activations of a deep net exceed the range of FP16 (1e8 at the logits of ResNet-152), and
    precisions could not be compared.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        net = zoo.build(spec)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        net.train()(torch.randn(4, 3, input.size, input.size))
    return Checkpoint(
        model=model_of(spec),
        input=input,
        weights=Weights(origin="untrained"),
        state=net.state_dict(),
    )


def save(path: str | os.PathLike[str], checkpoint: Checkpoint) -> Sidecar:
    """Write a checkpoint and its sidecar, atomically.

    A .safetensors file contains the weights and their metadata, without the state of training.

    Raises:
        UnavailableError: A name in .safetensors, and the package is not installed.
    """
    payload: dict[str, Any] = {
        "rtresnet": FORMAT,
        "model": dataclasses.asdict(checkpoint.model),
        "input": dataclasses.asdict(checkpoint.input),
        "weights": dataclasses.asdict(checkpoint.weights),
        "state": checkpoint.state,
        "training": checkpoint.training,
        "measured": checkpoint.measured,
    }
    if checkpoint.learned is not None:
        payload["learned"] = checkpoint.learned.record
    if checkpoint.detection is not None:
        payload["detection"] = dataclasses.asdict(checkpoint.detection)
    if checkpoint.assumed:
        payload["assumed"] = list(checkpoint.assumed)

    is_safe = Path(path).suffix.lower() == SAFETENSORS
    data = _as_safetensors(path, payload) if is_safe else None

    def write(temporary: Path) -> None:
        if data is not None:
            temporary.write_bytes(data)
            return
        # Through memory, so that a full disk is an OSError with a name, not torch's RuntimeError.
        buffer = io.BytesIO()
        torch.save(payload, buffer)
        temporary.write_bytes(buffer.getbuffer())

    sidecar = Sidecar(
        kind="checkpoint",
        file=Path(path).name,
        model=checkpoint.model,
        input=checkpoint.input,
        weights=checkpoint.weights,
        precision="fp32",
        detection=checkpoint.detection,
        assumed=checkpoint.assumed,
        calibration=_calibration(Path(path), checkpoint.learned),
        measured=checkpoint.measured,
    )
    return artifacts.publish(path, write, sidecar)


def _calibration(path: Path, scales: metadata.TrainedScales | None) -> Calibration | None:
    """Return the record of trained activation scales, which the checkpoint itself contains."""
    if scales is None:
        return None
    return Calibration(
        method=metadata.QAT,
        images=scales.images,
        images_sha256=scales.images_sha256,
        n=scales.n,
        scales=path.name,
        scales_sha256=scales.sha256,
    )


def load(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    input: Preprocess | None = None,
    detector: bool = False,
) -> Checkpoint:
    """Read one of our checkpoints, or recognize and import a foreign one.

    Args:
        path: A file written by torch.save or safetensors.
        model: Name of the net that it must fit. None uses the net that the file states, else the
            one that its tensors fit, which `Checkpoint.assumed` then records.
        input: The preprocessing of a foreign file; by default ImageNet's mean and std.
        detector: Whether the file must be one of our detectors; otherwise it must not be one. Its
            tensors are not compared with its net: `detection.checkpoint` does that.

    Raises:
        ArtifactError: Truncated, not a checkpoint, not matching its sidecar, not fitting `model`,
            or stated to be another net; the message names tensors and the `--model` that fits.
        UnavailableError: A .safetensors file, and the package safetensors is not installed.
    """
    path = atomic_io.require_file(path, fix="train one with: rtresnet train")
    if path.suffix.lower() in (".onnx", ".plan"):
        raise ArtifactError(
            f"{path}: not a checkpoint", fix="name the checkpoint that it was made from"
        )
    sidecar = artifacts.verify(path)
    if path.suffix.lower() == SAFETENSORS:
        content = _read_safetensors(path)
        if METADATA_KEY in content:
            return _native(path, _saved_payload(path, content), model, detector)
        return _foreign(path, content, model, input, sidecar)
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises almost anything: pickle, zip, key, runtime
        if "was not an allowed global" in str(error):
            raise ArtifactError(
                f"{path}: contains pickled code, for example a whole module, which is not loaded",
                fix="save model.state_dict() instead",
            ) from error
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:80]
        raise ArtifactError(
            f"{path}: not a valid checkpoint of torch, or truncated ({reason})",
            fix="copy it again, or save it again with torch.save(model.state_dict(), FILE)",
        ) from error
    if isinstance(payload, dict) and "rtresnet" in payload:
        return _native(path, payload, model, detector)
    if detector:
        raise ArtifactError(f"{path}: not a detector of rtresnet")
    return _foreign(path, payload, model, input, sidecar)


def _as_safetensors(path: str | os.PathLike[str], payload: dict[str, Any]) -> bytes:
    """Return the weights with everything but the state of training as the file's metadata."""
    try:
        from safetensors.torch import save as serialize
    except ImportError:
        raise missing_package("safetensors", f"writing {path}") from None
    meaning = {k: v for k, v in payload.items() if k not in ("state", "training")}
    tensors = {name: tensor.contiguous() for name, tensor in payload["state"].items()}
    data: bytes = serialize(tensors, {"format": "pt", METADATA_KEY: json.dumps(meaning)})
    return data


def _saved_payload(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the payload of a safetensors file that `save` wrote."""
    try:
        meaning = json.loads(content[METADATA_KEY])
        return {**meaning, "state": content["state_dict"], "training": {}}
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: broken checkpoint ({error})") from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors under "state_dict", and the entries of the file's metadata."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise missing_package("safetensors", f"reading {path}") from None
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {**(file.metadata() or {}), "state_dict": tensors}
    except Exception as error:  # its own class, and torch's for data types that it lacks
        reason = str(error).split("\n")[0][:80]
        raise ArtifactError(
            f"{path}: not a valid safetensors file, or truncated ({reason})",
            fix="copy it again, or save it again with safetensors.torch.save_file",
        ) from error


def _native(
    path: Path, payload: dict[str, Any], requested: str | None, detector: bool
) -> Checkpoint:
    if type(payload["rtresnet"]) is not int or payload["rtresnet"] != FORMAT:
        raise ArtifactError(
            f"{path}: checkpoint format {payload['rtresnet']}, but this version of rtresnet reads "
            f"{FORMAT}",
            fix="update rtresnet",
        )
    try:
        checkpoint = Checkpoint(
            model=from_json(Model, payload["model"]),
            input=from_json(Preprocess, payload["input"]),
            weights=from_json(Weights, payload["weights"]),
            state=payload["state"],
            training=payload["training"],
            measured=payload["measured"],
            learned=metadata.parse_trained_scales(payload["learned"])
            if "learned" in payload
            else None,
            assumed=tuple(map(str, payload.get("assumed", ()))),
            detection=from_json(Detection, payload["detection"])
            if "detection" in payload
            else None,
        )
        stated = checkpoint.spec
        state = checkpoint.state
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise TypeError("state has values that are not tensors")
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise ArtifactError(f"{path}: broken checkpoint ({error})") from None
    if requested and not zoo.matches(requested, stated):
        _refuse(path, checkpoint.state, zoo.spec(requested), len(checkpoint.model.classes), stated)
    if detector != (checkpoint.detection is not None):
        actual, needed = ("classifier", "detector") if detector else ("detector", "classifier")
        raise ArtifactError(f"{path}: is a {actual}, but this command needs a {needed}")
    if checkpoint.detection is None:
        _check(path, checkpoint.state, stated, len(checkpoint.model.classes))
    if checkpoint.weights.sha256 is None and checkpoint.weights.origin != "untrained":
        origin = dataclasses.replace(
            checkpoint.weights, sha256=atomic_io.sha256(path), source=os.fspath(path)
        )
        checkpoint = dataclasses.replace(checkpoint, weights=origin)
    return checkpoint


def _foreign(
    path: Path,
    payload: Any,
    requested: str | None,
    input: Preprocess | None,
    sidecar: Sidecar | None,
) -> Checkpoint:
    state = adopt(payload)
    head = next((name for name in HEADS if name in state), None)
    if head is None:
        tensors = ", ".join(list(state)[:3]) or "no tensors"
        raise ArtifactError(
            f"{path}: not a residual net or VGG in the naming of torchvision, timm or the public "
            f"CIFAR nets (found {tensors})"
        )
    if not state[head].ndim:
        raise ArtifactError(f"{path}: {head} is a single number")
    stated = _stated(sidecar) or find_naming(path, payload)
    spec, assumed = identify(path, stated, recognize(state), requested)
    classes = state[head].shape[0]
    _check(path, state, spec, classes)
    hub = read_hub_config(path.parent) if path.name in HUB_FILES else None
    contract = input or (hub.input if hub else Preprocess.for_size(spec.size))
    named = hub is not None and len(hub.classes) == classes
    return Checkpoint(
        model=model_of(spec, hub.classes if hub and named else tuple(map(str, range(classes)))),
        input=contract,
        assumed=assumed if input or hub else (*assumed, *contract.assumptions()),
        weights=Weights(
            origin="file",
            sha256=atomic_io.sha256(path),
            source=os.fspath(path),
            license=hub.license if hub else None,
        ),
        state=state,
    )


def _stated(sidecar: Sidecar | None) -> Naming | None:
    """Return the net that a sidecar next to a foreign file states."""
    if sidecar is None or sidecar.model.architecture == "unknown":
        return None
    model = sidecar.model
    return Naming((model.architecture,), "its sidecar", stride_in=model.stride_in)


def _check(path: Path, state: Mapping[str, Tensor], spec: zoo.Spec, classes: int) -> None:
    problems = _differences(state, spec, classes)
    if problems:
        _refuse(path, state, spec, classes)
    for name, tensor in state.items():
        plain = tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized)
        counter = name.endswith("num_batches_tracked")
        # 8-bit floats need scales, which no net of the zoo has.
        eight_bit = tensor.is_floating_point() and tensor.element_size() == 1
        numeric = (counter or tensor.is_floating_point()) and not tensor.is_complex()
        if not plain or not numeric or eight_bit:
            raise ArtifactError(
                f"{path}: {name} is {tensor.dtype} ({tensor.layout}, {tensor.device}), expected "
                "dense numbers in floating point of at least 16 bits",
                fix="save the net in FP32: torch.save(model.float().cpu().state_dict(), FILE)",
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(f"{path}: {name} has values that are not finite")


def _differences(state: Mapping[str, Tensor], spec: zoo.Spec, classes: int) -> list[str]:
    mean = state.get(MEAN_IMAGE)
    side = None if mean is None or mean.ndim != 3 or spec.family == "vgg" else mean.shape[-1]
    expected = zoo.build(spec, classes, device="meta", mean_image=side).state_dict()
    problems = []
    for name, tensor in expected.items():
        if name not in state:
            problems.append(f"{name} {list(tensor.shape)} is missing")
        elif state[name].shape != tensor.shape:
            problems.append(f"{name} is {list(state[name].shape)} instead of {list(tensor.shape)}")
    unknown = [name for name in state if name not in expected]
    problems += [f"{name} {list(state[name].shape)} is unknown" for name in unknown]
    return problems


def _refuse(
    path: Path,
    state: Mapping[str, Tensor],
    spec: zoo.Spec,
    classes: int,
    stated: zoo.Spec | None = None,
) -> None:
    """Raise ArtifactError with the tensors that do not fit, and the net that fits.

    Args:
        path: The file.
        state: The file's tensors.
        spec: The net that they do not fit.
        classes: Number of classes.
        stated: The net that the file states, which has precedence over a match of its tensors.
    """
    problems = _differences(state, spec, classes)
    if stated is not None and not problems:
        problems = [f"the file states {stated.name}"]
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    fits, fix = stated or recognize(state), None
    if fits is not None and fits.name != spec.name and not _differences(state, fits, classes):
        fix = f"it fits --model {fits.name}"
    raise ArtifactError(
        f"{path}: does not fit {spec.name}: {', '.join(problems[:3])}{more}", fix=fix
    )
