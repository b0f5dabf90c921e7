"""The page of a detector's evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core import atomic_io, provenance
from rtresnet.reporting import pages, plots
from rtresnet.reporting.gallery import Tile, tile
from rtresnet.reporting.tables import DataTable

if TYPE_CHECKING:
    import numpy as np

    from rtresnet.workflows.detect_evaluate import (
        EvaluateDetectorResult,
        PrecisionRecallCurve,
        ReportedImage,
    )

CURVES = 20  # up to so many classes have a curve each


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
        notes.append(f"Non-maximum suppression was not finished for {result.unsettled} boxes.")
    if result.invalid:
        notes.append(f"{result.invalid} boxes of the data have no area and were left out.")
    numbers = [
        ("AP50", result.ap50), ("AP", result.ap), ("AP75", result.ap75), ("VOC 2007", result.voc07),
        ("small", result.small), ("medium", result.medium), ("large", result.large),
    ]  # fmt: skip
    text = pages.render(
        "detection.html",
        title=f"Evaluation of {Path(result.artifact).name}",
        summary=[
            f"{result.artifact}: {result.precision}, {result.runtime.provider}.",
            f"{result.objects:,} objects in {result.n:,} images of {result.data} ({result.split}).",
        ],
        notes=notes,
        numbers=[(name, _percent(value)) for name, value in numbers],
        classes=_classes(result),
        curves=precision_recall(report.curves),
        samples=[_tile(entry, images) for entry in report.samples],
        worst=[_tile(entry, images) for entry in report.worst],
        command=provenance.command_line(),
    )
    atomic_io.write_text(folder / "index.html", text)
    return folder / "index.html"


def precision_recall(curves: Sequence[PrecisionRecallCurve]) -> str:
    """Precision against recall as SVG, a line for each class."""
    drawing, axes = plots.figure(6.4, 3.8)
    for index, curve in enumerate(curves[:CURVES]):
        axes.plot(
            range(101), [100 * value for value in curve.precision], linewidth=1.5,
            color=plots.PALETTE[index % len(plots.PALETTE)], label=plots.plain(curve.name),
        )  # fmt: skip
    axes.set(xlabel="recall, %", ylabel="precision, %", xlim=(0, 100), ylim=(0, 103))
    if curves:
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower left")
    return plots.svg(drawing, "precision against recall")


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
    return tile(images.get(entry.index), f"{len(entry.found)} right", lines, entry.place)
