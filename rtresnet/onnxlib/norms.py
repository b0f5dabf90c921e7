"""Statistics of convolution outputs, kept in the ONNX file after batch norm was folded.

Batch norm leaves each channel with mean beta and standard deviation |gamma|. Folding loses that,
and it is what INT8 ranges can be had from without any image. It goes with the file as a metadata
property, which runtimes and builders pass over: float16, a few kB.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping

import numpy as np

from rtresnet.core.errors import ArtifactError

KEY = "rtresnet.norms"

Norms = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Convolution to means and standard deviations of its output, float32 [C] each."""


def pack(norms: Norms) -> str:
    """As text."""
    packed = {
        name: base64.b64encode(np.stack([mean, std]).astype("<f2").tobytes()).decode()
        for name, (mean, std) in norms.items()
    }
    return json.dumps(packed)


def unpack(text: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What `pack` packed.

    Raises:
        ArtifactError: Something else.
    """
    found = {}
    try:
        for name, packed in json.loads(text).items():
            values = np.frombuffer(base64.b64decode(packed, validate=True), "<f2").astype(
                np.float32
            )
            if not len(values):
                raise ValueError(f"{name} is empty")
            mean, std = values.reshape(2, -1)
            found[name] = (mean, std)
    except (ValueError, AttributeError, TypeError, binascii.Error) as error:
        raise ArtifactError(f"{KEY}: damaged ({error})", fix="export the net again") from None
    return found
