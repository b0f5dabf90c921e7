"""The report as Markdown, for a pull request: the same tables and sentences, no figures."""

from __future__ import annotations

from collections.abc import Sequence

from rtresnet.reporting.result_tables import remarks, sections, summary
from rtresnet.reporting.results import Gathered
from rtresnet.reporting.tables import Row, numeric, text


def render(found: Gathered) -> str:
    """Title, what was gained and lost, and every table."""
    lines = [f"## {_plain(found.title)}: accuracy and latency", ""]
    lines += [f"- {_plain(line)}" for line in summary(found)]
    lines += ["", *(f"> {_plain(line)}" for line in remarks(found))]
    for name, section in sections(found).items():
        body = table(section.headings, section.rows)
        lines += ["", f"### {section.heading}", ""]
        if name in ("blocks", "chain"):  # long, and rarely what a reviewer looks for first
            body = f"<details><summary>{len(section.rows)} rows</summary>\n\n{body}\n\n</details>"
        lines.append(body)
        if section.about:
            lines += ["", _plain(section.about)]
    if found.commands:
        lines += ["", "```", *found.commands, "```"]
    return "\n".join(lines) + "\n"


def table(headings: Sequence[str], rows: Sequence[Row]) -> str:
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
