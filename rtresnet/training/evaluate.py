"""Accuracy on labelled images with a single centre crop. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rtresnet.core import metrics
from rtresnet.core.errors import DataError
from rtresnet.core.preprocess import Preprocess
from rtresnet.data import loader
from rtresnet.data.sources import Source


def evaluate(
    forward: metrics.Forward,
    source: Source,
    preprocess: Preprocess,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    tally: loader.DecodeErrors | None = None,
) -> metrics.Accuracy:
    """Measure accuracy with a single centre crop per image.

    Raises:
        DataError: No labels, no decodable image, or more broken images than `tally` tolerates.
    """
    require_labels(source)
    size = loader.batch_size(preprocess)
    batches = loader.batches(source, preprocess, size, indices=indices, tally=tally)
    counts = [metrics.accuracy(forward(images), labels) for images, labels in batches]
    if not counts:
        raise DataError(f"{source.name}: no image could be decoded")
    return metrics.together(counts)


def require_labels(source: Source) -> None:
    """Raise DataError if images have no labels."""
    if len(source.labels) and source.labels.min() < 0:
        raise DataError(
            f"{source.name}: has no labels", fix="sort the images into one folder per class"
        )
