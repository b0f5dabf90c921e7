from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from rtresnet.data import decode as module
from rtresnet.data.decode import CorruptImage, decode


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (9 + c)) * 60 + np.cos(y / (7 + c)) * 60 + 128 for c in range(3)]
    noise = np.random.default_rng(seed).integers(-8, 8, (height, width, 3))
    return Image.fromarray((np.stack(waves, 2) + noise).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90, **options)  # type: ignore[arg-type]
    return out.getvalue()


@pytest.fixture(params=["pillow", "simplejpeg"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(module, "_simplejpeg", lambda: None)
    name: str = request.param
    return name


@pytest.mark.parametrize(
    ("at_least", "shape"),
    [
        (None, (602, 801)), (602, (602, 801)), (302, (602, 801)), (301, (301, 401)),
        (151, (301, 401)), (150, (151, 201)), (75, (76, 101)), (1, (76, 101)),
    ],
)  # fmt: skip
def test_a_jpeg_is_decoded_as_small_as_will_do(
    decoder: str, at_least: int | None, shape: tuple[int, int]
) -> None:
    pixels = decode("a.jpg", jpeg(photograph(801, 602)), at_least=at_least)
    assert pixels.shape == (*shape, 3) and pixels.dtype == np.uint8


def test_a_smaller_decoding_shows_the_same(decoder: str) -> None:
    smooth = Image.fromarray(np.linspace(0, 255, 800 * 600 * 3).reshape(600, 800, 3).astype("u1"))
    half = decode("a.jpg", jpeg(smooth), at_least=200).astype(int)
    expected = np.asarray(smooth.resize((400, 300), Image.Resampling.BOX)).astype(int)
    assert np.abs(half - expected).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("at_least", [None, 40])
def test_an_image_is_upright_as_its_exif_says(
    decoder: str, orientation: int, at_least: int | None
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(photograph(160, 96), exif=exif)
    turned = orientation >= 5
    scale = 1 if at_least is None else 2
    expected = (160 // scale, 96 // scale) if turned else (96 // scale, 160 // scale)
    assert decode("a.jpg", data, at_least=at_least).shape[:2] == expected


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_printers_colours_become_rgb(decoder: str, mode: str) -> None:
    data = jpeg(photograph(64, 48).convert(mode))
    assert decode("a.jpg", data).shape == (48, 64, 3)
    assert decode("a.jpg", data, at_least=24).shape == (24, 32, 3)


def test_other_formats_are_decoded_whole(decoder: str) -> None:
    out = io.BytesIO()
    photograph(64, 48).save(out, "PNG")
    assert np.array_equal(
        decode("a.png", out.getvalue(), at_least=4), np.asarray(photograph(64, 48))
    )


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)  # type: ignore[arg-type]
    return out.getvalue()


def png_of_16_bits(colour: tuple[int, int, int], transparent: tuple[int, int, int]) -> bytes:
    """Return a PNG of 4x4 pixels of one colour, which Pillow can read and not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    rows = 4 * (b"\0" + 4 * struct.pack(">3H", *colour))
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)),
            chunk(b"tRNS", struct.pack(">3H", *transparent)),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        )
    )


GREY_RAMP = Image.fromarray(np.array([[0, 50, 100, 150]], np.uint8))


@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", "RGBA"), ("WEBP", "RGBA"), ("TIFF", "RGBA"), ("PNG", "LA"), ("PNG", "P")],
)
def test_decode_of_hidden_colour_below_zero_alpha_gives_white(form: str, mode: str) -> None:
    pixels = np.full((8, 8, 4), (200, 0, 0, 255), np.uint8)
    pixels[:, 4:, 3] = 0  # the same red below it
    image = Image.fromarray(pixels)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    decoded = decode(f"a.{form}", encoded(image, form, **options))
    opaque = image.convert("RGB").getpixel((0, 0))
    assert (decoded[:, :4] == opaque).all() and opaque != (255, 255, 255)
    assert (decoded[:, 4:] == 255).all()


def test_decode_of_half_transparent_pixel_mixes_it_with_white() -> None:
    image = Image.new("RGBA", (4, 4), (100, 0, 50, 51))  # a fifth of the colour
    decoded = decode("a.png", encoded(image, "PNG"))
    assert np.abs(decoded.astype(int) - (224, 204, 214)).max() <= 1


def test_decode_of_opaque_alpha_channel_keeps_every_bit() -> None:
    image = photograph(64, 48)
    image.putalpha(255)
    decoded = decode("a.png", encoded(image, "PNG"))
    assert np.array_equal(decoded, np.asarray(photograph(64, 48)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(GREY_RAMP, "PNG", transparency=50), [0, 255, 100, 150]),
        (encoded(GREY_RAMP.convert("RGB"), "PNG", transparency=(50, 50, 50)), [0, 255, 100, 150]),
        (encoded(GREY_RAMP, "GIF", transparency=50), [0, 255, 100, 150]),
        (
            encoded(
                Image.fromarray(np.array([[0, 50, 100, 150]], np.uint16) << 8),
                "PNG",
                transparency=50 << 8,
            ),
            [0, 255, 100, 150],
        ),
        (png_of_16_bits((1000, 2000, 3000), (1000, 2000, 3000)), [255] * 4),
        (png_of_16_bits((1000, 1000, 1000), (9000, 9000, 9000)), [3] * 4),
    ],
    ids=["L", "RGB", "GIF", "16-bit grey", "16-bit RGB", "16-bit RGB, another colour"],
)
def test_decode_of_transparent_colour_makes_it_white(data: bytes, expected: list[int]) -> None:
    assert decode("a", data)[0, :, 0].tolist() == expected


def test_decode_of_transparent_image_turns_it_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the left column is the top row
    pixels = np.full((6, 4, 4), (200, 0, 0, 255), np.uint8)
    pixels[:, 0, 3] = 0
    decoded = decode("a.png", encoded(Image.fromarray(pixels), "PNG", exif=exif))
    assert decoded.shape == (4, 6, 3)
    assert (decoded[0] == 255).all() and (decoded[1:] == (200, 0, 0)).all()


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("at_least", [None, 50])
def test_a_truncated_jpeg_is_corrupt_whoever_reads_it(
    decoder: str, keep: float, at_least: int | None
) -> None:
    data = jpeg(photograph(320, 240))
    with pytest.raises(CorruptImage, match=r"a\.jpg"):
        decode("a.jpg", data[: int(len(data) * keep)], at_least=at_least)


def test_a_jpeg_of_noise_inside_is_decoded_or_corrupt_but_nothing_else(decoder: str) -> None:
    data = bytearray(jpeg(photograph(320, 240)))
    rng = np.random.default_rng(0)
    for place in rng.integers(700, len(data), 40):
        data[place] = int(rng.integers(256))
        try:
            assert decode("a.jpg", bytes(data)).shape == (240, 320, 3)
        except CorruptImage as error:
            assert "a.jpg" in str(error)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(801, 602), (33, 47), (8, 8), (500, 375)])
def test_both_decoders_give_the_same_bits(
    subsampling: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg")
    for progressive in (False, True):
        data = jpeg(photograph(*size), subsampling=subsampling, progressive=progressive)
        for at_least in (None, min(size) // 2, min(size) // 4, min(size) // 8, 1):
            with monkeypatch.context() as patch:
                ours = decode("a.jpg", data, at_least=at_least)
                patch.setattr(module, "_simplejpeg", lambda: None)
                assert np.array_equal(ours, decode("a.jpg", data, at_least=at_least))


def by_both(data: bytes, at_least: int | None, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return each decoder's result: bytes and shape, or the error's text."""
    results: list[object] = []
    for way in (lambda: __import__("simplejpeg"), lambda: None):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_simplejpeg", way)
            try:
                pixels = decode("a.jpg", data, at_least=at_least)
                results.append((pixels.shape, pixels.tobytes()))
            except CorruptImage as error:
                results.append(str(error))
    return results


@pytest.mark.parametrize("where", ["exif", "xmp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_decoders_turn_an_image_the_same_way(
    where: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg")
    exif = Image.Exif()
    exif[0x0112] = orientation
    output = {"exif": exif} if where == "exif" else {
        "xmp": f'<x:xmpmeta tiff:Orientation="{orientation}"/>'.encode()
    }  # fmt: skip
    data = jpeg(photograph(100, 60), **output)
    upright = decode("a.jpg", jpeg(photograph(100, 60)))
    assert (orientation == 1) == np.array_equal(decode("a.jpg", data), upright)
    for at_least in (None, 30):
        ours, theirs = by_both(data, at_least, monkeypatch)
        assert ours == theirs


def test_damage_is_the_same_to_both_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    exif, rng, broken = Image.Exif(), np.random.default_rng(0), 0
    exif[0x0112] = 6
    whole = jpeg(photograph(64, 48), exif=exif)
    for number in range(200):
        data = bytearray(whole)
        for place in rng.integers(0, len(data) if number % 2 else 700, 2):
            data[place] = int(rng.integers(256))
        ours, theirs = by_both(bytes(data[: rng.integers(len(data) // 2, 2 * len(data))]), None,
                               monkeypatch)  # fmt: skip
        assert ours == theirs
        broken += isinstance(ours, str)
    assert 20 < broken < 180


def test_a_jpeg_that_unpacks_to_gigabytes_is_corrupt(
    decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CorruptImage, match="exceeds limit"):
        decode("a.jpg", jpeg(photograph(64, 48)), at_least=6)


def test_without_a_limit_to_an_images_size_any_is_decoded(
    decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode("a.jpg", jpeg(photograph(64, 48))).shape == (48, 64, 3)


def test_simplejpeg_is_optional(tmp_path: Path) -> None:
    photograph(32, 24).save(tmp_path / "a.jpg")
    code = (
        "import sys; sys.modules['simplejpeg'] = None\n"
        "from rtresnet.data.decode import decode\n"
        f"print(decode({str(tmp_path / 'a.jpg')!r}).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(24, 32, 3)"


def heic(image: Image.Image, **options: object) -> bytes:
    package = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    package.from_pillow(image).save(out, quality=95, **options)
    return out.getvalue()


def test_decode_heic_with_its_package_shows_the_image() -> None:
    photo = photograph(160, 96)
    pixels = decode("a.heic", heic(photo))
    assert pixels.shape == (96, 160, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.asarray(photo)).mean() < 8


def test_decode_heic_oriented_by_exif_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = photograph(160, 96)
    pixels = decode("a.heic", heic(photo, exif=exif.tobytes()))
    upright = np.rot90(np.asarray(photo), -1)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 8


@pytest.mark.parametrize("size", [13, 100, 0.5])
def test_decode_truncated_heic_is_corrupt(size: float) -> None:
    data = heic(photograph(160, 96))
    end = int(size * len(data)) if size < 1 else int(size)
    with pytest.raises(CorruptImage, match="not an image, or damaged"):
        decode("a.heic", data[:end])


def test_decode_heic_without_its_package_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_register_heic", lambda: False)
    header = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    with pytest.raises(CorruptImage, match="a HEIC image: pip install pillow-heif"):
        decode("IMG_1.jpg", header)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_decode_avif_shows_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    photograph(160, 96).save(out, "AVIF", quality=90)
    assert decode("a.avif", out.getvalue()).shape == (96, 160, 3)
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(CorruptImage, match="an AVIF image: pip install --upgrade pillow"):
        decode("a.avif", out.getvalue()[:60])
