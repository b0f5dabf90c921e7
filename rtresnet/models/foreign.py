"""Other people's checkpoints: their names mapped to ours, their net recognized by its tensors.

torchvision and timm name a residual net as we do; the public CIFAR nets say `linear` for the FC.

Tensors do not tell every net from another: timm's resnetaa50 and resnetblur50 have resnet50's, as
their pooling layers have none, and a plain net has those of its residual net with option A. Where
the file, the config.json next to it or its file name names the net, that name decides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtresnet.core.errors import UnknownNameError
from rtresnet.models import zoo

# Wrappers (DataParallel, torch.compile) prefix every name; some CIFAR nets say `linear`.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_RENAMED = (("linear.", "fc."), ("classifier.", "fc."))

# Where a training script, timm or a hub writes the net's name.
_NAME_KEYS = ("arch", "architecture", "model_name", "model")
_NESTED_KEYS = ("pretrained_cfg", "args", "config", "hyper_parameters", "hparams")
CONFIG = "config.json"
_CONFIG_BYTES = 1 << 20  # a larger file is no model's config
# "resnet50", "resnetaa50", "seresnet50d"; "resnet_50" and "resnet-50" where the number ends there,
# as what follows an underscore may be a hash.
_NAME = re.compile(
    r"(?P<prefix>[a-z]*)(?P<kind>resnet[a-z]*|(?<![a-z])plain)"
    r"(?:(?P<depth>\d{1,4})(?P<suffix>[a-z0-9]*)|[-_](?P<apart>\d{1,4})(?![0-9a-z]))"
)


@dataclass(frozen=True)
class Naming:
    """Net names that stand somewhere.

    Attributes:
        names: As in "resnetaa50".
        where: "its key arch", "config.json", "its file name".
        is_declared: Whether it is a statement about the weights; a file name is less.
    """

    names: tuple[str, ...]
    where: str
    is_declared: bool


def find_naming(path: Path, payload: Any) -> Naming | None:
    """Finds what the file, the config.json next to it or the file's name says the net is.

    Args:
        path: The file.
        payload: The file's content.

    Returns:
        The first of these that names a net with its depth; None where none does.
    """
    for key, text in _declared(payload):
        if names := _names_in(text, whole=True):
            return Naming(names, f"its key {key}", True)
    config = path.with_name(CONFIG)
    try:
        if config.stat().st_size <= _CONFIG_BYTES:
            for _, text in _declared(json.loads(config.read_text(encoding="utf-8"))):
                if names := _names_in(text, whole=True):
                    return Naming(names, str(config), True)
    except (OSError, ValueError, RecursionError):  # there is none, or it is none of a model
        pass
    names = _names_in(path.stem, whole=False)
    return Naming(names, "its file name", False) if names else None


def _declared(record: Any, depth: int = 2) -> Iterator[tuple[str, str]]:
    """Key and text of what may be the net's name."""
    if not isinstance(record, Mapping) or not depth:
        return
    for key in _NAME_KEYS:
        if isinstance(record.get(key), str):
            yield key, record[key]
    for outer in _NESTED_KEYS:
        for key, text in _declared(record.get(outer), depth - 1):
            yield f"{outer}.{key}", text


def _names_in(text: str, *, whole: bool) -> tuple[str, ...]:
    """Net names in a text; without `whole`, as in myresnet50v2, what is around resnet50 is not."""
    found = []
    for match in _NAME.finditer(text.lower()):
        prefix, suffix = (match["prefix"], match["suffix"] or "") if whole else ("", "")
        found.append(f"{prefix}{match['kind']}{match['depth'] or match['apart']}{suffix}")
    return tuple(found)


def adopt(payload: Any) -> dict[str, Tensor]:
    """Finds the tensors in a foreign file and gives them our names."""
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
        for old, new in _RENAMED:
            if name.startswith(old):
                name = new + name.removeprefix(old)
        name = re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", name)
        state[name] = tensor
    for name in [name for name in state if name.endswith("running_mean")]:
        # Files from before torch 0.4.1 lack the counter; it plays no part in inference.
        state.setdefault(
            name.replace("running_mean", "num_batches_tracked"), torch.zeros((), dtype=torch.long)
        )
    return state


def recognize(state: Mapping[str, Tensor]) -> zoo.Spec | None:
    """The zoo net whose blocks these names describe, or None.

    A plain net's tensors are those of its residual net with option A: that one is returned.
    """
    blocks: dict[int, set[int]] = {}
    for name in state:
        if match := re.match(r"layer(\d+)\.(\d+)\.", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    counts = tuple(len(blocks[stage]) for stage in sorted(blocks))
    bottleneck = "layer1.0.conv3.weight" in state
    if (
        "layer1.0.downsample.0.weight" in state and not bottleneck
    ) or "layer1.1.downsample.0.weight" in state:
        shortcut = "C"
    elif any(".downsample." in name for name in state):
        shortcut = "B"
    else:
        shortcut = "A"
    if len(counts) == 3 and len(set(counts)) == 1 and not bottleneck:
        name = f"resnet{6 * counts[0] + 2}"
    else:
        shape = ("bottleneck" if bottleneck else "basic", counts)
        depths = [depth for depth, entry in zoo.IMAGENET_COUNTS.items() if entry == shape]
        if not depths:
            return None
        name = f"resnet{depths[0]}"
    try:
        found = zoo.spec(name, shortcut=shortcut)
    except UnknownNameError:
        return None
    return found if found.counts == counts else None  # 6n+2 may be a name that ImageNet has taken
