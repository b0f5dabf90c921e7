"""One self-contained HTML page: no network, no script that it needs, light and dark, printable."""

from __future__ import annotations

import html
from collections.abc import Sequence

from rtresnet.reporting.tables import Row, numeric, text

STYLE = """
:root { color-scheme: light dark; --fg: #1b1f24; --bg: #ffffff; --dim: #5b6470;
        --line: #d6dbe1; --soft: #f4f6f8; --accent: #2563eb; --warn: #9a5b00; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e5e9ee; --bg: #14171b; --dim: #9aa4b0; --line: #333a42; --soft: #1d2127;
          --accent: #7aa7ff; --warn: #f0b65a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: var(--fg);
       background: var(--bg); font: 16px/1.55 system-ui, sans-serif;
       overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .5rem 0; } .dim { color: var(--dim); font-size: .9rem; }
.note { border-left: 4px solid var(--warn); padding: .4rem .8rem; background: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
         white-space: nowrap; overflow-wrap: break-word; }
th { font-weight: 600; color: var(--dim); font-size: .85rem; }
td.n, th.n { text-align: right; }
figure { margin: 1rem 0; } figure svg { width: 100%; max-width: 40rem; height: auto; }
figure.wide { overflow-x: auto; } figure.wide svg { max-width: none; min-width: 44rem; }
figcaption { color: var(--dim); font-size: .9rem; }
code, pre { font: .88rem/1.5 ui-monospace, monospace; }
pre { background: var(--soft); padding: .8rem; white-space: pre-wrap; }
.tablebox { margin: .6rem 0 1.2rem; }
button.copy { display: none; font: inherit; font-size: .82rem;
              color: var(--accent); cursor: pointer;
              background: none; border: 1px solid var(--line); border-radius: .4rem;
              padding: .15rem .6rem; margin: .3rem 0 0; }
.js button.copy { display: inline-block; }
.tiles { display: grid; gap: .8rem; margin: 1.2rem 0;
         grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); }
.tile { border: 1px solid var(--line); border-top: 4px solid var(--tile, var(--accent));
        border-radius: .5rem; padding: .7rem .9rem; background: var(--soft); min-width: 0; }
.tile h3 { margin: 0 0 .2rem; font-size: 1rem; }
.tile .big { font-size: 1.55rem; font-weight: 650; line-height: 1.25; }
.tile dl { display: grid; grid-template-columns: 1fr auto; gap: .05rem .6rem; margin: .4rem 0 0;
           font-size: .88rem; } .tile dt { color: var(--dim); } .tile dd { margin: 0; }
.two { display: grid; gap: 1rem;
       grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.two > * { min-width: 0; }
@media print { :root { color-scheme: light; --fg: #000; --bg: #fff; --dim: #444; --line: #bbb;
                       --soft: #fff; }
  body { max-width: none; padding: 0; font-size: 11pt; } .js button.copy { display: none; }
  figure.wide svg { min-width: 0; }
  figure, .tile, tr { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } td, th { white-space: normal; padding: .2rem .4rem; } }
"""


# Without it the page says the same; it only lets tables be copied.
SCRIPT = """
document.documentElement.classList.add("js");
function csv(table) {
  return [...table.rows].map(row => [...row.cells].map(cell => {
    const text = cell.dataset.v ?? cell.textContent;
    return /[",\\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
  }).join(",")).join("\\n") + "\\n";
}
async function copy(button) {
  const text = csv(button.parentElement.querySelector("table")), was = button.textContent;
  try { await navigator.clipboard.writeText(text); }
  catch {
    const area = document.createElement("textarea");
    area.value = text; document.body.append(area); area.select();
    document.execCommand("copy"); area.remove();
  }
  button.textContent = "Copied"; setTimeout(() => { button.textContent = was; }, 1500);
}
for (const button of document.querySelectorAll("button.copy"))
  button.addEventListener("click", () => copy(button));
"""


def document(title: str, parts: Sequence[str]) -> str:
    """The whole page."""
    script = f"<script>{SCRIPT}</script>\n" if any('class="copy"' in part for part in parts) else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Otherwise a browser asks the server for an icon.
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + f"\n{script}</body>\n</html>\n"
    )


def heading(words: str) -> str:
    """A section's heading."""
    return f"<h2>{html.escape(words)}</h2>"


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph; `kind` is "", "dim" or "note"."""
    return f'<p class="{kind}">{html.escape(words)}</p>' if kind else f"<p>{html.escape(words)}</p>"


def notes(lines: Sequence[str]) -> str:
    """What must not be overlooked, in one box; nothing where there is nothing."""
    inside = "<br>\n".join(map(html.escape, lines))
    return f'<p class="note">{inside}</p>' if lines else ""


def code(words: str) -> str:
    """Preformatted text."""
    return f"<pre>{html.escape(words)}</pre>"


def table(headings: Sequence[str], rows: Sequence[Row], *, copy: bool = False) -> str:
    """A table; columns of numbers are set right. An unknown is a dash.

    With `copy` there is a button that copies it as CSV, floats in full.
    """
    right = [numeric(row[index] for row in rows) for index in range(len(headings))]
    classes = [' class="n"' if flag else "" for flag in right]
    head = "".join(
        f"<th{cls}>{html.escape(name)}</th>" for cls, name in zip(classes, headings, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{cls}{_value(cell)}>{html.escape(text(cell))}</td>"
            for cls, cell in zip(classes, row, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    inside = (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )
    if not copy:
        return inside
    button = '<button class="copy" type="button">Copy as CSV</button>'
    return f'<div class="tablebox">{inside}{button}</div>'


def _value(cell: object) -> str:
    """What is copied where more is known than is shown."""
    if cell is None:
        return ' data-v=""'
    return f' data-v="{cell!r}"' if isinstance(cell, float) else ""


def tiles(entries: Sequence[tuple[str, str, str, Sequence[tuple[str, str]]]]) -> str:
    """Cards side by side: (title, colour, the one figure, further lines as name and value)."""
    cards = []
    for title, colour, big, lines in entries:
        inside = "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in lines
        )
        cards.append(
            f'<div class="tile" style="--tile: {colour}"><h3>{html.escape(title)}</h3>'
            f'<div class="big">{html.escape(big)}</div><dl>{inside}</dl></div>'
        )
    return '<div class="tiles">' + "".join(cards) + "</div>"


def picture(svg: str, caption: str, *, wide: bool = False) -> str:
    """A plot with its caption; a wide one keeps its size on a phone, and scrolls."""
    opening = '<figure class="wide">' if wide else "<figure>"
    return f"{opening}{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def side_by_side(*parts: str) -> str:
    """Next to each other where there is room, below each other on a phone."""
    return '<div class="two">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"
