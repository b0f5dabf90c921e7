from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from rtresnet.data import trivial

NAMES = [getattr(operation, "__name__", "_identity") for operation in trivial.OPERATIONS]


def photograph(seed: int = 0, side: int = 32) -> np.ndarray:
    """Smooth colours with a little noise: every operation does something to it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    planes = [60 + 120 * x, 40 + 90 * y, 200 - 100 * x * y]
    return (np.stack(planes, axis=2) + rng.integers(0, 20, (side, side, 3))).astype(np.uint8)


def applied(name: str, strength: float, sign: float = 1.0) -> np.ndarray:
    images = torch.from_numpy(photograph()).permute(2, 0, 1)[None]
    drawn = np.array([[NAMES.index(name), strength, sign]])
    result = trivial.trivial_augment(images, drawn)
    assert result.dtype == torch.float32 and result.shape == images.shape
    return result[0].permute(1, 2, 0).numpy()


PILLOWS = {
    "_brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.495),
    "_colour": lambda image: ImageEnhance.Color(image).enhance(1.495),
    "_contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.495),
    "_sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(1.495),
    "_posterize": lambda image: ImageOps.posterize(image, 5),
    "_solarize": lambda image: ImageOps.solarize(image, 128),
    "_autocontrast": ImageOps.autocontrast,
    "_equalize": ImageOps.equalize,
    "_rotate": lambda image: image.rotate(-67.5, Image.Resampling.BILINEAR),
    "_translate_x": lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, 16 / 3, 0, 1, 0), Image.Resampling.BILINEAR
    ),
    "_shear_x": lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0.495, -0.495 * 16, 0, 1, 0),
        Image.Resampling.BILINEAR,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PILLOWS)
def test_at_half_strength_an_operation_is_pillows(name: str) -> None:
    expected = np.asarray(PILLOWS[name](Image.fromarray(photograph()))).astype(float)
    ours = applied(name, 0.5)
    changed = np.abs(expected - photograph()).mean()
    assert changed > 1  # it does something
    # Pillow rounds to whole levels on the way; at the edges of moved images it samples otherwise.
    inner = (slice(8, -8), slice(8, -8))
    moved = name in ("_rotate", "_translate_x", "_shear_x")
    difference = np.abs(ours - expected)[inner] if moved else np.abs(ours - expected)
    assert difference.mean() < 1.0, difference.mean()


def test_the_vertical_operations_are_the_horizontal_ones_turned() -> None:
    for across, down in (("_shear_x", "_shear_y"), ("_translate_x", "_translate_y")):
        image = torch.from_numpy(photograph()).permute(2, 0, 1)[None]
        turned = trivial.trivial_augment(
            image.transpose(2, 3), np.array([[NAMES.index(across), 0.4, -1.0]])
        )
        result = trivial.trivial_augment(image, np.array([[NAMES.index(down), 0.4, -1.0]]))
        assert torch.allclose(result, turned.transpose(2, 3), atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_every_operation_stays_in_range_at_its_ends(
    name: str, strength: float, sign: float
) -> None:
    result = applied(name, strength, sign)
    assert np.isfinite(result).all() and result.min() >= 0 and result.max() <= 255


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"_autocontrast", "_equalize", "_solarize"}))
def test_no_strength_changes_nothing(name: str) -> None:
    assert np.abs(applied(name, 0.0) - photograph()).max() < 0.01


def test_flat_images_survive() -> None:
    flat = torch.full((len(NAMES), 3, 8, 8), 77, dtype=torch.uint8)
    drawn = np.array([[index, 0.5, 1.0] for index in range(len(NAMES))])
    assert torch.isfinite(trivial.trivial_augment(flat, drawn)).all()


def test_each_image_gets_its_own_and_all_operations_and_strengths_are_drawn() -> None:
    drawn = trivial.draw(np.random.default_rng(0), 5000)
    counts = np.bincount(drawn[:, 0].astype(int), minlength=len(NAMES))
    assert len(counts) == 14 and counts.min() > 250
    assert len(np.unique(drawn[:, 1])) == trivial.LEVELS
    images = torch.from_numpy(photograph()).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    pair = trivial.trivial_augment(
        images, np.array([[0, 0.5, 1.0], [NAMES.index("_solarize"), 0.5, 1.0]])
    )
    assert torch.equal(pair[0], images[0].float()) and not torch.equal(pair[1], pair[0])
