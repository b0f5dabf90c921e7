"""The types that an engine's convolutions take, and what did not fuse, compared with the file.

A layer names the ONNX nodes it came from, but only kernels compute: other layers that name a
convolution scale, add or convert around it. The kernel's first input has the type it runs in,
unless the inspector says that its weights are wider. A convolution that no kernel names, or whose
type is not recorded, is UNKNOWN: it is not attested. An Add that no kernel names runs in a layer of
its own, and what it adds went through memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rtresnet.builder.layers import UNKNOWN, WIDEST_FIRST, Layer
from rtresnet.builder.nodes import ADD, CONVOLUTION, MATMUL, Node
from rtresnet.core.sidecar import Attestation

KERNELS = (CONVOLUTION, MATMUL)  # roles


def verify_precision(
    layers: Sequence[Layer], nodes: Mapping[str, Node], activations: Sequence[int] = ()
) -> Attestation | None:
    """Counts what the layers of an engine show.

    Args:
        layers: As `layers.read_dump` gives them.
        nodes: The network's nodes by name.
        activations: Bytes of activation memory, a profile.

    Returns:
        The counts, or None where the builder wrote no dump.
    """
    if not layers:
        return None
    types = kernel_types(layers, nodes)
    stages: dict[str, Counter[str]] = {}
    for name, dtype in types.items():
        stages.setdefault(nodes[name].stage, Counter())[dtype] += 1
    fused = [
        {
            name
            for layer in layers
            if layer.role in KERNELS and layer.profile == p
            for name in layer.nodes
        }
        for p in sorted({layer.profile for layer in layers})
    ]
    adds = [node.name for node in nodes.values() if node.operation == ADD]
    first = [layer for layer in layers if layer.profile == 0]
    roles = Counter(layer.role for layer in first)
    return Attestation(
        convolutions=len(types),
        dtypes=dict(Counter(types.values())),
        layers=len(first) - roles["idle"],
        stages={stage: dict(counted) for stage, counted in stages.items()},
        adds=len(adds),
        unfused_adds=tuple(name for name in adds if not all(name in f for f in fused)),
        requantizes=roles["requantize"],
        reformats=roles["reformat"],
        rounds=tuple(name for layer in first for name in layer.rounds),
        activations=tuple(activations),
    )


def kernel_types(layers: Sequence[Layer], nodes: Mapping[str, Node]) -> dict[str, str]:
    """Each convolution's name to the type its kernel takes, the widest of all profiles."""
    found: dict[str, set[str]] = {}
    for layer in layers:
        if layer.role in KERNELS and layer.inputs:
            for name in layer.nodes:
                found.setdefault(name, set()).add(layer.computes or layer.inputs[0].dtype)
    return {
        node.name: _widest(found.get(node.name, {UNKNOWN}))
        for node in nodes.values()
        if node.operation == CONVOLUTION
    }


def _widest(dtypes: set[str]) -> str:
    return next((dtype for dtype in WIDEST_FIRST if dtype in dtypes), min(dtypes))
