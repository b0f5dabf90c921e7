"""`rtresnet compare`: do two artifacts say the same of the same images?"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import click

from rtresnet.cli import common, opening
from rtresnet.core.errors import DataError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from rtresnet.data.sources import Source
    from rtresnet.runtime.backend import TopK


@click.command("compare", short_help="Measure how far two artifacts agree.")
@click.argument("reference")
@click.argument("candidate")
@click.option("--data", required=True, help=common.DATA_HELP)
@click.option(
    "--split", type=click.Choice(("train", "test", "all")), default="test", show_default=True
)
@click.option("--batch", type=click.IntRange(min=1), help="Images at a time.")
@common.classes_option
@common.input_options
@common.device_options
@common.json_option
def command(
    reference: str,
    candidate: str,
    data: str,
    split: str,
    batch: int | None,
    classes: tuple[str, ...] | None,
    json_file: str | None,
    **options: Any,
) -> None:
    """Measure agreement of two artifacts: top-1, largest and relative difference of logits.

    A file that gives the most probable classes only is compared by its top-1. --size, --mean, --std
    and --preset are for artifacts without a sidecar.
    """
    result = run(reference, candidate, data, split=split, batch=batch, classes=classes, **options)
    apart = "logits not known"
    if result["largest"] is not None:
        apart = f"largest difference {result['largest']:.3g}, relative {result['relative']:.2e}"
    common.out_console().print(
        f"{candidate} against {reference}: agreement {100 * result['agreement']:.2f} % of "
        f"{result['n']} images, {apart}",
        soft_wrap=True,
        markup=False,
    )
    common.show_run_notes(result["reference"], result["candidate"])
    for entry in (result["reference"], result["candidate"]):
        common.footer(f"Assumed of {entry['artifact']}: {line}." for line in entry["assumed"])
    common.footer(f"Assumed: {line}." for line in result["assumed"])
    common.write_json(json_file, "compare", result)


def run(
    reference: str,
    candidate: str,
    data: str,
    *,
    split: str = "test",
    batch: int | None = None,
    classes: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compares two artifacts on the same images; returns what `--json` writes."""
    from rtresnet.data.sources import open_source

    paths = (reference, candidate)
    stated = {name: options.pop(name, None) for name in ("size", "mean", "std")}
    if any(stated.values()) and all(map(opening.states_input, paths)):
        raise InputError(
            "both sidecars say what the artifacts take", fix="leave out --size, --mean and --std"
        )
    source = open_source(data, split)
    with contextlib.ExitStack() as stack:
        opened = []
        for path in paths:
            mine = opening.options_for(path, paths, options)
            if not opening.states_input(path):
                mine |= stated
            opened.append(opening.open_artifact(path, **mine))
            stack.callback(opened[-1].close)
        opened[1], mapping = opened[1].matched(opened[0], classes)
        first, second = (_answers(entry, source, batch) for entry in opened)
    about = [
        entry.where
        | {"artifact": path, "precision": entry.precision, "assumed": list(entry.assumed)}
        for path, entry in zip(paths, opened, strict=True)
    ]
    return _compared(first, second) | {
        "data": data,
        "reference": about[0],
        "candidate": about[1],
        "classes": mapping.record(),
        "assumed": mapping.assumptions(),
    }


def _answers(opened: opening.Opened, source: Source, batch: int | None) -> np.ndarray | TopK:
    """An artifact's answers for every image that can be decoded."""
    from rtresnet.data import loader

    found = loader.batches(
        source,
        opened.preprocess,
        batch or loader.batch_size(opened.preprocess),
        tally=loader.DecodeErrors(len(source), common.note),
    )
    with common.progress(f"running {opened.path}"):
        parts = [opened.answer(images) for images, _ in found]
    if not parts:
        raise DataError(f"{source.name}: no image could be decoded")
    return _joined(parts)


def _joined(parts: list[Any]) -> np.ndarray | TopK:
    import numpy as np

    if isinstance(parts[0], tuple):
        indices, probabilities = (np.concatenate(part) for part in zip(*parts, strict=True))
        return indices, probabilities
    return np.concatenate(parts)


def _compared(reference: np.ndarray | TopK, candidate: np.ndarray | TopK) -> dict[str, Any]:
    """n, largest, relative, agreement; the differences are None where logits are not known."""
    from rtresnet.core import metrics

    if not isinstance(reference, tuple) and not isinstance(candidate, tuple):
        return dataclasses.asdict(metrics.parity(reference, candidate))
    first, second = _top1(reference), _top1(candidate)
    agreement = float(((first == second) & (first >= 0)).mean())
    return {"n": len(first), "largest": None, "relative": None, "agreement": agreement}


def _top1(found: np.ndarray | TopK) -> np.ndarray:
    """int64 [N]; -1 where an answer is not a number."""
    import numpy as np

    values = found[1] if isinstance(found, tuple) else found
    best = found[0][:, 0] if isinstance(found, tuple) else found.argmax(axis=1)
    return np.where(np.isnan(values).any(axis=1), -1, best)
