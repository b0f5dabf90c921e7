"""Figures, tables and galleries of a classifier's results for pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rtresnet.core.classification import ClassificationReport, Proportion, ScoredImage
from rtresnet.reporting import plots
from rtresnet.reporting.gallery import Tile, tile
from rtresnet.reporting.tables import DataTable

MATRIX_CLASSES = 20  # up to this number of classes the whole confusion matrix is shown
LISTED = 30  # rows of the tables; --json has all
FAINTEST = 0.35  # lowest opacity of a cell, so that a single image is visible


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of the confusion matrix.

    Attributes:
        n: Number of images.
        share: Share of the row's images, in [0, 1]; 0 for an empty cell.
        hint: The cell in words.
    """

    n: int
    share: float
    hint: str


@dataclass(frozen=True, kw_only=True)
class ClassificationView:
    """Values of a `ClassificationReport` for the templates.

    Attributes:
        report: The report.
        classes: A row for each class, the lowest recall first.
        matrix: Rows of cells; empty with many classes.
        confusions: The most frequent wrong predictions.
        reliability: The reliability diagram as SVG.
        calibration: A sentence on the confidence.
        mistakes: Gallery of the most confident mistakes.
        uncertain: Gallery of the least certain images.
    """

    report: ClassificationReport
    classes: DataTable
    matrix: list[tuple[str, list[Cell]]]
    confusions: DataTable
    reliability: str
    calibration: str
    mistakes: list[Tile]
    uncertain: list[Tile]


def view(report: ClassificationReport, images: Mapping[int, np.ndarray]) -> ClassificationView:
    """Prepare a report for a page.

    Args:
        report: The report of `evaluate`.
        images: Thumbnails, uint8 [H, W, 3], by the index of the image; see `listed`.

    Returns:
        The values for the templates.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    return ClassificationView(
        report=report,
        classes=_classes(report),
        matrix=_matrix(report) if len(report.classes) <= MATRIX_CLASSES else [],
        confusions=_confusions(report),
        reliability=plots.reliability(report),
        calibration=_calibration(report),
        mistakes=[_tile(image, images) for image in report.mistakes],
        uncertain=[_tile(image, images) for image in report.uncertain],
    )


def listed(report: ClassificationReport) -> list[int]:
    """Return the indices of the images that the galleries show."""
    return sorted({image.index for image in (*report.mistakes, *report.uncertain)})


def percent(share: Proportion) -> str:
    """Format a share as "93.10 % (89.02 to 95.80)", with the 95 % interval; "-" without images."""
    if share.percent is None:
        return "-"
    return f"{share.percent:.2f} % ({share.low:.2f} to {share.high:.2f})"


def _classes(report: ClassificationReport) -> DataTable:
    scored = [score for score in report.classes if score.recall.n]
    scored.sort(key=lambda score: score.recall.percent or 0.0)
    rows = [
        (score.name, score.recall.n, percent(score.recall), percent(score.precision),
         score.f1)
        for score in scored[:LISTED]
    ]  # fmt: skip
    more = f" The {LISTED} with the lowest recall of {len(scored)}." if len(scored) > LISTED else ""
    return DataTable(
        headings=("class", "images", "recall, 95 % interval", "precision, 95 % interval", "F1"),
        rows=rows,
        about="Recall: share of the class's images that are predicted as the class. Precision: "
        f"share of the images predicted as the class that belong to it.{more}",
    )


def _matrix(report: ClassificationReport) -> list[tuple[str, list[Cell]]]:
    names, matrix = [score.name for score in report.classes], report.matrix()
    rows = []
    for label, row in enumerate(matrix.tolist()):
        total = sum(row)
        rows.append(
            (
                names[label],
                [
                    Cell(
                        n=n,
                        share=max(FAINTEST, n / total) if n else 0.0,
                        hint=f"{n} of {total} images of {names[label]} are predicted as "
                        f"{names[predicted]}",
                    )
                    for predicted, n in enumerate(row)
                ],
            )
        )
    return rows


def _confusions(report: ClassificationReport) -> DataTable:
    totals = [score.recall.n for score in report.classes]
    names = [score.name for score in report.classes]
    wrong = [entry for entry in report.confusion if entry.label != entry.predicted]
    return DataTable(
        headings=("class", "predicted as", "images", "% of the class"),
        rows=[
            (names[e.label], names[e.predicted], e.n, f"{100 * e.n / totals[e.label]:.1f}")
            for e in wrong[:LISTED]
        ],
        about=f"The {LISTED} most frequent of {len(wrong)}." if len(wrong) > LISTED else "",
    )


def _calibration(report: ClassificationReport) -> str:
    total = sum(entry.n * (entry.confidence or 0.0) for entry in report.bins)
    confidence, accuracy = 100 * total / report.n, report.top1.percent or 0.0
    gap = confidence - accuracy
    verdict = "correct on average" if abs(gap) < 1 else "too high" if gap > 0 else "too low"
    return (
        f"The mean confidence is {confidence:.1f} % and the accuracy {accuracy:.1f} %: the "
        f"confidence is {verdict}. Expected calibration error {100 * report.ece:.2f} points over "
        f"{len(report.bins)} bins."
    )


def _tile(image: ScoredImage, images: Mapping[int, np.ndarray]) -> Tile:
    wrong = image.predicted != image.label
    line = f"{100 * image.probability:.1f} %"
    if wrong:
        line += f"; {image.label} {100 * image.label_probability:.1f} %"
    title = f"{image.predicted} instead of {image.label}" if wrong else image.predicted
    return tile(images.get(image.index), title, (line,), image.place)
