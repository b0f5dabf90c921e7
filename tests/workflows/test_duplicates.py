"""Near-duplicates: planted copies are found, other images are not."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from rtresnet.data.sources import Arrays
from rtresnet.workflows.duplicates import Hashes, near_pairs, perceptual_hash


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
    bits = np.stack([perceptual_hash(image) for image in images])
    return Hashes(source=source(images), indices=np.arange(len(images)), bits=bits)


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
