"""Read and write scales as text: calib/NAME.json, one line per tensor, for readable diffs.

The file also records the origin of the scales: hashes of the weights and the images, the number of
images, their preprocessing, the method. Scales are reused only if all of it is the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta
from typing_extensions import NotRequired, TypedDict  # in typing from Python 3.11

from rtresnet.core import atomic_io, serialization
from rtresnet.core.errors import ArtifactError
from rtresnet.onnxlib import metadata
from rtresnet.quantization.calibrate import Calibrated
from rtresnet.quantization.equalization import Outlier

SCHEMA = 2
NUMBER_LIST = re.compile(r"\[[-\d.eE+,\s]+\]")  # written on one line
NO_NOISE = 999.0  # dB; stands for infinity
FIX = "calibrate again"


@dataclass(frozen=True, kw_only=True)
class ScalesOrigin:
    """Origin of a set of scales.

    Attributes:
        onnx_sha256: Hash of the FP32 file.
        preprocessing: The input contract of the file, as in its sidecar.
        images: Name of the images; not compared.
        images_sha256: Their hash.
        n: Their number.
        calibrator: The requested method.
        format: Number format: "int8" or "fp8"; "fp8-stem" if it includes the first convolution,
            "fp8-32" if convolutions with fewer than 32 input channels stay in float.
    """

    onnx_sha256: str
    preprocessing: Mapping[str, object]
    images: str
    images_sha256: str
    n: int
    calibrator: str
    format: str = "int8"


COMPARED = {
    "onnx_sha256": "weights",
    "images_sha256": "images",
    "n": "number of images",
    "preprocessing": "preprocessing",
    "calibrator": "calibrator",
    "format": "number format",
}


@dataclass(frozen=True, kw_only=True)
class SavedScales:
    """The content of a file of scales; see `Calibrated` for the attributes not listed.

    Attributes:
        origin: Every field of the file, for `differences`.
        equalized: Whether outliers were scaled down.
        biases_corrected: Whether biases were corrected.
    """

    origin: Mapping[str, object]
    scales: dict[str, float]
    method: str
    overrides: dict[str, float]
    ratios: dict[str, float]
    outliers: list[Outlier]
    branches: metadata.BranchRanges
    equalized: bool
    biases_corrected: bool


class _File(TypedDict):
    """Fields that are used; the fields of COMPARED are only compared."""

    method: str
    biases_corrected: bool
    brought_down: list[str]
    scales: dict[str, Annotated[float, Meta(ge=1e-38, le=1e38)]]  # in float32
    own_factors: NotRequired[dict[str, float]]
    signal_to_noise_db: NotRequired[dict[str, float]]
    branches: NotRequired[dict[str, tuple[float, float]]]
    outliers: NotRequired[dict[str, list[float]]]


def write(path: Path, calibrated: Calibrated, origin: ScalesOrigin) -> Path:
    """Write scales and their origin.

    Args:
        path: In calib/, or next to the quantized file.
        calibrated: From calibration.
        origin: Origin of the scales.
    """
    record = {
        "schema": SCHEMA,
        **dataclasses.asdict(origin),
        "method": calibrated.method,
        "biases_corrected": bool(calibrated.bias_corrections),
        "brought_down": [outlier.tensor for outlier in calibrated.equalized],
        "outliers": {o.tensor: [o.times, *o.channels] for o in calibrated.outliers},
        "signal_to_noise_db": {
            name: round(min(db, NO_NOISE), 2) for name, db in calibrated.ratios.items()
        },
        "own_factors": calibrated.overrides,
        "branches": calibrated.branches,
        "scales": calibrated.scales,
    }
    text = NUMBER_LIST.sub(lambda match: " ".join(match[0].split()), json.dumps(record, indent=1))
    atomic_io.write_text(path, text.replace("[ ", "[").replace(" ]", "]") + "\n")
    return path


def read(path: str | os.PathLike[str]) -> SavedScales:
    """Read a file that `write` wrote.

    Raises:
        ArtifactError: The file is not a scales file.
    """
    record = serialization.load(atomic_io.require_file(path), fix=FIX, error=ArtifactError)
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise ArtifactError(
            f"{path}: has schema {schema}, but this version of rtresnet reads {SCHEMA}", fix=FIX
        )
    valid = serialization.convert(record, _File, where=str(path), fix=FIX, error=ArtifactError)
    try:
        branches = metadata.parse_branch_ranges(valid.get("branches", {}))
        outliers = [
            Outlier(tensor=name, channels=tuple(map(int, channels)), times=times)
            for name, (times, *channels) in valid.get("outliers", {}).items()
        ]
    except ValueError as error:
        raise ArtifactError(f"{path}: not a scales file ({error})", fix=FIX) from None
    return SavedScales(
        origin=record,
        scales=valid["scales"],
        method=valid["method"],
        overrides=valid.get("own_factors", {}),
        ratios=valid.get("signal_to_noise_db", {}),
        outliers=outliers,
        branches=branches,
        equalized=bool(valid["brought_down"]),
        biases_corrected=valid["biases_corrected"],
    )


def differences(saved: SavedScales, origin: ScalesOrigin) -> list[str]:
    """Return the differences between the scales' origin and the expected one, in words."""
    expected = dataclasses.asdict(origin)
    # Files written before FP8 support have no format.
    fields = {"format": "int8"} | dict(saved.origin)
    return [name for field, name in COMPARED.items() if fields.get(field) != expected[field]]
