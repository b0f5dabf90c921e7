"""Create a report from results and artifacts: one HTML page, and Markdown for a pull request."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rtresnet.core import atomic_io
from rtresnet.core.errors import InputError
from rtresnet.reporting import result_page, result_tables, results
from rtresnet.reporting.results import Gathered

DEFAULT = "engines"


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """A report that was written.

    Attributes:
        page: The HTML file.
        bytes: Its size.
        artifacts: Number of artifacts in it.
        summary: What it shows, a sentence each.
        markdown: The same as Markdown.
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
    """Creates one self-contained HTML page from results and artifacts.

    Args:
        files: Results that other steps wrote as JSON, artifacts, or folders of them; the folder
            engines/ by default.
        out: The page.

    Raises:
        InputError: There is nothing to report, a file is not a result, or the page cannot be
            written.
    """
    if not files and not Path(DEFAULT).is_dir():
        raise InputError(
            f"nothing to report: no {DEFAULT}/ here",
            fix="write results with: rtresnet bench ARTIFACT... --json bench.json",
        )
    gathered = results.gather([str(file) for file in files] or (DEFAULT,))
    text = result_page.html(gathered, list(_engines(gathered)))
    atomic_io.write_text(out, text)
    return ReportResult(
        page=Path(out),
        bytes=len(text.encode()),
        artifacts=len(gathered.artifacts),
        latencies=len(gathered.timings),
        profiles=len(gathered.profiles),
        searches=len(gathered.searches),
        summary=(*result_tables.summary(gathered), *result_tables.remarks(gathered)),
        markdown=result_page.markdown(gathered),
    )


def _engines(found: Gathered) -> Iterator[tuple[str, str]]:
    """A caption and a picture of every plan whose layers were kept; notes where they are gone."""
    from rtresnet.builder import layers
    from rtresnet.core import artifacts
    from rtresnet.reporting import engine_layers

    for artifact in found.artifacts:
        if not artifact.chain or artifact.chain[0][-1] != "ok":  # gone, or not what it was
            continue
        sidecar = artifacts.read_sidecar(artifact.path)
        if sidecar is None or sidecar.plan is None or sidecar.plan.layers is None:
            continue
        file = sidecar.plan.layers.file
        if not (artifact.path.parent / file).exists():
            found.notes.append(f"The layers of {artifact.name} are not shown: {file} is not there.")
            continue
        engine = dataclasses.asdict(layers.load(artifact.path, sidecar))
        yield (
            f"The fused layers of {artifact.name}, in the order of execution.",
            engine_layers.draw(engine, artifact.name),
        )
