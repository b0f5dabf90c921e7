from __future__ import annotations

import numpy as np
import pytest

from rtresnet.data.loader import Tally
from rtresnet.data.sources import Arrays
from rtresnet.errors import DataError
from rtresnet.preprocess import Preprocess
from rtresnet.train import feed


def numbered(count: int, *, splits: bool = False) -> Arrays:
    """Images whose pixels are their own number."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    return Arrays(
        "numbered", images, np.arange(count), [str(i) for i in range(count)], splits=splits
    )


def epoch_labels(number: int, seed: int = 0, batch: int = 10) -> list[int]:
    source = numbered(100)
    batches = feed.epoch(
        source, np.arange(100), Preprocess.for_size(8),
        batch=batch, seed=seed, number=number, tally=Tally(100),
    )  # fmt: skip
    return [int(label) for _, labels in batches for label in labels]


def test_every_image_comes_once_an_epoch_in_a_new_order() -> None:
    first, second = epoch_labels(0), epoch_labels(1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second != list(range(100))


def test_an_epoch_is_the_same_for_the_same_seed_and_number() -> None:
    assert epoch_labels(3) == epoch_labels(3)
    assert epoch_labels(3) != epoch_labels(3, seed=1)


def test_a_last_partial_batch_is_left_out() -> None:
    assert len(epoch_labels(0, batch=30)) == 90


def test_a_batch_larger_than_the_set_becomes_the_set() -> None:
    assert len(epoch_labels(0, batch=1000)) == 100


def test_the_splits_are_disjoint_and_whole() -> None:
    parts = feed.split(numbered(100), seed=0)
    assert parts.test is not None
    together = np.concatenate([parts.train, parts.val, parts.test])
    assert sorted(together) == list(range(100))
    assert (len(parts.train), len(parts.val), len(parts.test)) == (80, 10, 10)


def test_a_set_with_its_own_test_split_gives_none_of_its_training_images_to_testing() -> None:
    parts = feed.split(numbered(100, splits=True), seed=0)
    assert parts.test is None
    assert (len(parts.train), len(parts.val)) == (90, 10)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        feed.split(numbered(19), seed=0)


def test_random_crops_stay_inside_and_vary_in_place_and_scale() -> None:
    ramp = np.linspace(0, 255, 400).astype(np.uint8)
    image = np.stack([np.tile(ramp, (300, 1))] * 3, axis=2)
    crops = [feed.random_crop(image, 56, np.random.default_rng(seed)) for seed in range(40)]
    assert {crop.shape for crop in crops} == {(56, 56, 3)}
    left = {int(crop[0, 0, 0]) for crop in crops}
    width = {int(crop[0, -1, 0]) - int(crop[0, 0, 0]) for crop in crops}
    assert len(left) > 10 and len(width) > 10
    # Between 224/480 and 224/256 of the shorter side, of 300 pixels, over a ramp of 400 pixels.
    assert min(width) >= 255 / 400 * 300 * 224 / 480 - 6
    assert max(width) <= 255 / 400 * 300 * 224 / 256 + 6


def test_an_image_smaller_than_the_crop_is_enlarged() -> None:
    small = np.zeros((5, 9, 3), np.uint8)
    assert feed.random_crop(small, 32, np.random.default_rng(0)).shape == (32, 32, 3)
