"""Preprocessing of images: resize, crop, normalize.

The single source of truth for training's evaluation, calibration, export parity and serving,
so that none of them can differ. The resize is Pillow's, antialiased. Its releases may differ by
one level of 255: Pillow 13 takes the rows of a tall image first, earlier ones the columns.

`data/sources.py` reads and decodes files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtresnet.core.errors import InputError, UnknownNameError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Common normalizations; (x / 255 - mean) / std is in [-1, 1] with "half".
PRESETS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
FLOAT, UINT8 = "NCHW RGB float32", "NHWC RGB uint8"
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The preprocessing of a net's input: how a uint8 RGB image becomes its input tensor.

    Attributes:
        size: Side of the net's square input, in pixels.
        resize: The shorter side is resized to this before the centre crop, in pixels.
        mean: Per channel (R, G, B), in units of [0, 1].
        std: Standard deviation per channel, in units of [0, 1].
        layout: Layout of the file's input. FLOAT: normalized planes. UINT8: raw pixels; the
            file subtracts the mean and divides by std itself.
        interpolation: Filter of the resize, "bilinear" or "bicubic". Sidecars of versions that
            did not state it mean bilinear.
    """

    size: int
    resize: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    layout: str = FLOAT
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.size < 1 or self.resize < self.size:
            raise InputError(
                f"input size {self.size} with resize {self.resize}: "
                "both must be positive and the resize at least the size"
            )
        if self.layout not in (FLOAT, UINT8):
            raise InputError(
                f"unknown pixel layout {self.layout!r}; known: {FLOAT!r} and {UINT8!r}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise UnknownNameError("interpolation", self.interpolation, INTERPOLATIONS)
        if len(self.mean) != 3 or len(self.std) != 3:
            raise InputError("mean and std need three values each, R,G,B")
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(self.std)) or min(self.std) <= 0:
            raise InputError(f"mean {self.mean} and std {self.std} must be finite, std positive")

    @classmethod
    def for_size(cls, size: int, **kwargs: Any) -> Preprocess:
        """Return the usual preprocessing at `size`: resize 256/224 above 64 pixels, none below."""
        return cls(size=size, resize=round(size * 256 / 224) if size > 64 else size, **kwargs)

    def assumptions(self) -> tuple[str, ...]:
        """Return this contract as entries of `assumed` in the sidecar of a file without one."""
        entries = []
        if self.layout == FLOAT:
            preset = [name for name, values in PRESETS.items() if values == (self.mean, self.std)]
            mean, std = (",".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
            named = f" (preset {preset[0]})" if preset else ""
            entries.append(f"input: mean {mean} and std {std}{named}")
        return (*entries, *self.crop_assumption())

    def crop_assumption(self) -> tuple[str, ...]:
        """Return the entry of `assumptions` for the crop's margin; empty without a margin."""
        if self.resize == self.size:
            return ()
        return (f"input: the centre {self.size} of {self.resize} pixels",)

    def crop(self, image: np.ndarray) -> np.ndarray:
        """Resize the shorter side and crop the centre: uint8 [H, W, 3] to uint8 [size, size, 3].

        Raises:
            InputError: Anything but uint8 RGB.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(
                f"image is {image.dtype} {list(image.shape)}; expected uint8 RGB [H, W, 3]",
                fix="rtresnet.data.decode.decode(FILE) reads image files in this format and "
                "composites transparent images on white",
            )
        image = resize_shorter(image, self.resize, self.interpolation)
        top = round((image.shape[0] - self.size) / 2)
        left = round((image.shape[1] - self.size) / 2)
        return image[top : top + self.size, left : left + self.size]

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """Convert uint8 [N, H, W, 3] to the file's input, which is normalized or pixels."""
        return images if self.layout == UINT8 else self.normalize(images)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift, float32 [3] each, that normalize a level from 0 to 255."""
        mean, std = np.asarray(self.mean), np.asarray(self.std)
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Normalize uint8 [N, H, W, 3] to contiguous float32 [N, 3, H, W]: (x / 255 - mean) / std.

        Raises:
            InputError: Images of the wrong type or shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise InputError(
                f"images are {images.dtype} {list(images.shape)}; expected uint8 [N, H, W, 3]"
            )
        scale, shift = self.factors()
        out = np.empty((len(images), 3, *images.shape[1:3]), np.float32)
        np.multiply(images.transpose(0, 3, 1, 2), scale[:, None, None], out=out)
        out += shift[:, None, None]
        return out


def resize_shorter(image: np.ndarray, side: int, interpolation: str = "bilinear") -> np.ndarray:
    """Resize a uint8 image [H, W, 3] so that its shorter side has `side` pixels."""
    height, width = image.shape[:2]
    short = min(height, width)
    if short == side:
        return image
    return resize(image, int(height * side / short), int(width * side / short), interpolation)


def resize(
    image: np.ndarray, height: int, width: int, interpolation: str = "bilinear"
) -> np.ndarray:
    """Resize a uint8 image [H, W, 3] to uint8 [height, width, 3], with antialiasing."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    from PIL import Image

    method = Image.Resampling[interpolation.upper()]
    return np.array(Image.fromarray(image).resize((width, height), method))


def pieces(images: np.ndarray, batch: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """Split images into batches of one size; the last batch is filled by repeating its last image.

    For files with a fixed batch size, as torch.onnx.export writes them by default. A net in
    evaluation mode computes each image separately, so the repeated images do not affect the others.

    Args:
        images: [N, ...], N from 1.
        batch: Size of a batch; None for all images together.

    Yields:
        A batch [batch, ...], and the number of its images that are not repetitions.
    """
    if batch is None:
        yield images, len(images)
        return
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        rows = len(part)
        if rows < batch:
            part = np.concatenate([part, np.repeat(part[-1:], batch - rows, axis=0)])
        yield part, rows
