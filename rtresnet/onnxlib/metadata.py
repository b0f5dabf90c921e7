"""Metadata properties of rtresnet in ONNX files, which runtimes and builders ignore.

- `rtresnet.model`: the sidecar's facts (architecture, classes, input, precision), written by every
  step, so that a file without its sidecar evaluates the same.
- `rtresnet.norms`: statistics of batch norm that folding would lose, for INT8 without images.
- `rtresnet.learned_scales`: activation scales of quantization-aware training.
- `rtresnet.branches`: range of each residual branch, for the CPU's integer form.

Needs no onnx: a model is any object with `metadata_props`, and a runtime has the properties as a
dict. The keys and formats do not change: files of earlier versions are read.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from rtresnet.core import atomic_io
from rtresnet.core.errors import ArtifactError
from rtresnet.core.precisions import CalibratedName
from rtresnet.core.serialization import from_json
from rtresnet.core.sidecar import Sidecar, description, from_description

T = TypeVar("T")

NormStatistics = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Convolution to means and standard deviations of its output, float32 [C] each."""
BranchRanges = Mapping[str, tuple[float, float]]
"""Tensor to its lowest and highest value."""
QAT = "qat"  # how scales of training are called as a calibration method


@dataclass(frozen=True, kw_only=True)
class Property(Generic[T]):
    """One metadata property.

    Attributes:
        key: Its name in the file.
        encode: The value as text.
        parse: The value of parsed JSON; raises ValueError, TypeError or AttributeError.
        fix: How to replace a damaged value.
    """

    key: str
    encode: Callable[[T], str]
    parse: Callable[[Any], T]
    fix: str

    def decode(self, text: str) -> T:
        """Decode a value that `encode` wrote.

        Raises:
            ArtifactError: The text is damaged.
        """
        try:
            return self.parse(json.loads(text))
        except (ValueError, TypeError, AttributeError, KeyError, binascii.Error) as error:
            raise ArtifactError(f"{self.key}: damaged ({error})", fix=self.fix) from None

    def read(self, properties: Mapping[str, str]) -> T | None:
        """Return the value among a file's properties; None if it is absent.

        Raises:
            ArtifactError: It is damaged.
        """
        return self.decode(properties[self.key]) if self.key in properties else None

    def set(self, model: Any, value: T) -> None:
        """Write the value into an onnx.ModelProto; replaces an older one."""
        for entry in model.metadata_props:
            if entry.key == self.key:
                entry.value = self.encode(value)
                return
        model.metadata_props.add(key=self.key, value=self.encode(value))


def properties_of(model: Any) -> dict[str, str]:
    """Return the metadata properties of an onnx.ModelProto."""
    return {entry.key: entry.value for entry in model.metadata_props}


@dataclass(frozen=True, kw_only=True)
class TrainedScales:
    """Activation scales from quantization-aware training.

    Attributes:
        scales: Activation tensor to float32 units of a step, under the ONNX file's names.
        images: The training data's name.
        images_sha256: Their hash.
        n: Number of training images.
        branches: Range of each residual branch on some of them; empty during a run.
        format: Number format that they were trained for: "int8" or "fp8".
    """

    scales: dict[str, float]
    images: str
    images_sha256: str
    n: int
    branches: dict[str, tuple[float, float]] = field(default_factory=dict)
    format: CalibratedName = "int8"

    @property
    def record(self) -> Mapping[str, object]:
        """The fields for JSON; that of the format is left out for INT8, as in earlier versions."""
        fields = dataclasses.asdict(self)
        if self.format == "int8":
            del fields["format"]
        return fields

    @property
    def sha256(self) -> str:
        """Hash of the scales alone."""
        return hashlib.sha256(json.dumps(self.scales).encode()).hexdigest()


def _encode_statistics(statistics: NormStatistics) -> str:
    return json.dumps(
        {
            name: base64.b64encode(np.stack([mean, std]).astype("<f2").tobytes()).decode()
            for name, (mean, std) in statistics.items()
        }
    )


def _parse_statistics(record: Any) -> NormStatistics:
    statistics = {}
    for name, packed in record.items():
        values = np.frombuffer(base64.b64decode(packed, validate=True), "<f2").astype(np.float32)
        if not len(values):
            raise ValueError(f"{name} is empty")
        mean, std = values.reshape(2, -1)
        statistics[name] = (mean, std)
    return statistics


def parse_branch_ranges(record: Any) -> dict[str, tuple[float, float]]:
    """Convert parsed JSON to branch ranges.

    Raises:
        ValueError, TypeError, AttributeError: Not valid scales.
    """
    ranges = {name: (float(low), float(high)) for name, (low, high) in record.items()}
    if not all(low <= high and math.isfinite(high - low) for low, high in ranges.values()):
        raise ValueError("a range is not valid")
    return ranges


def parse_trained_scales(record: Any) -> TrainedScales:
    """Convert parsed JSON to trained scales.

    Raises:
        ValueError, TypeError, AttributeError: Not valid scales.
    """
    trained = from_json(TrainedScales, record)
    trained = dataclasses.replace(trained, branches=parse_branch_ranges(trained.branches))
    if not all(
        isinstance(name, str) and isinstance(scale, float) and scale > 0 and math.isfinite(scale)
        for name, scale in trained.scales.items()
    ):
        raise TypeError("a learned scale is not a positive number")
    return trained


DESCRIPTION: Property[Sidecar] = Property(
    key="rtresnet.model",
    encode=lambda sidecar: json.dumps(description(sidecar), separators=(",", ":")),
    parse=from_description,
    fix="export the net again, or state its input with: rtresnet adopt FILE.onnx",
)
NORM_STATISTICS: Property[NormStatistics] = Property(
    key="rtresnet.norms",
    encode=_encode_statistics,
    parse=_parse_statistics,
    fix="export the net again",
)
TRAINED_SCALES: Property[TrainedScales] = Property(
    key="rtresnet.learned_scales",
    encode=lambda trained: json.dumps(trained.record),
    parse=parse_trained_scales,
    fix="export the net again",
)
BRANCH_RANGES: Property[BranchRanges] = Property(
    key="rtresnet.branches",
    encode=lambda ranges: json.dumps({name: [low, high] for name, (low, high) in ranges.items()}),
    parse=parse_branch_ranges,
    fix="quantize the net again",
)


def described(path: Path, model: Any) -> Sidecar | None:
    """Return the description in an ONNX file without a sidecar, with the file's hash, or None.

    Raises:
        ArtifactError: The description is damaged.
    """
    sidecar = DESCRIPTION.read(properties_of(model))
    if sidecar is None:
        return None
    digest, size = atomic_io.sha256(path), path.stat().st_size
    return dataclasses.replace(sidecar, file=path.name, sha256=digest, bytes=size)
