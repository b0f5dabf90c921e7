"""What a study leaves to look at in its folder: NAME.png, NAME.svg and index.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtresnet.core import atomic_io
from rtresnet.reporting import page, plots


def write(
    folder: Path, name: str, *, title: str, drawn: Any, about: str, parts: Sequence[str]
) -> None:
    """Writes the figure twice and the page with it.

    Args:
        folder: Of the study.
        name: Of the study, for file names.
        title: Of the page.
        drawn: The figure, or None where matplotlib is not installed.
        about: Beneath the figure.
        parts: The rest of the page.
    """
    figure: list[str] = []
    if drawn is not None:
        with atomic_io.atomic_path(folder / f"{name}.png") as temporary:
            drawn.savefig(temporary, format="png", dpi=150)
        svg = plots.svg(drawn, title)
        atomic_io.write_text(folder / f"{name}.svg", svg.replace("currentColor", "#1b1f24"))
        figure = [page.picture(svg, about)]
    atomic_io.write_text(folder / "index.html", page.document(title, [*figure, *parts]))
