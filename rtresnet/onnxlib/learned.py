"""Activation scales that training learned, on their way from the checkpoint to the INT8 file.

Training with fake quantization (`train/qat.py`) leaves them in the checkpoint; the exported FP32
file carries them on as a metadata property, which runtimes and builders pass over; and the INT8
file is made with just these.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rtresnet.core.errors import ArtifactError, InputError
from rtresnet.core.serialization import from_json
from rtresnet.onnxlib import branches

KEY = "rtresnet.learned_scales"
METHOD = "qat"


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What was learned, and on what.

    Attributes:
        scales: Activation tensor to float32 units a step, under the ONNX file's names.
        images: The training data's name.
        images_sha256: Their hash.
        n: Number of training images.
        branches: How far each residual branch went on some of them (`branches.py`); empty where the
            run has not ended yet.
    """

    scales: dict[str, float]
    images: str
    images_sha256: str
    n: int
    branches: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Of the scales alone."""
        return hashlib.sha256(json.dumps(self.scales).encode()).hexdigest()


def pack(learned: Learned) -> str:
    """As text."""
    return json.dumps(dataclasses.asdict(learned))


def unpack(text: str) -> Learned:
    """What `pack` packed.

    Raises:
        ArtifactError: Something else.
    """
    try:
        return checked(json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{KEY}: damaged ({error})", fix="export the net again") from None


def checked(record: Any) -> Learned:
    """A record's fields as what they should be.

    Raises:
        TypeError, ValueError, AttributeError: They are not.
    """
    learned = from_json(Learned, record)
    learned = dataclasses.replace(learned, branches=branches.checked(learned.branches))
    if not all(
        isinstance(name, str) and isinstance(scale, float) and scale > 0 and math.isfinite(scale)
        for name, scale in learned.scales.items()
    ):
        raise TypeError("a learned scale is not a positive number")
    return learned


def refuse_calibration(
    source: object, learned: Learned | None, calib: str | None, calibrator: str
) -> None:
    """Calibration would replace what a training run learned, and must not do so in passing.

    Args:
        source: Whose scales they are.
        learned: None where there are none.
        calib: Images that were asked for, if any.
        calibrator: "auto" where none was asked for.

    Raises:
        InputError: There are learned scales, and calibration was asked for.
    """
    if learned is not None and (calib is not None or calibrator != "auto"):
        option = f"--calib {calib}" if calib is not None else f"--calibrator {calibrator}"
        raise InputError(
            f"{source}: its activation scales were learned in training, there is nothing to "
            "calibrate",
            fix=f"leave {option} out",
        )


def of(metadata: Mapping[str, str]) -> Learned | None:
    """What an ONNX file's metadata properties say; None where nothing was learned.

    Raises:
        ArtifactError: The record is damaged.
    """
    return unpack(metadata[KEY]) if KEY in metadata else None
