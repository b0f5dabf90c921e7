"""Preprocessing stated by a person, for files that do not state it themselves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rtresnet.core import artifacts
from rtresnet.core.config import Config, option
from rtresnet.core.errors import InputError
from rtresnet.core.preprocess import PRESETS, UINT8, Preprocess

Channels = tuple[float, float, float]


def parse_channels(text: str) -> Channels:
    """Read "R,G,B".

    Raises:
        InputError: Not three numbers.
    """
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError("not three numbers", fix="as in 0.5,0.5,0.5") from None
    _require_unit((red, green, blue))
    return red, green, blue


def _require_unit(channels: Channels) -> None:
    if max(channels) > 1:
        raise InputError("not in units of [0, 1]", fix="divide pixel levels by 255")


@dataclass(frozen=True, kw_only=True)
class InputConfig(Config):
    """Preprocessing of a file without a sidecar, or that replaces the sidecar's.

    Attributes:
        size: Side of the input, in pixels.
        mean: For each channel (R, G, B), in units of [0, 1].
        std: As `mean`.
        preset: "imagenet", "half" (mean and std 0.5) or "unit" (mean 0, std 1) instead of both.
        interpolation: Filter of the resize.
    """

    size: int | None = option(
        None, "Side of the input, in pixels.", minimum=1, default_text="from the sidecar"
    )
    mean: Channels | None = option(
        None,
        "Mean of the input for each channel, in units of [0, 1].",
        metavar="R,G,B",
        parse=parse_channels,
        default_text="from the sidecar",
    )
    std: Channels | None = option(
        None,
        "Standard deviation of the input for each channel, in units of [0, 1].",
        metavar="R,G,B",
        parse=parse_channels,
        default_text="from the sidecar",
    )
    preset: Literal["imagenet", "half", "unit"] | None = option(
        None,
        "Mean and std by name: imagenet, half (0.5 and 0.5) or unit (0 and 1).",
        replaces=("mean", "std"),
    )
    interpolation: Literal["bilinear", "bicubic"] | None = option(
        None, "Filter of the resize.", default_text="from the sidecar, or bilinear"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset is not None:
            if self.mean is not None or self.std is not None:
                raise InputError(
                    "--preset cannot be combined with --mean and --std",
                    fix="leave out --mean and --std",
                )
            mean, std = PRESETS[self.preset]
            object.__setattr__(self, "mean", mean)
            object.__setattr__(self, "std", std)
        for channels in (self.mean, self.std):
            if channels is not None:
                _require_unit(channels)

    @property
    def empty(self) -> bool:
        """Whether nothing is stated."""
        stated = (self.size, self.mean, self.std, self.interpolation)
        return all(value is None for value in stated)

    def applied_to(self, base: Preprocess) -> Preprocess:
        """Return `base` with the stated values."""
        changed: dict[str, Any] = {}
        if self.size is not None and self.size != base.size:
            changed |= {"size": self.size, "resize": Preprocess.for_size(self.size).resize}
        changed |= {
            name: value
            for name in ("mean", "std", "interpolation")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(base, **changed)

    def require_size(self, path: object, fixed: int | None) -> None:
        """Raise InputError if another side is stated than the file's input has."""
        if fixed is not None and self.size not in (None, fixed):
            raise InputError(
                f"{path}: its input has {fixed}x{fixed} pixels, not {self.size}x{self.size}",
                fix=f"use --size {fixed}",
            )

    def complete(self, path: object, *, fixed: int | None, pixels: bool = False) -> Preprocess:
        """Return the preprocessing of a file without a sidecar.

        Args:
            path: The file, for messages.
            fixed: Side of the file's input, in pixels; None if it leaves it open.
            pixels: Whether the file accepts uint8 and normalizes it itself.

        Raises:
            InputError: A value is not stated, or contradicts the file.
        """
        lacking = {}
        if self.size is None and fixed is None:
            lacking["size"] = "--size S"
        if not pixels and (self.mean is None or self.std is None):
            lacking["mean and std"] = "--preset imagenet|half|unit, or --mean R,G,B --std R,G,B"
        if lacking:
            onnx = artifacts.SUFFIXES.get(Path(str(path)).suffix.lower()) == "onnx"
            once = f" (once, with: rtresnet adopt {path})" if onnx else ""
            raise InputError(
                f"{path}: no sidecar states its {' and '.join(lacking)}",
                fix=f"state them{once}: {' '.join(lacking.values())}",
            )
        self.require_size(path, fixed)
        side = fixed or self.size
        assert side is not None
        base = Preprocess.for_size(side, **({"layout": UINT8} if pixels else {}))
        return dataclasses.replace(self, size=None, preset=None).applied_to(base)
