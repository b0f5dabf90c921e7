"""Checkpoints: save them, load them, and check that they fit.

A file is a dict of tensors and plain values, read with `weights_only=True`: nothing in it can
run. Ours carries the architecture, class names and input contract; a foreign one (torchvision,
timm, the public CIFAR nets) carries names and shapes, by which the net is recognized, and
sometimes the net's name, which decides where several nets have the same tensors.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtresnet.core import artifacts, atomic_io
from rtresnet.core.errors import ArtifactError, InputError, UnknownNameError, missing_package
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.serialization import from_json
from rtresnet.core.sidecar import Calibration, Detection, Model, Sidecar, Weights
from rtresnet.models import zoo
from rtresnet.models.foreign import Naming, adopt, find_naming, recognize
from rtresnet.models.resnet import ResNet
from rtresnet.onnxlib import metadata

FORMAT = 1
SAFETENSORS = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights and what they mean.

    Attributes:
        model: Architecture, class names, variants.
        input: What the net expects of an image.
        weights: Where the numbers came from.
        state: Parameter and buffer name to tensor, in our names.
        training: What `train` needs to go on; empty in a foreign file.
        measured: Accuracy and the like, with n; after fine-tuning for INT8, of the net in INT8.
        learned: Scales of activations, where the net was fine-tuned for INT8.
        assumed: What a foreign file does not state; see `sidecar.Sidecar`.
        detection: Of a detector, whose net `detection.checkpoint` makes; None for a classifier.
    """

    model: Model
    input: Preprocess
    weights: Weights
    state: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    learned: metadata.TrainedScales | None = None
    assumed: tuple[str, ...] = ()
    detection: Detection | None = None

    @property
    def spec(self) -> zoo.Spec:
        """The net's entry in the zoo."""
        return spec_of(self.model)

    def net(self) -> ResNet:
        """The net with these weights, in evaluation mode, on the CPU."""
        net = zoo.build(self.spec, len(self.model.classes))
        net.load_state_dict(self.state)
        return net.eval()


def spec_of(model: Model) -> zoo.Spec:
    """The zoo entry a sidecar or checkpoint names."""
    plain = model.architecture.startswith("plain")
    return zoo.spec(
        model.architecture, shortcut=None if plain else model.shortcut, stride_in=model.stride_in
    )


def model_of(spec: zoo.Spec, classes: tuple[str, ...] | None = None) -> Model:
    """The record of a net for sidecars; classes default to their numbers."""
    return Model(
        architecture=spec.name,
        classes=classes or tuple(str(index) for index in range(spec.num_classes)),
        shortcut=spec.shortcut or "none",
        stride_in=spec.stride_in,
    )


def untrained(spec: zoo.Spec, input: Preprocess, seed: int = 0) -> Checkpoint:
    """A checkpoint of freshly initialized weights: latency is real, accuracy is not.

    Batch norm takes its statistics from one batch of noise. Left at mean 0 and variance 1, the
    activations of a deep net grow past what FP16 can hold (1e8 at ResNet-152's logits), and
    whatever is built from it could not even be compared.
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
    """Writes a checkpoint and its sidecar, atomically.

    Raises:
        InputError: A name that is not of torch's format.
    """
    if Path(path).suffix.lower() == SAFETENSORS:
        raise InputError(f"{path}: safetensors files are only read", fix="choose a name in .pt")
    payload = {
        "rtresnet": FORMAT,
        "model": dataclasses.asdict(checkpoint.model),
        "input": dataclasses.asdict(checkpoint.input),
        "weights": dataclasses.asdict(checkpoint.weights),
        "state": checkpoint.state,
        "training": checkpoint.training,
        "measured": checkpoint.measured,
    }
    if checkpoint.learned is not None:
        payload["learned"] = dataclasses.asdict(checkpoint.learned)
    if checkpoint.detection is not None:
        payload["detection"] = dataclasses.asdict(checkpoint.detection)
    if checkpoint.assumed:
        payload["assumed"] = list(checkpoint.assumed)

    def write(temporary: Path) -> None:
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


def _calibration(path: Path, found: metadata.TrainedScales | None) -> Calibration | None:
    """The record of learned scales, which lie in the checkpoint itself."""
    if found is None:
        return None
    return Calibration(
        method=metadata.QAT,
        images=found.images,
        images_sha256=found.images_sha256,
        n=found.n,
        scales=path.name,
        scales_sha256=found.sha256,
    )


def load(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    input: Preprocess | None = None,
    detector: bool = False,
) -> Checkpoint:
    """Reads one of our checkpoints, or recognizes and imports a foreign one.

    Args:
        path: A file that torch.save or safetensors wrote; the latter is always foreign.
        model: The net it must fit, by name; None takes what the file says it is, or else what its
            tensors look like, which `Checkpoint.assumed` records then.
        input: The input contract of a foreign file; ImageNet's mean and std by default.
        detector: Whether the file must be one of our detectors; otherwise it must not be one. Its
            tensors are not compared with its net: `detection.checkpoint` does that.

    Raises:
        ArtifactError: Truncated, not a checkpoint, not matching its sidecar, or not fitting
            `model`, or said to be another net; the message says which tensors and which `--model`
            would fit.
        UnavailableError: A .safetensors file, and the package safetensors is not installed.
    """
    path = atomic_io.require_file(path, fix="train one with: rtresnet train")
    artifacts.verify(path)
    if path.suffix.lower() == SAFETENSORS:
        return _foreign(path, _read_safetensors(path), model, input)
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises almost anything: pickle, zip, key, runtime
        if "was not an allowed global" in str(error):
            raise ArtifactError(
                f"{path}: holds pickled code, such as a whole module, and that is not loaded",
                fix="save model.state_dict() instead",
            ) from error
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:80]
        raise ArtifactError(
            f"{path}: cannot be read as a checkpoint, truncated or not one of torch ({reason})",
            fix="copy it again, or save it again as a plain state_dict",
        ) from error
    if isinstance(payload, dict) and "rtresnet" in payload:
        return _ours(path, payload, model, detector)
    if detector:
        raise ArtifactError(f"{path}: not a detector of rtresnet")
    return _foreign(path, payload, model, input)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors under "state_dict", next to the texts of the file's metadata."""
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


def _ours(path: Path, payload: dict[str, Any], wanted: str | None, detector: bool) -> Checkpoint:
    if type(payload["rtresnet"]) is not int or payload["rtresnet"] != FORMAT:
        raise ArtifactError(f"{path}: checkpoint format {payload['rtresnet']}, this reads {FORMAT}")
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
        said = checkpoint.spec
        state = checkpoint.state
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise TypeError("state holds something else than tensors")
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise ArtifactError(f"{path}: broken checkpoint ({error})") from None
    spec = zoo.spec(wanted) if wanted else said
    if spec.name != said.name:
        _refuse(path, checkpoint.state, spec, len(checkpoint.model.classes), said)
    if detector != (checkpoint.detection is not None):
        held, needed = ("classifier", "detector") if detector else ("detector", "classifier")
        raise ArtifactError(f"{path}: a {held}, and a {needed} is needed")
    if checkpoint.detection is None:
        _check(path, checkpoint.state, said, len(checkpoint.model.classes))
    if checkpoint.weights.sha256 is None and checkpoint.weights.origin != "untrained":
        origin = dataclasses.replace(
            checkpoint.weights, sha256=atomic_io.sha256(path), source=os.fspath(path)
        )
        checkpoint = dataclasses.replace(checkpoint, weights=origin)
    return checkpoint


def _foreign(path: Path, payload: Any, wanted: str | None, input: Preprocess | None) -> Checkpoint:
    state = adopt(payload)
    if not state or "fc.weight" not in state or "conv1.weight" not in state:
        found = ", ".join(list(state)[:3]) or "no tensors"
        raise ArtifactError(
            f"{path}: not a residual net in the naming of torchvision, timm or the public CIFAR "
            f"nets (found {found})"
        )
    if not state["fc.weight"].ndim:
        raise ArtifactError(f"{path}: fc.weight is a single number")
    spec, assumed = _identify(path, find_naming(path, payload), recognize(state), wanted)
    classes = state["fc.weight"].shape[0]
    _check(path, state, spec, classes)
    contract = input or Preprocess.for_size(spec.size)
    return Checkpoint(
        model=model_of(spec, tuple(str(index) for index in range(classes))),
        input=contract,
        assumed=assumed if input else (*assumed, *contract.assumptions()),
        weights=Weights(origin="file", sha256=atomic_io.sha256(path), source=os.fspath(path)),
        state=state,
    )


def _identify(
    path: Path, naming: Naming | None, recognized: zoo.Spec | None, wanted: str | None
) -> tuple[zoo.Spec, tuple[str, ...]]:
    """Which net a foreign file is: as it says, as the caller says, or as its tensors look.

    Returns:
        The net, and an entry for `assumed` where only the tensors tell.

    Raises:
        ArtifactError: No net of the zoo has these tensors, or the file says that it is another.
    """
    if recognized is None:
        if wanted is None:
            raise ArtifactError(
                f"{path}: no net of the zoo has these blocks", fix="see: rtresnet models"
            )
        return zoo.spec(wanted), ()
    said = _said(path, naming, recognized)
    if wanted is not None:
        spec = zoo.spec(wanted)
        if spec.shortcut is not None:
            spec = zoo.spec(wanted, shortcut=recognized.shortcut)
        if naming is not None and said is not None and spec != said and _alike(spec, recognized):
            raise ArtifactError(
                f"{path}: {naming.where} says {said.name}, not {spec.name}",
                fix=f"--model {said.name}",
            )
        return spec, ()
    if said is not None:
        return said, ()
    return recognized, (
        f"model: {recognized.name}, which has these tensors; nothing names the net",
    )


def _said(path: Path, naming: Naming | None, recognized: zoo.Spec) -> zoo.Spec | None:
    """The net that a file says it is; None where it says nothing of nets with these tensors.

    Raises:
        ArtifactError: It says that it is another net.
    """
    if naming is None:
        return None
    named = [_spec_or_none(name) for name in naming.names]
    for spec in named:
        if spec is not None and _alike(spec, recognized):
            return spec if spec.shortcut is None else recognized
    if not naming.is_declared and None not in named:
        return None  # a file name with other depths, which the tensors rule out
    raise ArtifactError(
        f"{path}: {naming.where} says {naming.names[0]}, and its tensors are those of "
        f"{recognized.name}; a net that computes something else can have the same tensors",
        fix=f"use a net of the zoo (rtresnet models), or correct {naming.where} if it is wrong",
    )


def _spec_or_none(name: str) -> zoo.Spec | None:
    try:
        return zoo.spec(name)
    except UnknownNameError:
        return None


def _alike(spec: zoo.Spec, recognized: zoo.Spec) -> bool:
    """Whether a net has the tensors of the recognized one, whatever its shortcut option."""
    plain = spec.shortcut is None and recognized.shortcut == "A"
    return spec.name == recognized.name or (
        plain and (spec.depth, spec.family) == (recognized.depth, recognized.family)
    )


def _check(path: Path, state: Mapping[str, Tensor], spec: zoo.Spec, classes: int) -> None:
    problems = _differences(state, spec, classes)
    if problems:
        _refuse(path, state, spec, classes)
    for name, tensor in state.items():
        plain = tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized)
        counter = name.endswith("num_batches_tracked")
        # 8-bit floats come with scales, which no net of the zoo has.
        eight_bit = tensor.is_floating_point() and tensor.element_size() == 1
        numeric = (counter or tensor.is_floating_point()) and not tensor.is_complex()
        if not plain or not numeric or eight_bit:
            raise ArtifactError(
                f"{path}: {name} is {tensor.dtype} ({tensor.layout}, {tensor.device}), expected "
                "dense numbers in floating point of at least 16 bits",
                fix="save the net in FP32: torch.save(model.float().cpu().state_dict(), FILE)",
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(f"{path}: {name} holds values that are not finite")


def _differences(state: Mapping[str, Tensor], spec: zoo.Spec, classes: int) -> list[str]:
    expected = zoo.build(spec, classes, device="meta").state_dict()
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
    said: zoo.Spec | None = None,
) -> None:
    problems = _differences(state, spec, classes) or ["the file says so itself"]
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    fits = said or recognize(state)  # what the file says goes before what its tensors look like
    fix = None
    if fits is not None and fits.name != spec.name and not _differences(state, fits, classes):
        fix = f"it fits --model {fits.name}"
    raise ArtifactError(
        f"{path}: does not fit {spec.name}: {', '.join(problems[:3])}{more}", fix=fix
    )
