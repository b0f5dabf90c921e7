"""One image file to pixels. The only file that touches the decoders: Pillow and simplejpeg.

simplejpeg (the extra `fast`) takes plain colour JPEGs, faster and bit for bit as Pillow's own
wheels. Whatever is unusual or damaged goes to Pillow, which alone decides what is an error.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rtresnet.core.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112  # the EXIF tag
FACTORS = (8, 4, 2)  # by which both decoders can shrink a JPEG within its DCT, next to 1

# What Pillow's decoders raise, apart from OSError, where a header or a stream is damaged.
DAMAGED = (
    ArithmeticError, AttributeError, EOFError, LookupError, SyntaxError, TypeError, ValueError,
    struct.error, zlib.error,
)  # fmt: skip


class CorruptImage(DataError):
    """One image that cannot be decoded. Batches count it, report it and go on."""


@dataclass(frozen=True)
class Ends:
    """What two short reads show of an image file.

    Attributes:
        size: Bytes of the whole.
        head: The first bytes, LENGTH at most.
        tail: The last bytes, LENGTH at most.
    """

    size: int
    head: bytes
    tail: bytes

    LENGTH = 1024

    @classmethod
    def read(cls, size: int, read: Callable[[int, int], bytes]) -> Ends:
        """Of `size` bytes from which `read(length, start)` reads."""
        head = read(min(size, cls.LENGTH), 0)
        if size <= cls.LENGTH:
            return cls(size, head, head)
        return cls(size, head, read(cls.LENGTH, size - cls.LENGTH))

    @classmethod
    def of(cls, data: bytes) -> Ends:
        """Of bytes in memory."""
        return cls(len(data), data[: cls.LENGTH], data[-cls.LENGTH :])

    def complete(self) -> bool:
        """Whether the file begins and ends as its format asks: False also where that is unknown.

        Finds files that are empty, cut short or no images. Damage in the middle shows only when
        the image is decoded.
        """
        head, tail = self.head, self.tail
        if head[:3] == b"\xff\xd8\xff":  # JPEG: the end marker occurs nowhere within a scan
            return b"\xff\xd9" in tail
        if head[:8] == b"\x89PNG\r\n\x1a\n":
            return b"IEND\xaeB`\x82" in tail
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return int.from_bytes(head[4:8], "little") + 8 <= self.size
        return False

    @property
    def jpeg(self) -> bool:
        """Whether it begins as a JPEG, which cannot be transparent."""
        return self.head[:2] == b"\xff\xd8"


def declares_transparency(data: bytes) -> bool | None:
    """Whether an image file has an alpha channel or a transparent colour.

    Args:
        data: The file's bytes, or its first ones.

    Returns:
        None where Pillow cannot tell from these bytes.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.has_transparency_data
    except Exception:  # of half a file Pillow raises almost anything
        return None


def decode(
    path: str | os.PathLike[str], data: bytes | None = None, *, at_least: int | None = None
) -> np.ndarray:
    """Decodes an image file to uint8 RGB [H, W, 3], upright as its EXIF says.

    Where an image is transparent it is composited on white: without that, whatever colours a
    program left under its transparent pixels would show.

    Args:
        path: The file; only its name in errors where `data` is given.
        data: The file's bytes.
        at_least: The shorter side that is needed, in pixels. A JPEG is then decoded at a half, a
            quarter or an eighth of its size, as far as its shorter side stays that long.

    Returns:
        Contiguous pixels, which may be read-only.

    Raises:
        CorruptImage: Not an image, truncated, or larger than Pillow's bomb limit.
        DataError: The file cannot be read at all.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if data is None:
            with open(path, "rb", buffering=0) as file:
                data = file.read()
        pixels = _by_simplejpeg(data, at_least)
        return _by_pillow(data, at_least) if pixels is None else pixels
    except (UnidentifiedImageError, *DAMAGED):
        raise CorruptImage(f"{path}: not an image, or damaged") from None
    except Image.DecompressionBombError as error:
        raise CorruptImage(f"{path}: {error}") from None
    except OSError as error:
        if error.errno is None:  # Pillow's own, such as "image file is truncated"
            raise CorruptImage(f"{path}: {error}") from None
        raise DataError(f"{path}: {error.strerror}") from None


def _by_pillow(data: bytes, at_least: int | None) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data)) as image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # does nothing to other formats than JPEG
        ImageOps.exif_transpose(image, in_place=True)
        upright: Image.Image = image
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would cut at 255, not scale
            upright = _grey(image)
        elif image.has_transparency_data:
            upright = _on_white(image)
        return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))


def _grey(image: Image.Image) -> Image.Image:
    """An image of 16-bit grey levels in 8 bits; its transparent level, if it has one, is white."""
    from PIL import Image

    levels = np.asarray(image)
    pixels = (levels >> 8).clip(0, 255).astype(np.uint8)
    if "transparency" in image.info:
        pixels[levels == image.info["transparency"]] = 255
    return Image.fromarray(pixels)


def _on_white(image: Image.Image) -> Image.Image:
    """An image with transparency composited on white, as RGB. Opaque pixels keep their values."""
    from PIL import Image

    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        # The transparent colour of a PNG of 16 bits, of whose pixels Pillow keeps the high bytes.
        image.info["transparency"] = tuple(level >> 8 for level in key)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


@functools.cache
def _simplejpeg() -> Any:
    """The package, or None where it is not installed."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def _by_simplejpeg(data: bytes, at_least: int | None) -> np.ndarray | None:
    """A plain colour JPEG as Pillow would decode it; None for whatever Pillow should look at."""
    package, header = _simplejpeg(), _jpeg_header(data)
    if package is None or header is None:
        return None
    from PIL import Image

    try:
        height, width, colours, _ = package.decode_jpeg_header(header)
        limit = Image.MAX_IMAGE_PIXELS
        if colours != "YCbCr" or (limit is not None and height * width > limit):
            return None
        short = min(height, width)
        factor = next((f for f in FACTORS if at_least and short // at_least >= f), 1)
        shape = -(-height // factor), -(-width // factor), 3
        # Without lower bounds it would take any eighth of the size, or the whole.
        bounds = {"min_height": shape[0], "min_width": shape[1], "min_factor": factor}
        pixels: np.ndarray = package.decode_jpeg(data, **bounds if factor > 1 else {})
    except ValueError:  # also where libjpeg only warns: Pillow knows which warnings are errors
        return None
    if pixels.shape != shape:
        return None
    if b"Exif\0\0" in header or b"tiff:Orientation" in header:
        with Image.open(io.BytesIO(data)) as image:  # reads the header only
            pixels = _upright(pixels, image.getexif().get(ORIENTATION, 1))
    return pixels


def _jpeg_header(data: bytes) -> bytes | None:
    """Everything up to a JPEG's first scan; None where that cannot be told for certain."""
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while data[place : place + 1] == b"\xff" and len(data) > place + 4:
        marker = data[place + 1]
        # Segments with a length only: fill bytes and restart markers do not belong here.
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF:
            return None
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xDA:
            return data[:end]
        place = end
    return None


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns pixels [H, W, 3] as EXIF's orientation, 1 to 8, asks."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
