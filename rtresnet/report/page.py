"""One self-contained HTML page: no network, no script that it needs, light and dark, printable."""

from __future__ import annotations

import html
from collections.abc import Sequence

from rtresnet.report.tables import Row, numeric, text

STYLE = """
:root { color-scheme: light dark; --fg: #1b1f24; --bg: #ffffff; --dim: #5b6470;
        --line: #d6dbe1; --soft: #f4f6f8; --accent: #2563eb; --warn: #9a5b00; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e5e9ee; --bg: #14171b; --dim: #9aa4b0; --line: #333a42; --soft: #1d2127;
          --accent: #7aa7ff; --warn: #f0b65a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: var(--fg);
       background: var(--bg); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .5rem 0; } .dim { color: var(--dim); font-size: .9rem; }
.note { border-left: 4px solid var(--warn); padding: .4rem .8rem; background: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
         white-space: nowrap; }
th { font-weight: 600; color: var(--dim); font-size: .85rem; }
td.n, th.n { text-align: right; }
figure { margin: 1rem 0; } figure svg { width: 100%; max-width: 46rem; height: auto; }
figcaption { color: var(--dim); font-size: .9rem; }
code, pre { font: .88rem/1.5 ui-monospace, monospace; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
@media (max-width: 24rem) { .two { grid-template-columns: 1fr; } }
@media print { body { max-width: none; padding: 0; } pre, .note { background: none; } }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Otherwise a browser asks the server for an icon.
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def heading(words: str) -> str:
    """A section's heading."""
    return f"<h2>{html.escape(words)}</h2>"


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph; `kind` is "", "dim" or "note"."""
    return f'<p class="{kind}">{html.escape(words)}</p>' if kind else f"<p>{html.escape(words)}</p>"


def code(words: str) -> str:
    """Preformatted text."""
    return f"<pre>{html.escape(words)}</pre>"


def table(headings: Sequence[str], rows: Sequence[Row]) -> str:
    """A table; columns of numbers are set right. An unknown is a dash."""
    right = [numeric(row[index] for row in rows) for index in range(len(headings))]
    classes = [' class="n"' if flag else "" for flag in right]
    head = "".join(
        f"<th{cls}>{html.escape(name)}</th>" for cls, name in zip(classes, headings, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{cls}>{html.escape(text(cell))}</td>"
            for cls, cell in zip(classes, row, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(svg: str, caption: str) -> str:
    """A plot with its caption."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def side_by_side(*parts: str) -> str:
    """Next to each other where there is room, below each other on a phone."""
    return '<div class="two">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"
