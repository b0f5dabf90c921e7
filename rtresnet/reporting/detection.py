"""The page of a detector's evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.reporting import pages, plots
from rtresnet.reporting.gallery import Tile, tile
from rtresnet.reporting.tables import DataTable

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.workflows.detect_compare import CompareDetectorsResult, DifferingImage
    from rtresnet.workflows.detect_evaluate import EvaluateDetectorResult, ReportedImage


def write_detection(
    folder: Path, result: EvaluateDetectorResult, images: Mapping[int, np.ndarray]
) -> Path:
    """Write the page of a detector's evaluation.

    Args:
        folder: Gets index.html.
        result: With `report`.
        images: Images with boxes, uint8 [H, W, 3], by index.

    Returns:
        The page.

    Raises:
        UnavailableError: matplotlib or Jinja2 is not installed.
    """
    assert result.report is not None
    report = result.report
    notes = []
    if result.unsettled:
        notes.append(f"Non-maximum suppression did not converge for {result.unsettled} boxes.")
    if result.invalid:
        notes.append(f"{result.invalid} boxes of the data have no area and were ignored.")
    numbers = [
        ("AP50", result.ap50), ("AP", result.ap), ("AP75", result.ap75), ("VOC 2007", result.voc07),
        ("small", result.small), ("medium", result.medium), ("large", result.large),
    ]  # fmt: skip
    return pages.write_page(
        folder,
        "detection.html",
        title=f"Evaluation of {Path(result.artifact).name}",
        summary=[
            f"{result.artifact}: {result.precision}, {result.runtime.provider}.",
            f"{result.objects:,} objects in {result.n:,} images of {result.data} ({result.split}).",
        ],
        notes=notes,
        numbers=[(name, _percent(value)) for name, value in numbers],
        classes=_classes(result),
        curves=plots.precision_recall([(c.name, c.precision) for c in report.curves]),
        samples=[_tile(entry, images) for entry in report.samples],
        worst=[_tile(entry, images) for entry in report.worst],
    )


def write_comparison(
    folder: Path, result: CompareDetectorsResult, images: Mapping[int, np.ndarray]
) -> Path:
    """Write the page of the images in which the detections of two detectors differ.

    Args:
        folder: Gets index.html.
        result: Result of the comparison.
        images: Images with boxes, uint8 [H, W, 3], by index.

    Returns:
        The page.

    Raises:
        UnavailableError: Jinja2 is not installed.
    """
    one, other = (Path(e.artifact).name for e in (result.reference, result.candidate))
    summary = [
        f"{result.n:,} images of {result.data} ({result.split}); detections with a score of 0.5 or "
        f"more: {result.both:,} in both, {result.only_reference:,} only in {one}, "
        f"{result.only_candidate:,} only in {other}; {result.changed:,} images differ.",
        f"Green: both. Blue: only {one}. Red: only {other}.",
    ]
    if result.ap_change is not None:
        summary.insert(1, f"AP changes by {result.ap_change:+.2f} points.")
    if len(result.images) < result.changed:
        summary.append(
            f"{len(result.images)} images are shown, sorted by the number of differences."
        )
    return pages.write_page(
        folder, "flips.html", title=f"{other} against {one}", summary=summary,
        tiles=[_differing(entry, images) for entry in result.images],
        nothing="The detections are the same in every image.", large=True,
    )  # fmt: skip


def _differing(entry: DifferingImage, images: Mapping[int, np.ndarray]) -> Tile:
    lines = [f"{len(entry.only_reference)} gone, {len(entry.only_candidate)} new"]
    return tile(images.get(entry.index), f"{len(entry.both)} the same", lines, entry.place)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _classes(result: EvaluateDetectorResult) -> DataTable:
    assert result.report is not None
    counts = {curve.name: curve.objects for curve in result.report.curves}
    rows = [(name, counts[name], result.classes[name] or 0.0) for name in counts]
    rows.sort(key=lambda row: row[2])
    return DataTable(
        headings=("class", "objects", "AP50, %"),
        rows=[(name, count, f"{value:.1f}") for name, count, value in rows],
        about="Average precision at IoU 0.5, by COCO's rules.",
    )


def _tile(entry: ReportedImage, images: Mapping[int, np.ndarray]) -> Tile:
    lines = [f"{len(entry.wrong)} wrong, {len(entry.missed)} missed"]
    return tile(images.get(entry.index), f"{len(entry.correct)} right", lines, entry.place)
