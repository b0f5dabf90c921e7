"""Decode image files. The only module that calls the decoders, Pillow and simplejpeg.

simplejpeg (the extra `fast`) decodes plain colour JPEGs, faster than Pillow's wheels, with the
same pixels. Pillow decodes unusual and damaged files, and decides which are errors.
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
FACTORS = (8, 4, 2)  # by which both decoders can shrink a JPEG within its DCT

# Exceptions of Pillow's decoders other than OSError for a damaged header or stream.
DAMAGED = (
    ArithmeticError, AttributeError, EOFError, LookupError, SyntaxError, TypeError, ValueError,
    struct.error, zlib.error,
)  # fmt: skip


class CorruptImage(DataError):
    """One image that cannot be decoded. Loaders count it, report it and continue."""


@dataclass(frozen=True)
class FileEnds:
    """Size, beginning and end of an image file.

    Attributes:
        size: Bytes of the file.
        head: The first LENGTH bytes at most.
        tail: The last LENGTH bytes at most.
    """

    size: int
    head: bytes
    tail: bytes

    LENGTH = 1024

    @classmethod
    def read(cls, size: int, read: Callable[[int, int], bytes]) -> FileEnds:
        """Read both ends of `size` bytes with `read(length, start)`."""
        head = read(min(size, cls.LENGTH), 0)
        if size <= cls.LENGTH:
            return cls(size, head, head)
        return cls(size, head, read(cls.LENGTH, size - cls.LENGTH))

    @classmethod
    def of(cls, data: bytes) -> FileEnds:
        """Take both ends of bytes in memory."""
        return cls(len(data), data[: cls.LENGTH], data[-cls.LENGTH :])

    def complete(self) -> bool:
        """Return whether the file begins and ends as its format requires; False if that is unknown.

        Finds files that are empty, truncated or no images. Only decoding finds other damage.
        """
        head, tail = self.head, self.tail
        if head[:3] == b"\xff\xd8\xff":  # JPEG: the end marker does not occur within a scan
            return b"\xff\xd9" in tail
        if head[:8] == b"\x89PNG\r\n\x1a\n":
            return b"IEND\xaeB`\x82" in tail
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return int.from_bytes(head[4:8], "little") + 8 <= self.size
        return False

    @property
    def jpeg(self) -> bool:
        """Whether the file is a JPEG, which cannot be transparent."""
        return self.head[:2] == b"\xff\xd8"


def declares_transparency(data: bytes) -> bool | None:
    """Check whether an image file has an alpha channel or a transparent colour.

    Args:
        data: The file's bytes, or its first ones.

    Returns:
        None if Pillow cannot tell from these bytes.
    """
    try:
        with _open(data) as image:
            return image.has_transparency_data
    except Exception:  # Pillow raises almost anything on half a file
        return None


def decode(
    path: str | os.PathLike[str], data: bytes | None = None, *, at_least: int | None = None
) -> np.ndarray:
    """Decode an image file to uint8 RGB [H, W, 3], oriented by its EXIF tag.

    Transparent images are composited on white, because the colours under transparent pixels are
    arbitrary.

    Args:
        path: The file; with `data`, only used in error messages.
        data: The file's bytes.
        at_least: Required shorter side, in pixels. A JPEG is decoded at a half, a quarter or
            an eighth of its size if that leaves the shorter side this long.

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
        raise CorruptImage(f"{path}: {_unreadable(data or b'')}") from None
    except Image.DecompressionBombError as error:
        raise CorruptImage(f"{path}: {error}") from None
    except OSError as error:
        if error.errno is None:  # Pillow's own, such as "image file is truncated"
            raise CorruptImage(f"{path}: {error}") from None
        raise DataError(f"{path}: {error.strerror}") from None


def _container(data: bytes) -> str | None:
    """Return "HEIC" or "AVIF" if the file's header states it, else None."""
    brands = data[8:64] if data[4:8] == b"ftyp" else b""
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    return "HEIC" if any(brand in brands for brand in (b"heic", b"heix", b"mif1")) else None


@functools.cache
def _register_heic() -> bool:
    """Let Pillow read HEIC images; False if the package pillow-heif is not installed."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def _unreadable(data: bytes) -> str:
    """Return the reason why Pillow cannot read an image."""
    from PIL import features

    container = _container(data)
    if container == "HEIC" and not _register_heic():
        return "a HEIC image: pip install pillow-heif, or convert it to JPEG"
    if container == "AVIF" and not features.check("avif"):
        return "an AVIF image: pip install --upgrade pillow, or convert it to JPEG"
    return "not an image, or damaged"


def _open(data: bytes) -> Image.Image:
    from PIL import Image

    if _container(data) == "HEIC":
        _register_heic()
    return Image.open(io.BytesIO(data))


def _by_pillow(data: bytes, at_least: int | None) -> np.ndarray:
    from PIL import ImageOps

    with _open(data) as image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # only JPEG supports it
        ImageOps.exif_transpose(image, in_place=True)
        upright: Image.Image = image
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would cut at 255, not scale
            upright = _grey(image)
        elif image.has_transparency_data:
            upright = _on_white(image)
        return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))


def _grey(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8 bits; the transparent level, if there is one, becomes white."""
    from PIL import Image

    levels = np.asarray(image)
    pixels = (levels >> 8).clip(0, 255).astype(np.uint8)
    if "transparency" in image.info:
        pixels[levels == image.info["transparency"]] = 255
    return Image.fromarray(pixels)


def _on_white(image: Image.Image) -> Image.Image:
    """Composite a transparent image on white, as RGB. Opaque pixels keep their values."""
    from PIL import Image

    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        # The transparent colour of a 16-bit PNG; Pillow keeps the high bytes of its pixels.
        image.info["transparency"] = tuple(level >> 8 for level in key)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


@functools.cache
def _simplejpeg() -> Any:
    """Return the package, or None if it is not installed."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def _by_simplejpeg(data: bytes, at_least: int | None) -> np.ndarray | None:
    """Decode a plain colour JPEG as Pillow would; None for everything else."""
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
        # Without lower bounds, simplejpeg would choose any eighth of the size.
        bounds = {"min_height": shape[0], "min_width": shape[1], "min_factor": factor}
        pixels: np.ndarray = package.decode_jpeg(data, **bounds if factor > 1 else {})
    except ValueError:  # also for warnings of libjpeg: Pillow decides which of them are errors
        return None
    if pixels.shape != shape:
        return None
    if b"Exif\0\0" in header or b"tiff:Orientation" in header:
        with Image.open(io.BytesIO(data)) as image:  # reads the header only
            pixels = _upright(pixels, image.getexif().get(ORIENTATION, 1))
    return pixels


def _jpeg_header(data: bytes) -> bytes | None:
    """Return everything up to a JPEG's first scan; None if its start is not certain."""
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while data[place : place + 1] == b"\xff" and len(data) > place + 4:
        marker = data[place + 1]
        # Only segments with a length: fill bytes and restart markers are unusual here.
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF:
            return None
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xDA:
            return data[:end]
        place = end
    return None


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror pixels [H, W, 3] by the EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
