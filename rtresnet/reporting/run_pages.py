"""The pages that training, a study and quickstart leave in their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtresnet.core import artifacts, atomic_io
from rtresnet.reporting import page, plots
from rtresnet.reporting.tables import Row


def write_training(
    folder: Path, *, title: str, recipe: str, measured: Mapping[str, Any], images: str | None = None
) -> None:
    """Write a training run's curves.png and index.html.

    Args:
        folder: With log.jsonl in it.
        title: Title of the page.
        recipe: As text.
        measured: Accuracies of the best checkpoint.
        images: Facts on the images, as text.

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


def write_study(
    folder: Path, name: str, *, title: str, drawn: Any, about: str, parts: Sequence[str]
) -> None:
    """Write a study's NAME.png, NAME.svg and index.html.

    Args:
        folder: The study's folder.
        name: The study's name, for file names.
        title: Title of the page.
        drawn: The figure, or None where matplotlib is not installed.
        about: Caption of the figure.
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


def write_quickstart(
    path: Path,
    result: Mapping[str, Any],
    *,
    headings: Sequence[str],
    rows: Sequence[Row],
    legend: str,
    caveat: str | None,
) -> None:
    """Write the page of a quickstart.

    Args:
        path: The HTML file.
        result: The result as `--json` writes it.
        headings: Headings of the table of precisions.
        rows: A row for each precision.
        legend: What the columns are.
        caveat: Why INT8 is not faster; None where it is.
    """
    tested = result["train"]["measured"]
    samples = {r["precision"]: r["samples"] for r in result["bench"]["results"] if r["batch"] == 1}
    links = [
        (
            str(link),
            record.precision if record else None,
            record.sha256[:16] if record else None,
            state,
        )
        for link, record, state in artifacts.chain(result["export"]["plans"][-1]["plan"])
    ]
    attested = [
        (
            Path(plan["plan"]).name,
            plan["attested"]["convolutions"],
            ", ".join(f"{n} {dtype}" for dtype, n in plan["attested"]["dtypes"].items()),
            plan["attested"]["layers"],
            round(plan["seconds"], 2),
        )
        for plan in result["export"]["plans"]
    ]
    parts = [
        page.paragraph(
            f"{result['model']} trained on {result['data']}, exported, quantized, compiled into "
            f"TensorRT engines and measured in {result['seconds']:.0f} s.",
        ),
        page.heading("Three precisions of one net"),
        page.table(headings, rows),
        page.paragraph(legend, "dim"),
        *([page.paragraph(caveat, "note")] if caveat else []),
        page.side_by_side(
            page.heading("Training")
            + page.picture(
                plots.training_curve(result["log"]),
                f"Error on the training and the {tested['val_n']} held-out images. Test top-1 "
                f"{tested['test_top1']:.2f} % of {tested['test_n']} images, looked at once.",
            ),
            page.heading("Latency")
            + page.picture(
                plots.latency_distribution(samples, "ms a batch of 1"),
                "Every request, one after another, the three files in turn.",
            ),
        ),
        page.heading("What the builder attests"),
        page.table(("plan", "convolutions", "they take", "layers", "built in s"), attested),
        page.paragraph(
            "Read from TensorRT's own layer dump at build time: the type each convolution's "
            "kernel takes as input.",
            "dim",
        ),
        page.heading("Where the INT8 plan came from"),
        page.table(("artifact", "precision", "sha256", "state"), links),
        page.heading("Do it yourself"),
        page.code(
            f"rtresnet train --model {result['model']} --data {result['data']}\n"
            f"rtresnet export --model {result['model']} --int8 --calib {result['data']}\n"
            f"rtresnet bench engines/{result['model']}-int8.onnx"
        ),
    ]
    title = f"{result['model']} on {result['data']}: FP32, FP16, INT8"
    atomic_io.write_text(path, page.document(title, parts))
