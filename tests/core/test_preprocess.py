from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rtresnet.core.errors import InputError
from rtresnet.core.preprocess import UINT8, Preprocess, resize


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(70, 90), (90, 70), (20, 31)])
def test_resize_is_pillows(name: str, height: int, width: int) -> None:
    image = noise(60, 80)
    expected = Image.fromarray(image).resize((width, height), Image.Resampling[name.upper()])
    assert np.array_equal(resize(image, height, width, name), np.asarray(expected))


def test_resize_returns_writable_contiguous_memory_of_a_view() -> None:
    view = noise(40, 60)[::-1, ::2]
    for height, width in ((20, 15), (40, 30)):
        resized = resize(view, height, width)
        assert resized.flags.c_contiguous and resized.flags.writeable
        assert np.array_equal(resized, resize(np.ascontiguousarray(view), height, width))


def test_crop_uses_the_stated_interpolation() -> None:
    image = noise(90, 120)
    scaled = Image.fromarray(image).resize((53, 40), Image.Resampling.BICUBIC)
    cut = Preprocess(size=32, resize=40, interpolation="bicubic").crop(image)
    assert np.array_equal(cut, np.asarray(scaled)[4:36, 10:42])
    assert not np.array_equal(cut, Preprocess(size=32, resize=40).crop(image))


@pytest.mark.parametrize("value", [0, 1, 254, 255])
def test_resize_keeps_a_flat_image_flat(value: int) -> None:
    flat = np.full((37, 53, 3), value, np.uint8)
    for height, width in ((224, 224), (5, 7), (37, 91)):
        assert (resize(flat, height, width) == value).all()


def test_resize_to_the_same_size_changes_nothing() -> None:
    image = noise(20, 31)
    assert np.array_equal(resize(image, 20, 31), image)


def test_resize_keeps_channels_apart() -> None:
    image = noise(30, 30)
    image[..., 1] = 0
    assert (resize(image, 50, 50)[..., 1] == 0).all()


@pytest.mark.parametrize(
    ("height", "width", "top", "left"),
    [
        (32, 32, 0, 0),
        (32, 40, 0, 4),
        (32, 41, 0, 4),
        (32, 43, 0, 6),
        (48, 32, 8, 0),
        (43, 32, 6, 0),
    ],
)
def test_crop_cuts_the_centre(height: int, width: int, top: int, left: int) -> None:
    image = noise(height, width)
    cut = Preprocess(size=32, resize=32).crop(image)
    assert np.array_equal(cut, image[top : top + 32, left : left + 32])


def test_crop_keeps_the_margin_between_resize_and_size() -> None:
    image = noise(40, 50)
    cut = Preprocess(size=32, resize=40).crop(image)
    assert np.array_equal(cut, image[4:36, 9:41])


@pytest.mark.parametrize(("height", "width"), [(300, 400), (100, 333), (256, 256), (1, 1)])
def test_crop_is_what_pillow_resizes_and_cuts(height: int, width: int) -> None:
    image = noise(height, width)
    scaled = Image.fromarray(image).resize((int(width * 256 / height), 256), Image.BILINEAR)
    left = round((scaled.width - 224) / 2)
    expected = np.asarray(scaled.crop((left, 16, left + 224, 240)))
    assert np.array_equal(Preprocess.for_size(224).crop(image), expected)


@pytest.mark.parametrize(("height", "width"), [(7, 90), (90, 7), (33, 32), (500, 375)])
def test_every_shape_ends_as_the_square_the_net_takes(height: int, width: int) -> None:
    cut = Preprocess(size=32, resize=36).crop(noise(height, width))
    assert cut.shape == (32, 32, 3)
    assert cut.dtype == np.uint8


def test_normalize_is_the_formula() -> None:
    images = np.stack([noise(9, 9, seed) for seed in range(3)])
    contract = Preprocess(size=9, resize=9, mean=(0.1, 0.5, 0.9), std=(0.2, 1.0, 0.05))
    plain = (images / 255 - np.array(contract.mean)) / np.array(contract.std)
    normalized = contract.normalize(images)
    assert np.allclose(normalized, plain.transpose(0, 3, 1, 2), rtol=0, atol=4e-6)


def test_normalize_returns_contiguous_float32_nchw_even_of_a_view() -> None:
    images = noise(16, 20)[None, ::2, ::-1].repeat(2, axis=0)
    normalized = Preprocess(size=8, resize=8).normalize(images)
    assert normalized.shape == (2, 3, 8, 20)
    assert normalized.dtype == np.float32
    assert normalized.flags.c_contiguous


def test_normalize_of_black_and_white_is_the_range_of_the_channel() -> None:
    contract = Preprocess(size=1, resize=1, mean=(0, 0.5, 1), std=(1, 0.5, 0.25))
    normalized = contract.normalize(np.array([[[[0, 0, 0]]], [[[255, 255, 255]]]], np.uint8))
    assert normalized[0].ravel() == pytest.approx([0, -1, -4])
    assert normalized[1].ravel() == pytest.approx([1, 1, 0])


def test_prepare_stops_where_the_file_takes_over() -> None:
    images = noise(8, 8)[None]
    plain = Preprocess(size=8, resize=8)
    assert np.array_equal(plain.prepare(images), plain.normalize(images))
    pixels = Preprocess(size=8, resize=8, layout=UINT8)
    assert pixels.prepare(images) is images
    assert np.array_equal(pixels.normalize(images), plain.normalize(images))


@pytest.mark.parametrize(("size", "margin"), [(224, 256), (32, 32), (64, 64), (299, 342)])
def test_the_customary_margin_starts_above_64_pixels(size: int, margin: int) -> None:
    assert Preprocess.for_size(size).resize == margin


def test_for_size_passes_the_rest_on() -> None:
    contract = Preprocess.for_size(32, mean=(0, 0, 0), std=(1, 1, 1))
    assert (contract.size, contract.mean, contract.std) == (32, (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"size": 0, "resize": 0}, "input size 0"),
        ({"size": -3}, "input size -3"),
        ({"resize": 31}, "resize 31"),
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"layout": "NHWC BGR uint8"}, "NHWC BGR uint8"),
        ({"mean": (0.5,)}, "three values"),
        ({"std": (0.5, 0.5, 0.5, 0.5)}, "three values"),
        ({"std": (1.0, 0.0, 1.0)}, "std positive"),
        ({"std": (1.0, -1.0, 1.0)}, "std positive"),
        ({"mean": (float("nan"), 0, 0)}, "must be finite"),
        ({"std": (1.0, 1.0, float("inf"))}, "must be finite"),
    ],
)
def test_a_contract_no_net_can_have_is_refused(change: dict[str, object], names: str) -> None:
    with pytest.raises(InputError, match=names):
        Preprocess(**({"size": 32, "resize": 32} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_what_is_no_rgb_image_is_said(image: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"uint8 RGB \[H, W, 3\]") as caught:
        Preprocess.for_size(32).crop(image)
    # The way out must not drop an alpha channel, as Pillow's convert("RGB") does.
    assert caught.value.fix is not None and "rtresnet.data.decode.decode" in caught.value.fix
    with pytest.raises(InputError, match=r"\[N, H, W, 3\]"):
        Preprocess.for_size(32).normalize(image)


def test_normalize_of_float_images_is_refused() -> None:
    images = np.ones((1, 4, 4, 3), np.float32)  # already divided by 255
    with pytest.raises(InputError, match=r"float32 \[1, 4, 4, 3\].*uint8"):
        Preprocess.for_size(4).normalize(images)
