"""The report as an HTML page and as Markdown: figures, and the tables of `result_tables.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rtresnet.reporting import page, plots, result_plots
from rtresnet.reporting.result_tables import Section, latest, remarks, sections, summary
from rtresnet.reporting.results import Gathered
from rtresnet.reporting.tables import Row, number, numeric, text


def html(found: Gathered, pictures: Sequence[tuple[str, str]] = ()) -> str:
    """The page.

    Args:
        found: What was gathered.
        pictures: Of the engines' layers, as (caption, svg).

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    tables = sections(found)
    parts = [page.paragraph(line) for line in summary(found)]
    parts.append(page.notes(remarks(found)))
    parts.append(_tiles(found))
    batch = found.batch
    if batch is not None:
        parts += _latency_figures(found, batch, tables)
    elif "artifacts" in tables:
        parts.append(_table(tables["artifacts"]))
    if found.searches:
        parts += [page.heading("Latency against load"), *_search_figures(found)]
        parts.append(_table(tables["searches"], heading=False))
    if found.profiles:
        labels = [(f"{a.name}, batch {r.get('batch')}", r) for a, r in found.profiles]
        parts += [
            page.heading("Where the time goes"),
            page.picture(result_plots.stages(labels), "Time of each stage."),
            _table(tables["blocks"], heading=False),
        ]
    if pictures:
        parts.append(page.heading("What the engines fuse"))
        parts += [page.picture(svg, caption, wide=True) for caption, svg in pictures]
    rest = ("accuracy", "origin", "chain", "environment")
    parts += [_table(tables[name]) for name in rest if name in tables]
    if found.commands:
        parts += [page.heading("Commands"), page.code("\n".join(found.commands))]
    return page.document(f"{found.title}: accuracy and latency", [part for part in parts if part])


def _latency_figures(found: Gathered, batch: int, tables: dict[str, Section]) -> list[str]:
    tradeoff = result_plots.tradeoff(found, batch)
    parts = []
    if tradeoff:
        parts += [
            page.heading("Accuracy against latency"),
            page.picture(
                tradeoff,
                "Up and left is better. Filled: no other artifact is both faster and more "
                "accurate; the line joins these.",
            ),
        ]
    parts += [_table(tables["artifacts"]), page.heading("Latency")]
    figures = [
        (result_plots.tails(found, batch), "Latency against percentile: the tail to the right."),
        (
            result_plots.histogram(found, batch),
            "How often which latency came; the last bin holds all that was slower.",
        ),
        (result_plots.batches(found, "median", "median latency, ms"), "Latency against batch."),
        (
            result_plots.batches(found, "images_per_second", "images/s"),
            "Throughput against batch.",
        ),
    ]
    drawn = [page.picture(svg, caption) for svg, caption in figures if svg]
    if drawn:
        parts.append(page.side_by_side(*drawn))
    return [*parts, _table(tables["latency"], heading=False)]


def _search_figures(found: Gathered) -> list[str]:
    """A figure a kind of load and bound; what is compared in one has both in common."""
    kinds: dict[tuple[str, float], list[tuple[str, Any]]] = {}
    for artifact, search in found.searches:
        kinds.setdefault((search["what"], search["p99_ms"]), []).append((artifact.name, search))
    return [
        page.picture(
            plots.svg(plots.search_figure(searches), "latency against load"),
            f"The bound of {number(bound)} ms is the level line; a line down: the most that "
            "holds it.",
        )
        for (_, bound), searches in kinds.items()
    ]


def _table(section: Section, *, heading: bool = True) -> str:
    title = page.heading(section.heading) if heading else ""
    about = page.paragraph(section.about, "dim") if section.about else ""
    return title + page.table(section.headings, section.rows, copy=True) + about


def _tiles(found: Gathered) -> str:
    batch = found.batch
    if batch is None:
        return ""
    shades = result_plots.colours(found)
    entries: list[Any] = []
    for timing in latest(found.streams(batch)):
        artifact, best = timing.artifact, [
            t.latency["images_per_second"] for t in found.timings
            if t.artifact is timing.artifact and t.latency.get("images_per_second")
        ]  # fmt: skip
        lines = []
        if artifact.top1 is not None:
            n = artifact.accuracy.get("n")
            lines.append((f"top-1 of {n:,}" if n else "top-1", f"{artifact.top1:.2f} %"))
        if timing.latency.get("p99") is not None:
            lines.append(("p99", f"{number(timing.latency['p99'])} ms"))
        if best:
            lines.append(("best throughput", f"{max(best):,.0f} images/s"))
        if artifact.bytes is not None:
            lines.append(("size", f"{artifact.bytes / 1e6:.1f} MB"))
        big = f"{number(timing.latency['median'])} ms"
        title = f"{artifact.name}, batch {batch}"
        entries.append((title, shades[artifact.name], big, lines))
    return page.tiles(entries)


def markdown(found: Gathered) -> str:
    """The report as Markdown, for a pull request: the same tables and sentences, no figures."""
    lines = [f"## {_plain(found.title)}: accuracy and latency", ""]
    lines += [f"- {_plain(line)}" for line in summary(found)]
    lines += ["", *(f"> {_plain(line)}" for line in remarks(found))]
    for name, section in sections(found).items():
        body = markdown_table(section.headings, section.rows)
        lines += ["", f"### {section.heading}", ""]
        if name in ("blocks", "chain"):  # long, and rarely what a reviewer looks for first
            body = f"<details><summary>{len(section.rows)} rows</summary>\n\n{body}\n\n</details>"
        lines.append(body)
        if section.about:
            lines += ["", _plain(section.about)]
    if found.commands:
        lines += ["", "```", *found.commands, "```"]
    return "\n".join(lines) + "\n"


def markdown_table(headings: Sequence[str], rows: Sequence[Row]) -> str:
    """A table as GitHub reads it; columns of numbers are set right."""
    right = [numeric(row[index] for row in rows) for index in range(len(headings))]
    lines = [
        "| " + " | ".join(map(_plain, headings)) + " |",
        "|" + "|".join("---:" if flag else "---" for flag in right) + "|",
    ]
    lines += ["| " + " | ".join(_plain(text(cell)) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _plain(words: str) -> str:
    """Nothing in it is read as markup."""
    for mark in ("\\", "|", "<", "`", "*", "_"):
        words = words.replace(mark, "&lt;" if mark == "<" else f"\\{mark}")
    return words.replace("\n", " ")
