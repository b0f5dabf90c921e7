"""Scales as text: calib/NAME.json, a line a tensor, so that a change shows in a diff.

Beside the scales stands what they hold for: hashes of the weights and the images, how many images,
their preprocessing, the method. They are used again only where all of it is the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtresnet import branches, storage
from rtresnet.errors import ArtifactError, InputError
from rtresnet.quantize.calibrate import Calibrated
from rtresnet.quantize.equalize import Outlier

SCHEMA = 2
NUMBERS = re.compile(r"\[[-\d.eE+,\s]+\]")  # a few of them: one line, not one each
ABOUT = {
    "onnx_sha256": "weights",
    "images_sha256": "images",
    "n": "number of images",
    "preprocessing": "preprocessing",
    "calibrator": "calibrator",
}


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
    storage.write_text(path, lines + "\n")
    return path


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file that `write` wrote.

    Raises:
        ArtifactError: It is not one.
    """
    try:
        record = json.loads(storage.require_file(path).read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise ArtifactError(
                f"{path}: scales of schema {record['schema']}, this rtresnet reads {SCHEMA}",
                fix="calibrate again",
            )
        whole = {*ABOUT, "method", "biases_corrected", "brought_down", "scales"} <= record.keys()
        numbers = all(isinstance(value, float) for value in record["scales"].values())
        record["branches"] = branches.checked(record.get("branches", {}))
        record["outliers"] = [
            Outlier(tensor=name, channels=tuple(map(int, channels)), times=float(times))
            for name, (times, *channels) in record.get("outliers", {}).items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise ArtifactError(
            f"{path}: not a file of scales ({error})", fix="calibrate again"
        ) from None
    if not whole or not numbers:
        raise ArtifactError(f"{path}: not a file of scales", fix="calibrate again")
    return dict(record)


def differences(saved: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """What scales were made for and are now wanted for, where it is not the same."""
    return [name for field, name in ABOUT.items() if saved.get(field) != about[field]]
