"""Classify a finished run's test images for its page."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from rtresnet.core import reporter
from rtresnet.core.classification import ClassificationReport, Collector
from rtresnet.core.reporter import Reporter
from rtresnet.workflows.loading import RuntimeConfig, load_artifact

if TYPE_CHECKING:
    from rtresnet.data.sources import Source
    from rtresnet.workflows.train import TrainResult


def classify_test_images(
    result: TrainResult, *, reporter: Reporter = reporter.DEFAULT
) -> tuple[ClassificationReport, Source]:
    """Classify the test images of a run with its best weights, in float32.

    Args:
        result: Result of a finished run.
        reporter: Receives progress.

    Returns:
        The report, and the images to which its indices belong.

    Raises:
        DataError: The images cannot be read any more.
    """
    from rtresnet.workflows.views import evaluate_views

    source = _test_images(result)
    collector = Collector(source.classes)
    with contextlib.closing(load_artifact(str(result.checkpoint), RuntimeConfig())) as session:
        doing = "classifying the test images for the page"
        with reporter.progress(doing, total=len(source)) as update:
            evaluate_views([session], source, on_images=update, on_scores=collector.add)
    return collector.report(source.locate), source


def _test_images(result: TrainResult) -> Source:
    """Return the run's test images without broken ones: the test split or the held-out part."""
    from rtresnet.data.sources import Subset, open_source
    from rtresnet.models import checkpoint

    data = checkpoint.load(result.checkpoint).training["data"]
    source = open_source(data, "test")
    if not source.splits:
        return open_source(f"run:{result.checkpoint.parent}", "test")
    broken = result.images.broken.get("test", []) if result.images else []
    return Subset(source, np.setdiff1d(np.arange(len(source)), broken))
