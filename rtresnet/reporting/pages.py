"""HTML pages and Markdown from the templates in `templates/`.

HTML and SVG templates escape every value; only figures, which `plots` and `engine_layers` draw, are
inserted as they are.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rtresnet.core import atomic_io, hardware, provenance
from rtresnet.core.errors import missing_package
from rtresnet.reporting import classification, plots, tables
from rtresnet.reporting.gallery import Tile, tile
from rtresnet.reporting.tables import DataTable
from rtresnet.workflows.train_text import data_lines, data_warnings, recipe_lines

if TYPE_CHECKING:
    import numpy as np
    from jinja2 import Environment
    from matplotlib.figure import Figure

    from rtresnet.core.classification import ClassificationReport
    from rtresnet.core.flips import Flip
    from rtresnet.workflows.data import AugmentedBatch, DataInspectResult, DuplicatePair, ImageRef
    from rtresnet.workflows.evaluate import EvaluateResult
    from rtresnet.workflows.train import RunAccuracy, TrainResult


def render(template: str, **values: object) -> str:
    """Render a template.

    Args:
        template: Its name, as in "report.html".
        **values: Its variables; a missing one is an error.

    Raises:
        UnavailableError: Jinja2 is not installed.
    """
    text = _environment().get_template(template).render(values)
    return text.rstrip("\n") + "\n"


def require_packages() -> None:
    """Check that pages with figures can be written, before the work starts.

    Raises:
        UnavailableError: matplotlib or Jinja2 is not installed.
    """
    for package in ("matplotlib", "jinja2"):
        if not hardware.installed(package):
            raise missing_package(package, "a page")


@functools.cache
def _environment() -> Environment:
    try:
        import jinja2
    except ImportError:
        raise missing_package("jinja2", "a page") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: not str(name).endswith(".md"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": tables.text, "plain": _plain, "markdown": markdown}
    return environment


def markdown(table: DataTable) -> str:
    """Return a table as GitHub reads it; columns of numbers are aligned right."""
    lines = [
        "| " + " | ".join(map(_plain, table.headings)) + " |",
        "|" + "|".join("---:" if right else "---" for right in table.numeric_columns) + "|",
        *("| " + " | ".join(_plain(tables.text(cell)) for cell in row) + " |"
          for row in table.rows),
    ]  # fmt: skip
    return "\n".join(lines)


def _plain(words: str) -> str:
    """Escape characters that Markdown would read as markup."""
    for mark in ("\\", "|", "<", "`", "*", "_"):
        words = words.replace(mark, "&lt;" if mark == "<" else f"\\{mark}")
    return words.replace("\n", " ")


def write_page(folder: Path, template: str, **values: object) -> Path:
    """Render a template as index.html in a folder, with the command that makes it.

    Returns:
        The page.
    """
    page = folder / "index.html"
    atomic_io.write_text(page, render(template, command=provenance.command_line(), **values))
    return page


def write_training(
    result: TrainResult,
    report: ClassificationReport | None = None,
    images: Mapping[int, np.ndarray] | None = None,
) -> Path:
    """Write a training run's curves.png and index.html into its folder.

    Args:
        result: Result of a run whose folder has log.jsonl.
        report: On the run's test images; None leaves it out.
        images: Thumbnails, uint8 [H, W, 3], by index; those of `classification.listed`.

    Returns:
        The page.

    Raises:
        UnavailableError: matplotlib or Jinja2 is not installed.
    """
    folder = result.log.parent
    lines = result.log.read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    figure = plots.training_figure(log)
    plots.save_png(figure, folder / "curves.png")
    columns = {
        "epoch": "epoch", "step": "step", "loss": "loss", "lr": "learning rate", "side": "side",
        "train_top1": "train top-1 %", "val_top1": "val top-1 %", "images_per_second": "images/s",
    }  # fmt: skip
    epochs = DataTable(
        headings=list(columns.values()),
        rows=[[entry[name] for name in columns] for entry in log],
    )
    return write_page(
        folder,
        "training.html",
        title=result.title,
        kept=_kept_weights(result.measured),
        warnings=data_warnings(result.images) if result.images else [],
        curve=plots.svg(figure, "training and held-out error against epochs"),
        progress=plots.svg(plots.progress_figure(log), "loss and images per second"),
        view=None if report is None else classification.view(report, images or {}),
        images="\n".join(data_lines(result.images)) if result.images else None,
        recipe="\n".join(recipe_lines(result.recipe)),
        epochs=epochs,
    )


def _kept_weights(measured: RunAccuracy) -> str:
    """Describe the weights that a run keeps: their epoch and accuracy."""
    accuracies = []
    if measured.val_top1 is not None:
        accuracies.append(f"{measured.val_top1:.2f} % of {measured.val_n} held-out images")
    accuracies.append(f"{measured.test_top1:.2f} % of {measured.test_n} test images")
    if measured.test_top5 is not None:
        accuracies[-1] += f" (top-5 {measured.test_top5:.2f} %)"
    statistics = ""
    if measured.bn_images:
        statistics = f" Batch norm's statistics are those of {measured.bn_images:,} images."
    return f"Epoch {measured.epoch} is kept: top-1 {' and '.join(accuracies)}.{statistics}"


def write_evaluation(
    folder: Path, result: EvaluateResult, images: Mapping[int, np.ndarray]
) -> Path:
    """Write the page of an evaluation.

    Args:
        folder: Gets index.html.
        result: With `report`.
        images: Thumbnails, uint8 [H, W, 3], by index; those of `classification.listed`.

    Returns:
        The page.

    Raises:
        UnavailableError: matplotlib or Jinja2 is not installed.
    """
    assert result.report is not None
    split = "" if result.split == "all" else f" ({result.split})"
    summary = [
        f"{member.artifact}: {member.precision}, {member.runtime.provider}; {member.shown}."
        for member in result.members
    ]
    if len(result.members) > 1:
        summary.append("Ensemble: mean of the probabilities.")
    summary.append(f"{result.n:,} images of {result.data}{split}.")
    notes = [f"Note: {line}." for line in result.labels.remarks]
    notes += [f"Assumed: {line}." for line in result.assumed]
    if result.skipped:
        notes.append(f"{len(result.skipped)} images cannot be decoded and are ignored.")
    return write_page(
        folder,
        "evaluation.html",
        title=f"Evaluation of {Path(result.artifact).name}",
        summary=summary,
        notes=notes,
        view=classification.view(result.report, images),
    )


PAIRS = 24  # largest number of duplicates on a data set's page


def write_data(
    folder: Path,
    result: DataInspectResult,
    images: Mapping[tuple[str, int], np.ndarray],
    augmented: AugmentedBatch | None = None,
) -> Path:
    """Write the page of a data set.

    Args:
        folder: Gets index.html.
        result: The result of `inspect_data`.
        images: Thumbnails, uint8 [H, W, 3], by split and index; those of `data_images`.
        augmented: Training images as the net receives them; None leaves them out.

    Returns:
        The page.

    Raises:
        UnavailableError: Jinja2 is not installed.
    """

    def reference(image: ImageRef, title: str, *lines: str) -> Tile:
        return tile(images.get((image.split, image.index)), title, lines, image.place)

    duplicates = [
        ("identical" if pair.exact else "near-duplicate",
         [reference(image, image.split, image.label) for image in (pair.first, pair.second)])
        for pair in _shown_pairs(result)
    ]  # fmt: skip
    sizes = DataTable(
        headings=("split", "side", "smallest", "5 %", "median", "95 %", "largest"),
        rows=[
            (split.name, side, *values)
            for split in result.splits
            for side, values in (("width", split.widths), ("height", split.heights))
            if values
        ],
        about="In pixels.",
    )
    batch = [] if augmented is None else [
        tile(pixels, label if label == other else f"{label} + {other}")
        for pixels, label, other in zip(
            augmented.pixels, augmented.labels, augmented.mixed, strict=True
        )
    ]  # fmt: skip
    return write_page(
        folder,
        "data.html",
        title=f"Images of {result.data}",
        result=result,
        largest=max((max(split.counts, default=0) for split in result.splits), default=0),
        sizes=sizes,
        duplicates=duplicates,
        samples=[
            (split.name, [reference(image, image.label) for image in split.samples])
            for split in result.splits
        ],
        batch=batch,
        augmented=augmented,
    )


def data_images(result: DataInspectResult) -> dict[str, list[int]]:
    """Return the indices of the images that `write_data` shows, by split."""
    shown = [image for split in result.splits for image in split.samples]
    shown += [image for pair in _shown_pairs(result) for image in (pair.first, pair.second)]
    return {
        split.name: sorted({image.index for image in shown if image.split == split.name})
        for split in result.splits
    }


def _shown_pairs(result: DataInspectResult) -> list[DuplicatePair]:
    """Return pairs of duplicates, those across splits first."""
    ordered = sorted(result.duplicates, key=lambda pair: pair.first.split == pair.second.split)
    return ordered[:PAIRS]


def write_flips(
    folder: Path,
    flips: Sequence[Flip],
    images: Mapping[int, np.ndarray],
    *,
    title: str,
    summary: Sequence[str],
) -> Path:
    """Write the page of the images that two nets classify differently.

    Args:
        folder: Gets index.html.
        flips: The images.
        images: Thumbnails, uint8 [H, W, 3], by index.
        title: Title of the page.
        summary: Sentences on the comparison.

    Returns:
        The page.

    Raises:
        UnavailableError: Jinja2 is not installed.
    """
    tiles = []
    for flip in flips:
        answers = (
            f"{flip.reference} {100 * flip.reference_probability:.1f} %",
            f"now {flip.candidate} {100 * flip.candidate_probability:.1f} %",
        )
        title_of = flip.reference if flip.label is None else f"{flip.label}: {flip.outcome}"
        tiles.append(tile(images.get(flip.index), title_of, answers, flip.place))
    return write_page(
        folder, "flips.html", title=title, summary=summary, tiles=tiles, large=False,
        nothing="No image changes its class.",
    )  # fmt: skip


def write_study(
    folder: Path,
    name: str,
    *,
    title: str,
    figure: Figure | None,
    caption: str,
    tables: Sequence[DataTable],
    diverged: Sequence[str] = (),
    recipe: str = "",
) -> Path:
    """Write a study's NAME.png, NAME.svg and index.html.

    Args:
        folder: The study's folder.
        name: The study's name, for file names.
        title: Title of the page.
        figure: The figure, or None if matplotlib is not installed.
        caption: Caption of the figure.
        tables: Shown below the figure.
        diverged: A line for each run whose loss was not finite.
        recipe: The recipe as text.

    Returns:
        The page.

    Raises:
        UnavailableError: Jinja2 is not installed.
    """
    svg = ""
    if figure is not None:
        plots.save_png(figure, folder / f"{name}.png")
        svg = plots.svg(figure, title)
        atomic_io.write_text(folder / f"{name}.svg", svg.replace("currentColor", "#1b1f24"))
    return write_page(
        folder,
        "study.html",
        title=title,
        figure=svg,
        caption=caption,
        tables=tables,
        diverged=[f"Diverged: {line}" for line in diverged],
        recipe=recipe,
    )
