"""What a training run leaves to look at: curves.png and index.html in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtresnet.core import atomic_io
from rtresnet.reporting import page, plots


def write(
    folder: Path, *, title: str, recipe: str, measured: Mapping[str, Any], images: str | None = None
) -> None:
    """Draws a run's log.

    Args:
        folder: With log.jsonl in it.
        title: Of the page.
        recipe: As text.
        measured: Of the checkpoint that was kept.
        images: What was found out about the images, as text.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    drawn = plots.training_figure(log)
    with atomic_io.atomic_path(folder / "curves.png") as temporary:
        drawn.savefig(temporary, format="png", dpi=150)
    headings = ("epoch", "step", "loss", "learning rate", "side", "train top-1 %", "val top-1 %",
                "images/s")  # fmt: skip
    rows = [
        (
            entry["epoch"], entry["step"], entry["loss"], entry["lr"], entry["side"],
            entry["train_top1"], entry["val_top1"], entry["images_per_second"],
        )
        for entry in log
    ]  # fmt: skip
    kept = ", ".join(
        f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in measured.items()
        if value is not None
    )
    parts = [
        page.paragraph(f"Kept: {kept}."),
        page.picture(plots.training_curve(log), "Error on training and held-out images."),
        *([page.heading("Images"), page.code(images)] if images else []),
        page.heading("Recipe"),
        page.code(recipe),
        page.heading("Epochs"),
        page.table(headings, rows),
    ]
    atomic_io.write_text(folder / "index.html", page.document(title, parts))
