"""Accuracy of anything that maps images to logits: a torch net, an ONNX file, a plan.

Imports no torch, so that it serves the runtime's artifacts on a machine without it.
"""

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
    batch: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    tally: loader.DecodeErrors | None = None,
) -> metrics.Accuracy:
    """Runs every image once, single centre crop, and counts hits.

    Raises:
        DataError: No labels, none decodable, or more than 1 % broken.
    """
    require_labels(source)
    found = loader.batches(
        source,
        preprocess,
        batch or loader.batch_size(preprocess),
        indices=indices,
        tally=tally,
    )
    counts: list[metrics.Accuracy] = []
    for images, labels in found:
        counts.append(count(forward(images), labels, source))
    if not counts:
        raise DataError(f"{source.name}: no image could be evaluated")
    return metrics.together(counts)


def require_labels(source: Source) -> None:
    """Raises DataError where images have no labels."""
    if len(source.labels) and source.labels.min() < 0:
        raise DataError(f"{source.name}: has no labels")


def count(scores: np.ndarray, labels: np.ndarray, source: Source) -> metrics.Accuracy:
    """Hits of scores [N, classes] against labels [N] of `source`.

    Raises:
        DataError: A label beyond the classes.
    """
    if labels.max() >= scores.shape[1]:
        raise DataError(
            f"{source.name}: has label {labels.max()}, and the net only {scores.shape[1]} classes"
        )
    return metrics.accuracy(scores, labels)
