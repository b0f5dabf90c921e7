"""`rtresnet predict`: what is on these images?

A few are answered on the terminal (here), a folder of any size into a file (`predict_bulk.py`).
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rtresnet.cli import common
from rtresnet.core.errors import DataError, InputError

NAMED = 8  # models that are listed where there are several to choose from


@click.command("predict", short_help="The most probable classes of images.")
@click.argument("images", nargs=-1, required=True, metavar="[ARTIFACT] IMAGE...")
@click.option(
    "--with",
    "artifact",
    metavar="FILE",
    help="Checkpoint, ONNX file or plan to predict with; also accepted as the first argument "
    "[the only one under engines/ and runs/].",
)
@click.option("--top", type=click.IntRange(min=1), help="Classes an image [3].")
@click.option("--batch", type=click.IntRange(min=1), help="Images at a time [by size and device].")
@click.option("--workers", type=click.IntRange(min=1), help="Decoding threads [one a core].")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a table: *.parquet, *.csv or *.jsonl.",
)
@click.option(
    "--excel-safe",
    is_flag=True,
    help="CSV: put an apostrophe before names that a spreadsheet would run as a formula (that "
    "start with = + - @, tab or carriage return). Without it, do not open a CSV with names of "
    "unknown origin in a spreadsheet.",
)
@click.option("--resume", is_flag=True, help="Go on with an --out that was stopped.")
@click.option("--ray", is_flag=True, help="On Ray Data: where RAY_ADDRESS says, or a local one.")
@click.option(
    "--actors", type=click.IntRange(min=1), help="Processes of Ray [one a GPU, or one a machine]."
)
@click.option("--model", help="The net of a foreign checkpoint [recognized].")
@common.input_options
@common.device_options
@common.json_option
def command(
    images: tuple[str, ...],
    artifact: str | None,
    out: Path | None,
    excel_safe: bool,
    resume: bool,
    ray: bool,
    actors: int | None,
    json_file: str | None,
    **options: Any,
) -> None:
    """Print the most probable classes of image files, or of every image in a folder.

    With --out FILE they go into a table, batch by batch: for as many images as there are. What was
    stopped or killed goes on with --resume. A broken image is a row with an error. Transparent
    images are composited on white.
    """
    if out is None and (resume or ray or actors):
        raise click.UsageError("--resume, --ray and --actors go with --out")
    if excel_safe and (out is None or out.suffix.lower() != ".csv"):
        raise click.UsageError("--excel-safe needs --out FILE.csv")
    if actors and not ray:
        raise click.UsageError("--actors goes with --ray")
    options["decoders"] = options.pop("workers")
    artifact, names = _named(images, artifact)
    if out is None:
        result = run(names, artifact, **options)
        _show(result)
    else:
        from rtresnet.cli import predict_bulk

        result = predict_bulk.run(
            names, artifact, out, excel_safe=excel_safe, resume=resume, ray=ray, actors=actors,
            **options,
        )  # fmt: skip
        _summarize(result)
    common.write_json(json_file, "predict", result)


def run(names: Sequence[str], artifact: str, **options: Any) -> dict[str, Any]:
    """The verb's body for a few images; returns what `--json` writes.

    Args:
        names: The image files.
        artifact: Checkpoint, ONNX file or plan.
        options: As `predict_rows.Predictor` takes them.
    """
    from rtresnet.cli.predict_rows import Predictor

    found, skipped = [], []
    with contextlib.closing(Predictor(artifact, **options)) as predictor:
        for rows in predictor.batches(names):
            for row in rows:
                # Every image was named by the person: a broken one is told, whatever their share.
                if row.error is not None:
                    skipped.append(row.error)
                    common.note(f"skipped {row.error}")
                    continue
                top = [{"class": name, "probability": value} for name, value in row.top]
                found.append({"image": row.image, "top": top})
        about = predictor.about
    if about.where.get("batch_note"):
        common.note(about.where["batch_note"])
    if not found:
        raise DataError(f"none of the {len(names)} images could be decoded")
    return {
        "artifact": artifact,
        "images": found,
        "skipped": skipped,
        "assumed": list(about.assumed),
    } | about.where


def _show(result: dict[str, Any]) -> None:
    console = common.out_console()
    for entry in result["images"]:
        guesses = "  ".join(f"{g['class']} ({100 * g['probability']:.1f} %)" for g in entry["top"])
        console.print(f"{entry['image']}: {guesses}", soft_wrap=True, markup=False)
    common.footer(f"Assumed: {line}." for line in result["assumed"])


def _summarize(result: dict[str, Any]) -> None:
    if result.get("batch_note"):
        common.note(result["batch_note"])
    broken = f", {result['broken']:,} of them broken" if result["broken"] else ""
    here = result["images"] - result["resumed_at"]
    common.out_console().print(
        f"{result['out']}: {result['images']:,} images{broken}; {here:,} in "
        f"{result['seconds']:,.1f} s, {result['images_per_second']:,.0f} img/s  "
        f"[{result['artifact']}, batch {result['batch']}, {result['provider']}, "
        f"{result['device']}]",
        soft_wrap=True,
        markup=False,
    )
    common.footer(f"Assumed: {line}." for line in result["assumed"])


def _named(given: Sequence[str], artifact: str | None) -> tuple[str, list[str]]:
    """The artifact and every image file; an artifact may also be the first of the files.

    Raises:
        InputError: A file that does not exist, a model among the images, or no model or several
            to choose from.
        DataError: A folder without images, or nothing but an artifact.
    """
    from rtresnet.core import atomic_io

    if artifact is None and _is_model(given[0]):
        artifact, given = given[0], given[1:]
        atomic_io.require_file(artifact)
        if not given:
            raise DataError(f"no images for {artifact}", fix="name image files or a folder")
    _refuse_models(given, artifact)
    names = [name for entry in given for name in _files(Path(entry))]
    if artifact is None:
        artifact = str(only_candidate())
        common.note(f"with {artifact}, the only model under engines/ and runs/")
    return artifact, names


def _is_model(name: str) -> bool:
    from rtresnet.core import artifacts

    return Path(name).suffix.lower() in artifacts.SUFFIXES and not Path(name).is_dir()


def _refuse_models(given: Sequence[str], artifact: str | None) -> None:
    """Raises InputError where a model is named in the place of an image."""
    models = [name for name in given if _is_model(name)]
    if not models:
        return
    if artifact is not None:
        raise InputError(
            f"{models[0]}: a model among the images, and {artifact} is to be used already",
            fix="predict with one model at a time",
        )
    images = [name for name in given if name not in models]
    raise InputError(
        f"{models[0]}: a model among the images",
        fix=f"name the model first: rtresnet predict {shlex.join([models[0], *images[:1]])}"
        + (" ..." if len(images) > 1 else ""),
    )


def _files(path: Path) -> list[str]:
    from rtresnet.data.sources import IMAGE_SUFFIXES, images_under

    if path.is_dir():
        # Names and not paths: of a million images the one takes a tenth of the memory.
        found = [os.fspath(image) for image in images_under(path)]
        if not found:
            raise DataError(f"{path}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
        return found
    if not path.is_file():
        raise InputError(f"{path}: no such image")
    return [os.fspath(path)]


def only_candidate() -> Path:
    """The one artifact under engines/ and runs/ that runs on this machine.

    Raises:
        InputError: There is none, or there are several.
    """
    from rtresnet.core import hardware

    patterns = [("engines", "*.plan")] if hardware.gpus() else []
    patterns += [("engines", "*.onnx"), ("runs", "**/best.pt")]
    found = [path for folder, pattern in patterns for path in sorted(Path(folder).glob(pattern))]
    if not found:
        raise InputError(
            "no model to predict with under engines/ or runs/", fix="name one: --with FILE"
        )
    if len(found) > 1:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise InputError(
            f"{len(found)} models to choose from: {', '.join(map(str, found[:NAMED]))}{more}",
            fix=f"name one, as in --with {found[0]}",
        )
    return found[0]
