"""Checkpoints of other projects: map their names to ours, and identify the net.

torchvision and timm name a residual net's tensors as we do; the public CIFAR nets call the FC
`linear`. VGG has torchvision's names.

Different nets can have the same tensors. timm's resnetaa50 and resnetblur50 have resnet50's,
because their pooling has none. A plain net has those of its residual net with option A. A
bottleneck has the same tensors with the stride in its 1x1 convolution (v1) and in its 3x3 (v1.5).
So a stated name decides: in the file, in its sidecar, in the config.json next to it,
or in its file name. Facts that are not stated are assumed, and recorded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtresnet.core.errors import ArtifactError, InputError, UnknownNameError
from rtresnet.core.preprocess import Preprocess
from rtresnet.models import zoo

# Weights of the last layer of a residual net and of VGG.
HEADS = ("fc.weight", "classifier.6.weight")
# Wrappers (DataParallel, torch.compile) prefix every name; some CIFAR nets call the FC `linear`.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_RENAMED = {
    f"{old}.{part}": f"fc.{part}" for old in ("linear", "classifier") for part in ("weight", "bias")
}

# Where a training script, timm or a hub writes the net's name.
_NAME_KEYS = ("arch", "architecture", "model_name", "model")
_NESTED_KEYS = ("pretrained_cfg", "args", "config", "hyper_parameters", "hparams")
# How detectron2 and transformers say that a bottleneck strides in its 1x1 convolution.
_STRIDE_KEYS = ("stride_in_1x1", "downsample_in_bottleneck")
CONFIG = "config.json"
_CONFIG_BYTES = 1 << 20  # a larger file is not a model's config
# "resnet50", "resnetaa50", "seresnet50d"; "resnet_50" and "resnet-50" where the number ends there,
# because the text after an underscore may be a hash.
_NAME = re.compile(
    r"(?P<prefix>[a-z]*)(?P<kind>resnet[a-z]*|(?<![a-z])plain)"
    r"(?:(?P<depth>\d{1,4})(?P<suffix>[a-z0-9]*)|[-_](?P<apart>\d{1,4})(?![0-9a-z]))"
)
# After the depth, as in "resnet50_v1" (MXNet, the ONNX model zoo) and "resnet50_v1b" (which is
# MXNet's v1.5); not the V1 of "IMAGENET1K_V1", which is a version of weights.
_V1 = re.compile(r"[-_]?v1(?![\d.a-z]|[-_]5)")
_V1_5 = re.compile(r"[-_]?v1(?:[._]5|b)(?![a-z0-9])")
_CAFFE = re.compile(r"(?<![a-z])(?:caffe2?|msra)(?![a-z])")  # the authors' weights, converted
_PUBLISHED = re.compile(r"-[0-9a-f]{8}$")  # torchvision's and timm's file names end in a hash


@dataclass(frozen=True)
class Naming:
    """Net names that are stated somewhere.

    Attributes:
        names: For example "resnetaa50".
        where: "its key arch", "config.json", "its sidecar", "its file name".
        is_declared: Whether it is a statement about the weights, which a file name is not.
        stride_in: Stated stride position: "1x1" or "3x3", or None.
    """

    names: tuple[str, ...]
    where: str
    is_declared: bool = True
    stride_in: str | None = None


def find_naming(path: Path, payload: Any) -> Naming | None:
    """Find the net's name in the file, in the config.json next to it, or in the file's name.

    Args:
        path: The file.
        payload: The file's content.

    Returns:
        The first of these that names a net with its depth, or None.
    """
    for key, text in _declared(payload):
        if names := _names_in(text, whole=True):
            stride = _stride_in(text) or _stride_of_keys(payload)
            # In torchvision and timm, whose scripts write such keys, resnet50 is v1.5.
            return Naming(names, f"its key {key}", stride_in=stride or "3x3")
    config = path.with_name(CONFIG)
    record = _read_json(config)
    for _, text in _declared(record):
        if names := _names_in(text, whole=True):
            stride = _stride_in(text) or _stride_of_keys(record)
            return Naming(names, str(config), stride_in=stride or "3x3")
    names = _names_in(path.stem, whole=False)
    if not names:
        return None
    stride = _stride_in(path.stem.lower())
    if stride is None and _PUBLISHED.search(path.stem.lower()):
        stride = "3x3"
    return Naming(names, "its file name", is_declared=False, stride_in=stride)


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Content of a published net's config.json, in timm's format.

    Attributes:
        input: The input contract.
        license: License of the weights, as in "apache-2.0"; None if not stated.
        classes: Class names; empty if not stated.
    """

    input: Preprocess
    license: str | None
    classes: tuple[str, ...]


def read_hub_config(folder: Path) -> HubConfig | None:
    """Read the config.json that timm publishes with a net; None if there is none, or another one.

    The crop is `crop_pct` of the resized shorter side, rounded down as timm does.

    Raises:
        ArtifactError: Its input cannot be used.
    """
    path = folder / CONFIG
    record = _read_json(path)
    about = record.get("pretrained_cfg") if isinstance(record, dict) else None
    if not isinstance(about, dict) or "mean" not in about:
        return None
    try:
        _, height, width = about["input_size"]
        if height != width or about.get("crop_mode", "center") != "center":
            raise ValueError("only centred square crops are supported")
        contract = Preprocess(
            size=int(height),
            resize=math.floor(height / float(about.get("crop_pct", 0.875))),
            mean=tuple(map(float, about["mean"])),  # type: ignore[arg-type]
            std=tuple(map(float, about["std"])),  # type: ignore[arg-type]
            interpolation=str(about.get("interpolation", "bilinear")),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError, InputError) as error:
        raise ArtifactError(
            f"{path}: its input cannot be used ({error!r})"
            if isinstance(error, KeyError)
            else f"{path}: its input cannot be used ({error})",
            fix="correct it, or remove it and state --preset, --size and --interpolation",
        ) from None
    names = record.get("label_names") or about.get("label_names") or ()
    license = about.get("license") or record.get("license")
    return HubConfig(
        input=contract,
        license=license if isinstance(license, str) else None,
        classes=tuple(map(str, names)) if isinstance(names, list) else (),
    )


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size <= _CONFIG_BYTES:
            return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # there is none, or it is none of a model
        pass
    return None


def _declared(record: Any, depth: int = 2) -> Iterator[tuple[str, str]]:
    """Yield key and text of possible names of the net."""
    if not isinstance(record, Mapping) or not depth:
        return
    for key in _NAME_KEYS:
        if isinstance(record.get(key), str):
            yield key, record[key]
    for outer in _NESTED_KEYS:
        for key, text in _declared(record.get(outer), depth - 1):
            yield f"{outer}.{key}", text


def _stride_of_keys(record: Any, depth: int = 2) -> str | None:
    """Parse a key such as `stride_in_1x1`."""
    if not isinstance(record, Mapping) or not depth:
        return None
    for key in _STRIDE_KEYS:
        if isinstance(record.get(key), bool):
            return "1x1" if record[key] else "3x3"
    nested = (_stride_of_keys(record.get(outer), depth - 1) for outer in _NESTED_KEYS)
    return next((stride for stride in nested if stride), None)


def _stride_in(text: str) -> str | None:
    """Return the stride position that a net's name in a text states."""
    text = text.lower()
    if _CAFFE.search(text):
        return "1x1"
    for match in _NAME.finditer(text):
        after = text[match.start("suffix") if match["depth"] else match.end() :]
        if _V1_5.match(after):
            return "3x3"
        if _V1.match(after):
            return "1x1"
    return None


def _names_in(text: str, *, whole: bool) -> tuple[str, ...]:
    """Return the net names in a text; without `whole`, also resnet50 in myresnet50v2."""
    names = []
    for match in _NAME.finditer(text.lower()):
        prefix, suffix = (match["prefix"], match["suffix"] or "") if whole else ("", "")
        suffix = "" if suffix in ("v1", "v1b") else suffix
        names.append(f"{prefix}{match['kind']}{match['depth'] or match['apart']}{suffix}")
    return tuple(names)


def adopt(payload: Any) -> dict[str, Tensor]:
    """Find the tensors in a foreign file and rename them to our names."""
    for key in ("state_dict", "model", "model_state_dict", "net"):
        if isinstance(payload, Mapping) and isinstance(payload.get(key), Mapping):
            payload = payload[key]
    if not isinstance(payload, Mapping):
        return {}
    state = {}
    for name, tensor in payload.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            continue
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        name = _RENAMED.get(name, name)
        name = re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", name)
        state[name] = tensor
    for name in [name for name in state if name.endswith("running_mean")]:
        # Files from before torch 0.4.1 lack the counter; inference does not use it.
        state.setdefault(
            name.replace("running_mean", "num_batches_tracked"), torch.zeros((), dtype=torch.long)
        )
    return state


def recognize(state: Mapping[str, Tensor]) -> zoo.Spec | None:
    """Return the net of the zoo whose blocks these names describe, or None.

    A plain net's tensors are those of its residual net with option A, which is returned. Of
    bottlenecks, v1.5 is returned.
    """
    if HEADS[1] in state:
        return _recognize_vgg(state)
    blocks: dict[int, set[int]] = {}
    for name in state:
        if match := re.match(r"layer(\d+)\.(\d+)\.", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    counts = tuple(len(blocks[stage]) for stage in sorted(blocks))
    third = state.get("layer1.0.conv3.weight")
    bottleneck = third is not None and third.shape[-1:] == (1,)
    layers = 1 if "layer1.0.conv2.weight" not in state else 2 if third is None else 3
    if (
        "layer1.0.downsample.0.weight" in state and not bottleneck
    ) or "layer1.1.downsample.0.weight" in state:
        shortcut = "C"
    elif any(".downsample." in name for name in state):
        shortcut = "B"
    else:
        shortcut = "A"
    if len(counts) == 3 and len(set(counts)) == 1 and not bottleneck:
        name = f"resnet{3 * layers * counts[0] + 2}-block{layers}"
    else:
        shape = ("bottleneck" if bottleneck else "basic", counts)
        depths = [depth for depth, entry in zoo.IMAGENET_COUNTS.items() if entry == shape]
        if not depths:
            return None
        name = f"resnet{depths[0]}"
    try:
        spec = zoo.spec(name, shortcut=shortcut)
    except InputError:
        return None
    return spec if spec.counts == counts else None  # 6n+2 may be the name of an ImageNet net


def _recognize_vgg(state: Mapping[str, Tensor]) -> zoo.Spec | None:
    convolutions = sum(tensor.ndim == 4 for tensor in state.values())
    norm = "_bn" if any(name.endswith("running_mean") for name in state) else ""
    depths = [depth for depth, counts in zoo.VGG_COUNTS.items() if sum(counts) == convolutions]
    return zoo.spec(f"vgg{depths[0]}{norm}") if depths else None


def identify(
    path: Path, naming: Naming | None, recognized: zoo.Spec | None, requested: str | None
) -> tuple[zoo.Spec, tuple[str, ...]]:
    """Return the net of a foreign file: the one it states, the requested one, or one that fits.

    Args:
        path: The file.
        naming: Stated names.
        recognized: The net that its tensors fit.
        requested: Name of the requested net.

    Returns:
        The net, and entries for `assumed`.

    Raises:
        ArtifactError: No net of the zoo has these tensors, or the file states another one.
    """
    if recognized is None:
        if requested is None:
            raise ArtifactError(
                f"{path}: no supported architecture has these blocks", fix="see: rtresnet models"
            )
        return zoo.spec(requested), ()
    stated = _stated(path, naming, recognized)
    if requested is not None:
        spec = zoo.spec(requested)
        if spec.shortcut is not None and not zoo.states_shortcut(requested):
            spec = zoo.variant(spec, shortcut=recognized.shortcut)
        if naming is None or stated is None or not _alike(spec, recognized):
            return spec, ()
        if naming.stride_in is None and stated.block == "bottleneck":
            stated = zoo.variant(stated, stride_in=spec.stride_in)
        if spec != stated:
            raise ArtifactError(
                f"{path}: {naming.where} states {stated.name}, not {spec.name}",
                fix=f"use --model {stated.name}",
            )
        return spec, ()
    spec = stated or recognized
    ambiguous = spec.block == "bottleneck"
    if stated is None:
        which = f"{spec.name} (v1.5)" if ambiguous else spec.name
        return spec, (f"model: {which}, which has these tensors; the file does not state its net",)
    if ambiguous and naming is not None and naming.stride_in is None:
        return spec, (
            f"model: {spec.name} (v1.5, stride in the 3x3 convolution); {spec.name}-v1 has the "
            "same tensors, and the file does not state which one it is",
        )
    return spec, ()


def _stated(path: Path, naming: Naming | None, recognized: zoo.Spec) -> zoo.Spec | None:
    """Return the net that a file states; None if it states none that has these tensors.

    Raises:
        ArtifactError: It states another net.
    """
    if naming is None:
        return None
    named = [_spec_or_none(name) for name in naming.names]
    for spec in named:
        if spec is not None and _alike(spec, recognized):
            if spec.shortcut is None:
                return spec
            v1 = recognized.block == "bottleneck" and naming.stride_in == "1x1"
            return zoo.variant(recognized, stride_in="1x1" if v1 else spec.stride_in)
    if not naming.is_declared and None not in named:
        return None  # a file name with another depth, which the tensors exclude
    raise ArtifactError(
        f"{path}: {naming.where} states {naming.names[0]}, but its tensors are those of "
        f"{recognized.name}; different nets can have the same tensors",
        fix=f"use a net of the zoo (rtresnet models), or correct {naming.where} if it is wrong",
    )


def _spec_or_none(name: str) -> zoo.Spec | None:
    try:
        return zoo.spec(name)
    except (UnknownNameError, InputError):
        return None


def _alike(spec: zoo.Spec, recognized: zoo.Spec) -> bool:
    """Return whether a net has the recognized one's tensors, with any shortcut and stride."""
    same = (spec.family, spec.depth, spec.block, spec.batch_norm) == (
        recognized.family, recognized.depth, recognized.block, recognized.batch_norm,
    )  # fmt: skip
    return same and (spec.shortcut is not None or recognized.shortcut in ("A", None))
