"""Scales as text: calib/NAME.json, a line a tensor, so that a change shows in a diff.

Next to the scales stands what they hold for: hashes of the weights and the images, how many images,
their preprocessing, the method. They are used again only where all of it is the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from typing_extensions import NotRequired, TypedDict  # in typing from Python 3.11

from rtresnet.core import atomic_io, serialization
from rtresnet.core.errors import ArtifactError
from rtresnet.onnxlib import metadata
from rtresnet.quantization.calibrate import Calibrated
from rtresnet.quantization.equalization import Outlier

SCHEMA = 2
NUMBERS = re.compile(r"\[[-\d.eE+,\s]+\]")  # a few of them: one line, not one each
ABOUT = {
    "onnx_sha256": "weights",
    "images_sha256": "images",
    "n": "number of images",
    "preprocessing": "preprocessing",
    "calibrator": "calibrator",
}

FIX = "calibrate again"


class _File(TypedDict):
    """What is relied on; `ABOUT` is only compared."""

    method: str
    biases_corrected: bool
    brought_down: list[str]
    scales: dict[str, Annotated[float, Meta(ge=1e-38, le=1e38)]]  # in float32
    branches: NotRequired[dict[str, tuple[float, float]]]
    outliers: NotRequired[dict[str, list[float]]]


def write(path: Path, found: Calibrated, about: Mapping[str, Any]) -> Path:
    """Writes what was found, and what for.

    Args:
        path: In calib/, or next to the INT8 file.
        found: From calibration.
        about: Every field of ABOUT, and `images`, their name.
    """
    record = {
        "schema": SCHEMA,
        **about,
        "method": found.method,
        "biases_corrected": bool(found.shifts),
        "brought_down": [outlier.tensor for outlier in found.mended],
        "outliers": {o.tensor: [o.times, *o.channels] for o in found.outliers},
        "signal_to_noise_db": {name: round(ratio, 2) for name, ratio in found.ratios.items()},
        "own_factors": found.own,
        "branches": found.branches,
        "scales": found.scales,
    }
    lines = NUMBERS.sub(lambda found: " ".join(found[0].split()), json.dumps(record, indent=1))
    lines = lines.replace("[ ", "[").replace(" ]", "]")
    atomic_io.write_text(path, lines + "\n")
    return path


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file that `write` wrote.

    Raises:
        ArtifactError: It is not one.
    """
    record = serialization.load(atomic_io.require_file(path), fix=FIX, error=ArtifactError)
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise ArtifactError(
            f"{path}: scales of schema {schema}, this rtresnet reads {SCHEMA}", fix=FIX
        )
    valid = serialization.convert(record, _File, where=str(path), fix=FIX, error=ArtifactError)
    try:
        found = metadata.parse_branch_ranges(valid.get("branches", {}))
        outliers = [
            Outlier(tensor=name, channels=tuple(map(int, channels)), times=times)
            for name, (times, *channels) in valid.get("outliers", {}).items()
        ]
    except ValueError as error:
        raise ArtifactError(f"{path}: not a file of scales ({error})", fix=FIX) from None
    return {**record, **valid, "branches": found, "outliers": outliers}


def differences(saved: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """What scales were made for and are now wanted for, where it is not the same."""
    return [name for field, name in ABOUT.items() if saved.get(field) != about[field]]
