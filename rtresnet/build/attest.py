"""Reads the builder's own layer dump: which type does each convolution really take?

TensorRT-RTX writes the fused layers to its log at VERBOSE while it builds, GPU or not. A layer
names the ONNX nodes it came from. The kernel of a convolution is a `correlation`, or, for some
1x1 convolutions, a matrix product (`gemm`, `runtime_fusion`); other layers that name the node
(`kgen`) only scale, add or convert around it. The kernel's first input has the type it runs in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rtresnet.artifacts import Attestation

KERNELS = ("correlation", "gemm", "runtime_fusion")
UNKNOWN = "unknown"

LAYER = re.compile(
    r"^Name: .*?, LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: "
    r".*, Metadata: (?P<metadata>.*)$",
    re.MULTILINE,
)
DATATYPE = re.compile(r"Datatype: (\w+)")
ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def read_dump(text: str, convolutions: Sequence[str]) -> Attestation | None:
    """Finds every convolution's kernel.

    Args:
        text: The log message that begins with "Layers:".
        convolutions: The names of the network's convolutions.

    Returns:
        Convolutions counted by input type ("unknown" where no kernel names one), or None where
        the builder wrote no dump.
    """
    layers = list(LAYER.finditer(text))
    if not layers:
        return None
    kernel_types: dict[str, str] = {}
    for layer in layers:
        found = DATATYPE.search(layer["inputs"])
        if layer["type"] in KERNELS and found:
            for name in ORIGIN.findall(layer["metadata"]):
                kernel_types.setdefault(name, found[1])
    dtypes = Counter(kernel_types.get(name, UNKNOWN) for name in convolutions)
    return Attestation(convolutions=len(convolutions), dtypes=dict(dtypes), layers=len(layers))
