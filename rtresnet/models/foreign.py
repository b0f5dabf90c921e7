"""Other people's checkpoints: their names mapped to ours, their net recognized by its tensors.

torchvision and timm name a residual net as we do; the public CIFAR nets say `linear` for the FC.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rtresnet.errors import UnknownName
from rtresnet.models import zoo

# Wrappers (DataParallel, torch.compile) prefix every name; some CIFAR nets say `linear`.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_RENAMED = (("linear.", "fc."), ("classifier.", "fc."))


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
    except UnknownName:
        return None
    return found if found.counts == counts else None  # 6n+2 may be a name that ImageNet has taken
