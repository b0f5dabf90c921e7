from __future__ import annotations

import numpy as np
import pytest

from rtresnet.core.errors import DataError
from rtresnet.core.preprocess import Preprocess
from rtresnet.data.sources import Arrays
from rtresnet.training.evaluate import evaluate


def source(count: int, classes: int) -> Arrays:
    images = np.zeros((count, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return Arrays("s", images, np.arange(count) % classes, [str(i) for i in range(classes)])


def oracle(classes: int, wrong: set[int] = frozenset()):  # type: ignore[no-untyped-def, assignment]
    """Reads the number painted into the first pixel, so that it can be right or wrong at will."""
    preprocess = Preprocess.for_size(8, mean=(0, 0, 0), std=(1, 1, 1))

    def forward(images: np.ndarray) -> np.ndarray:
        numbers = np.rint(images[:, 0, 0, 0] * 255).astype(int)
        labels = np.where(np.isin(numbers, list(wrong)), numbers + 1, numbers) % classes
        return np.eye(classes, dtype=np.float32)[labels]

    return forward, preprocess


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_every_image_counts_once_whatever_the_batch(batch: int) -> None:
    forward, preprocess = oracle(10, wrong={3, 50})
    result = evaluate(forward, source(100, 10), preprocess, batch=batch)
    assert (result.n, result.top1) == (100, 98)


def test_five_classes_have_no_top5() -> None:
    forward, preprocess = oracle(5)
    assert evaluate(forward, source(10, 5), preprocess).top5 is None


def test_only_the_chosen_images_are_counted() -> None:
    forward, preprocess = oracle(10, wrong={1})
    result = evaluate(forward, source(100, 10), preprocess, indices=np.array([1, 2, 3]))
    assert (result.n, result.top1) == (3, 2)


def test_labels_beyond_the_nets_classes_are_refused() -> None:
    forward, preprocess = oracle(4)
    with pytest.raises(DataError, match="label 9"):
        evaluate(forward, source(10, 10), preprocess)


def test_images_without_labels_are_refused() -> None:
    forward, preprocess = oracle(4)
    unlabelled = Arrays("u", np.zeros((3, 8, 8, 3), np.uint8), np.full(3, -1), ())
    with pytest.raises(DataError, match="no labels"):
        evaluate(forward, unlabelled, preprocess)
