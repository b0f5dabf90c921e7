"""Near-duplicates: planted copies are found, other images are not."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from rtresnet.core.preprocess import resize
from rtresnet.data.sources import Arrays, open_source
from rtresnet.workflows.duplicates import Hashes, fingerprint, near_pairs


def scenes(count: int, seed: int = 0, side: int = 32) -> np.ndarray:
    """Smooth random pictures with a few edges, uint8 [count, side, side, 3]."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture).copy()
        top, left = rng.integers(0, side // 2, 2)
        pixels[top : top + side // 3, left : left + side // 2] = rng.integers(0, 256, 3)
        images.append(pixels)
    return np.stack(images)


def source(images: list[np.ndarray]) -> Arrays:
    class Mixed(Arrays):  # images of several sizes
        def __init__(self) -> None:
            labels = np.zeros(len(images), np.int64)
            super().__init__("mixed", np.zeros((len(images), 1, 1, 3), np.uint8), labels, ("a",))

        def image(self, index: int, at_least: int | None = None) -> np.ndarray:
            return images[index]

    return Mixed()


def hashes(images: list[np.ndarray]) -> Hashes:
    return Hashes.of(source(images), {n: fingerprint(image) for n, image in enumerate(images)})


def recompressed(quality: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(pixels: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file).convert("RGB"))

    return change


def resized(side: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pixels: np.asarray(
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    )


def brighter(pixels: np.ndarray) -> np.ndarray:
    return (pixels * 0.9 + 20).astype(np.uint8)


@pytest.mark.parametrize(
    "change", [recompressed(90), recompressed(40), resized(48), resized(20), brighter]
)
def test_near_pairs_planted_copies_are_all_found_and_nothing_else(
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    images = list(scenes(120))
    copies = [change(images[index]) for index in range(0, 120, 6)]
    expected = [(index, 120 + place) for place, index in enumerate(range(0, 120, 6))]
    assert near_pairs(hashes(images + copies)) == expected
    across = near_pairs(hashes(images), hashes(copies))
    assert across == [(a, b - 120) for a, b in expected]


def test_near_pairs_other_images_none() -> None:
    assert near_pairs(hashes(list(scenes(300)))) == []
    assert near_pairs(hashes(list(scenes(200))), hashes(list(scenes(200, seed=1)))) == []


def test_near_pairs_images_without_contrast_are_no_duplicates() -> None:
    assert near_pairs(hashes([np.full((32, 32, 3), 99, np.uint8)] * 3000)) == []


def test_near_pairs_copies_of_copies_name_the_first() -> None:
    first, other = scenes(2)
    assert near_pairs(hashes([first, other, first, brighter(first)])) == [(0, 2), (0, 3)]


def scans(count: int, seed: int = 0) -> np.ndarray:
    """Return strokes of one shape in 8x8 pixels of 17 levels, enlarged: alike, but no copies."""
    rng = np.random.default_rng(seed)
    stroke = np.zeros((8, 8))
    stroke[1:7, 3:5] = stroke[1:3, 2:6] = 14
    small = np.clip(stroke + rng.normal(0, 1.2, (count, 8, 8)), 0, 16).round()
    levels = (small * 255 / 16).astype(np.uint8)
    return np.stack([resize(np.repeat(image[..., None], 3, 2), 32, 32) for image in levels])


@pytest.mark.parametrize("change", [recompressed(90), recompressed(40), resized(64), brighter])
def test_near_pairs_of_scans_are_the_planted_copies_only(
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    images = list(scans(150))
    own = hashes(images)
    assert own.coarse.all()
    thumbnails = np.stack([resize(image, 8, 8)[..., 0].ravel() for image in images])
    alike = np.corrcoef(thumbnails.astype(float))[np.triu_indices(150, 1)]
    assert (alike > 0.97).sum() > 50  # they would be pairs by the rule for photographs
    assert near_pairs(own) == []
    copies = [change(image) for image in images[::10]]
    assert near_pairs(own, hashes(copies)) == [(10 * n, n) for n in range(15)]


def test_near_pairs_a_small_copy_of_a_detailed_image_is_found() -> None:
    images = list(scenes(60))
    copies = [resized(12)(image) for image in images]
    assert hashes(copies).coarse.sum() > 10 and not hashes(images).coarse.any()
    assert near_pairs(hashes(images), hashes(copies)) == [(n, n) for n in range(60)]


def test_near_pairs_digits_without_copies() -> None:
    pytest.importorskip("sklearn")
    digits = open_source("digits")
    result = Hashes.of(digits, {n: fingerprint(digits.image(n)) for n in range(len(digits))})
    assert near_pairs(result) == []
