"""How far the branch of each residual block went in calibration, kept in the INT8 file.

The file leaves that tensor in float, since TensorRT wants it so; a runtime that quantizes it
(`runtime/cpu_rewrite.py`) makes finer steps where it knows. A metadata property, which runtimes and
builders pass over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rtresnet.core.errors import ArtifactError

KEY = "rtresnet.branches"

Extents = Mapping[str, tuple[float, float]]
"""Tensor to its lowest and highest value."""


def pack(extents: Extents) -> str:
    """As text."""
    return json.dumps({name: [low, high] for name, (low, high) in extents.items()})


def unpack(text: str) -> dict[str, tuple[float, float]]:
    """What `pack` packed.

    Raises:
        ArtifactError: Something else.
    """
    try:
        return checked(json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{KEY}: damaged ({error})", fix="quantize the net again") from None


def checked(record: Any) -> dict[str, tuple[float, float]]:
    """Extents as JSON has them, as what they should be.

    Raises:
        ValueError, TypeError, AttributeError: They are not.
    """
    found = {name: (float(low), float(high)) for name, (low, high) in record.items()}
    if not all(low <= high and math.isfinite(high - low) for low, high in found.values()):
        raise ValueError("a range that is none")
    return found
