"""HTML pages and Markdown from the templates in `templates/`.

HTML and SVG templates escape every value; only figures, which `plots` and `engine_layers` draw, are
inserted as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtresnet.core import artifacts, atomic_io, hardware, provenance
from rtresnet.core.errors import missing_package
from rtresnet.reporting import classification, plots, tables
from rtresnet.reporting.tables import DataTable

if TYPE_CHECKING:
    import numpy as np
    from jinja2 import Environment
    from matplotlib.figure import Figure

    from rtresnet.workflows.evaluate import EvaluateResult
    from rtresnet.workflows.quickstart import QuickstartResult
    from rtresnet.workflows.train import TrainResult


def render(template: str, **values: object) -> str:
    """Render a template.

    Args:
        template: Its name, as in "report.html".
        **values: What it names; a missing one is an error.

    Raises:
        UnavailableError: Jinja2 is not installed.
    """
    text = _environment().get_template(template).render(values)
    return text.rstrip("\n") + "\n"


def require_packages() -> None:
    """Check, before the work, that pages with figures can be written.

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
    """Escape what Markdown would read as markup."""
    for mark in ("\\", "|", "<", "`", "*", "_"):
        words = words.replace(mark, "&lt;" if mark == "<" else f"\\{mark}")
    return words.replace("\n", " ")


def write_training(result: TrainResult) -> Path:
    """Write a training run's curves.png and index.html into its folder.

    Args:
        result: Of a run whose folder has log.jsonl.

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
    kept = ", ".join(
        f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in dataclasses.asdict(result.measured).items()
        if value is not None
    )
    text = render(
        "training.html",
        title=result.title,
        kept=kept,
        curve=plots.svg(figure, "training and held-out error against epochs"),
        images="\n".join(result.images.lines()) if result.images else None,
        recipe="\n".join(result.recipe.lines()),
        epochs=epochs,
    )
    atomic_io.write_text(folder / "index.html", text)
    return folder / "index.html"


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
        summary.append("An ensemble: the mean of the probabilities.")
    summary.append(f"{result.n:,} images of {result.data}{split}.")
    notes = [f"Note: {line}." for line in result.labels.remarks]
    notes += [f"Assumed: {line}." for line in result.assumed]
    if result.skipped:
        notes.append(f"{len(result.skipped)} images cannot be decoded and are left out.")
    text = render(
        "evaluation.html",
        title=f"Evaluation of {Path(result.artifact).name}",
        summary=summary,
        notes=notes,
        view=classification.view(result.report, images),
        command=provenance.command_line(),
    )
    atomic_io.write_text(folder / "index.html", text)
    return folder / "index.html"


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
        figure: The figure, or None where matplotlib is not installed.
        caption: Of the figure.
        tables: Shown below the figure.
        diverged: A line for each run whose loss was not finite.
        recipe: As text.

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
    text = render(
        "study.html",
        title=title,
        figure=svg,
        caption=caption,
        tables=tables,
        diverged=[f"Diverged: {line}" for line in diverged],
        recipe=recipe,
        command=provenance.command_line(),
    )
    atomic_io.write_text(folder / "index.html", text)
    return folder / "index.html"


def write_quickstart(
    path: Path, result: QuickstartResult, precisions: DataTable, caveat: str | None
) -> None:
    """Write the page of a quickstart.

    Args:
        path: The HTML file.
        result: All that was measured.
        precisions: A row for each precision.
        caveat: Why INT8 is not faster; None where it is.

    Raises:
        UnavailableError: matplotlib or Jinja2 is not installed.
    """
    plans = result.export.plans
    rows: list[tuple[Any, ...]] = []
    for built in plans:
        record = built.plan.attested
        assert record is not None
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in record.dtypes.items())
        rows.append((built.path.name, record.convolutions, dtypes, record.layers,
                     round(built.plan.seconds, 2)))  # fmt: skip
    attested = DataTable(
        headings=("plan", "convolutions", "input type", "layers", "built in s"),
        rows=rows,
        about="Read from TensorRT's own layer dump at build time: the type that the kernel of each "
        "convolution takes as input.",
    )
    origin = DataTable(
        headings=("artifact", "precision", "sha256", "state"),
        rows=[
            (link, record and record.precision, record and record.sha256[:16], state)
            for link, record, state in artifacts.chain(plans[-1].path)
        ],
    )
    samples = {
        entry.artifact.precision or "": entry.measurement.samples
        for entry in result.bench.results
        if entry.measurement.batch == 1
    }
    text = render(
        "quickstart.html",
        title=f"{result.model} on {result.data}: FP32, FP16, INT8",
        result=result,
        precisions=precisions,
        caveat=caveat,
        curve=plots.training_curve(result.log),
        latency=plots.latency_distribution(samples, "ms a batch of 1"),
        attested=attested,
        origin=origin,
    )
    atomic_io.write_text(path, text)
