"""Create a report from results and artifacts: one HTML page, and Markdown for a pull request."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rtresnet.core import atomic_io
from rtresnet.core.errors import InputError
from rtresnet.reporting import pages, plots, report_tables, results
from rtresnet.reporting.results import Results
from rtresnet.reporting.tables import number
from rtresnet.workflows.result_files import Search

DEFAULT = "engines"


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """A report that was written.

    Attributes:
        page: The HTML file.
        bytes: Its size.
        artifacts: Number of artifacts in it.
        latencies: Number of artifacts and batches with a latency.
        profiles: Number of profiles.
        searches: Number of searches for the largest load.
        summary: Summary of its content, as sentences.
        markdown: The report as Markdown.
    """

    page: Path
    bytes: int
    artifacts: int
    latencies: int
    profiles: int
    searches: int
    summary: tuple[str, ...]
    markdown: str


def report(
    files: Sequence[str | os.PathLike[str]] = (), out: str | os.PathLike[str] = "report.html"
) -> ReportResult:
    """Create one self-contained HTML page from results and artifacts.

    Args:
        files: Results that other steps wrote as JSON, artifacts, or folders of them; the folder
            engines/ by default.
        out: The page.

    Returns:
        The page, its summary, and the same as Markdown.

    Raises:
        InputError: There is nothing to report, a file is not a result, or the page cannot be
            written.
        ArtifactError: A broken sidecar.
        UnavailableError: matplotlib or Jinja2 is not installed.
    """
    if not files and not Path(DEFAULT).is_dir():
        raise InputError(
            f"nothing to report: there is no folder {DEFAULT}/",
            fix="write results with: rtresnet bench ARTIFACT... --json bench.json",
        )
    gathered = results.gather([str(file) for file in files] or (DEFAULT,))
    text = html(gathered, list(_engines(gathered)))
    atomic_io.write_text(out, text)
    return ReportResult(
        page=Path(out),
        bytes=len(text.encode()),
        artifacts=len(gathered.artifacts),
        latencies=len(gathered.timings),
        profiles=len(gathered.profiles),
        searches=len(gathered.searches),
        summary=(*report_tables.summary(gathered), *report_tables.remarks(gathered)),
        markdown=markdown(gathered),
    )


def html(gathered: Results, engines: Sequence[tuple[str, str]] = ()) -> str:
    """Render the page.

    Args:
        gathered: The results to show.
        engines: Figures of the engines' layers, as (caption, SVG).

    Raises:
        UnavailableError: matplotlib or Jinja2 is not installed.
    """
    batch = gathered.batch
    labels = [(f"{a.name}, batch {r.get('batch')}", r) for a, r in gathered.profiles]
    return pages.render(
        "report.html",
        **_text(gathered),
        results=gathered,
        batch=batch,
        colours=plots.colours(gathered),
        tradeoff=batch and plots.tradeoff(gathered, batch),
        tails=batch and plots.tails(gathered, batch),
        histogram=batch and plots.histogram(gathered, batch),
        batch_latency=plots.batches(gathered, "median", "median latency, ms"),
        batch_throughput=plots.batches(gathered, "images_per_second", "images/s"),
        searches=_search_figures(gathered),
        stages=plots.stages(labels) if labels else None,
        engines=engines,
        curves=[
            (a.name, plots.precision_recall([(c["name"], c["precision"]) for c in curves]))
            for a, curves in gathered.curves
        ],
    )


def markdown(gathered: Results) -> str:
    """Render the same tables and sentences as Markdown, for a pull request.

    Raises:
        UnavailableError: Jinja2 is not installed.
    """
    return pages.render("report.md", **_text(gathered))


def _text(gathered: Results) -> dict[str, object]:
    return {
        "title": f"{gathered.title}: accuracy and latency",
        "summary": report_tables.summary(gathered),
        "notes": report_tables.remarks(gathered),
        "tables": report_tables.tables(gathered),
        "commands": gathered.commands,
    }


def _search_figures(gathered: Results) -> list[tuple[str, str]]:
    """Return (SVG, bound) for each kind of load and each bound; a figure compares artifacts."""
    kinds: dict[tuple[str, float], list[tuple[str, Search]]] = {}
    for artifact, search in gathered.searches:
        kinds.setdefault((search["what"], search["p99_ms"]), []).append((artifact.name, search))
    return [
        (plots.svg(plots.search_figure(searches), "latency against load"), number(bound))
        for (_, bound), searches in kinds.items()
    ]


def _engines(gathered: Results) -> Iterator[tuple[str, str]]:
    """Return a caption and a figure for every plan whose layers were recorded."""
    from rtresnet.builder import layers
    from rtresnet.core import artifacts
    from rtresnet.reporting import engine_layers

    for artifact in gathered.artifacts:
        if not artifact.chain or artifact.chain[0][2] != "ok":
            continue
        sidecar = artifacts.read_sidecar(artifact.path)
        if sidecar is None or sidecar.plan is None or sidecar.plan.layers is None:
            continue
        file = sidecar.plan.layers.file
        if not (artifact.path.parent / file).exists():
            gathered.notes.append(
                f"The layers of {artifact.name} are not shown: {file} does not exist."
            )
            continue
        yield (
            f"The fused layers of {artifact.name}, in the order of execution.",
            engine_layers.draw(layers.load(artifact.path, sidecar), artifact.name),
        )
