"""One image file to pixels. The only file that touches Pillow's decoders."""

from __future__ import annotations

import io
import os
import zlib

import numpy as np

from rtresnet.errors import DataError


class CorruptImage(DataError):
    """One image that cannot be decoded. Batches count it, report it and go on."""


def decode(path: str | os.PathLike[str], data: bytes | None = None) -> np.ndarray:
    """Decodes an image file to uint8 RGB [H, W, 3], upright as its EXIF says.

    Raises:
        CorruptImage: Not an image, truncated, or larger than Pillow's bomb limit.
        DataError: The file cannot be read at all.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data) if data is not None else path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16-bit grey: Pillow would cut at 255, not scale
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            image.info.pop("transparency", None)  # left out anyway; Pillow would warn
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, SyntaxError, ValueError, EOFError, zlib.error):
        raise CorruptImage(f"{path}: not an image, or damaged") from None
    except Image.DecompressionBombError as error:
        raise CorruptImage(f"{path}: {error}") from None
    except OSError as error:
        if error.errno is None:  # Pillow's own, such as "image file is truncated"
            raise CorruptImage(f"{path}: {error}") from None
        raise DataError(f"{path}: {error.strerror}") from None
