"""Accuracy of anything that maps images to logits: a torch net, an ONNX file, a plan.

Imports no torch, so that it serves the runtime's artifacts on a machine without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rtresnet import metrics
from rtresnet.data import loader
from rtresnet.data.sources import Source
from rtresnet.errors import DataError
from rtresnet.preprocess import Preprocess


def evaluate(
    forward: metrics.Forward,
    source: Source,
    preprocess: Preprocess,
    *,
    batch: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    tally: loader.Tally | None = None,
) -> metrics.Accuracy:
    """Runs every image once, single centre crop, and counts hits.

    Raises:
        DataError: No labels, none decodable, or more than 1 % broken.
    """
    if len(source.labels) and source.labels.min() < 0:
        raise DataError(f"{source.name}: has no labels")
    found = loader.batches(
        source,
        preprocess,
        batch or loader.batch_size(preprocess),
        indices=indices,
        tally=tally,
    )
    counts: list[metrics.Accuracy] = []
    for images, labels in found:
        logits = forward(images)
        if labels.max() >= logits.shape[1]:
            raise DataError(
                f"{source.name}: has label {labels.max()}, and the net only {logits.shape[1]} "
                "classes"
            )
        counts.append(metrics.accuracy(logits, labels))
    if not counts:
        raise DataError(f"{source.name}: no image could be evaluated")
    top5 = None if counts[0].top5 is None else sum(count.top5 or 0 for count in counts)
    return metrics.Accuracy(
        n=sum(count.n for count in counts), top1=sum(count.top1 for count in counts), top5=top5
    )
