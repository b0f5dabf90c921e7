"""`rtresnet predict`: what is on these images?"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from rtresnet.cli import common
from rtresnet.errors import DataError, InputError


@click.command("predict", short_help="Print the most probable classes of images.")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--with", "artifact", metavar="FILE", help="Checkpoint, ONNX file or plan [the newest]."
)
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True)
@common.device_options
@common.json_option
def command(
    images: tuple[str, ...], artifact: str | None, top: int, json_file: str | None, **options: Any
) -> None:
    """Print the most probable classes of image files, or of every image in a folder."""
    result = run(images, artifact, top=top, **options)
    console = common.out_console()
    for entry in result["images"]:
        guesses = "  ".join(f"{g['class']} ({100 * g['probability']:.1f} %)" for g in entry["top"])
        console.print(f"{entry['image']}: {guesses}", soft_wrap=True, markup=False)
    common.write_json(json_file, "predict", result)


def run(
    images: tuple[str, ...], artifact: str | None, *, top: int, **options: Any
) -> dict[str, Any]:
    """The verb's body; returns what `--json` writes."""
    import numpy as np

    from rtresnet import metrics
    from rtresnet.data import loader, sources
    from rtresnet.data.decode import CorruptImage

    paths = _files(images)
    if artifact is None:
        artifact = str(newest())
        common.note(f"with {artifact}")
    opened = common.open_artifact(artifact, **options)
    source = sources.Files("images", paths, np.full(len(paths), -1), ())
    # Here every image was named by the person: a broken one is reported, whatever its share.
    results, skipped = [], []
    with contextlib.closing(opened):
        size = loader.batch_size(opened.preprocess)
        for start in range(0, len(paths), size):
            good = []
            for index in range(start, min(start + size, len(paths))):
                try:
                    good.append((index, opened.preprocess.crop(source.image(index))))
                except CorruptImage as error:
                    skipped.append(str(error))
                    common.note(f"skipped {error}")
            if not good:
                continue
            pixels = opened.preprocess.normalize(np.stack([image for _, image in good]))
            for (index, _), row in zip(good, metrics.softmax(opened.forward(pixels)), strict=True):
                best = np.argsort(-row)[:top]
                results.append(
                    {
                        "image": str(paths[index]),
                        "top": [
                            {"class": _name(opened.classes, i), "probability": float(row[i])}
                            for i in best
                        ],
                    }
                )
    if not results:
        raise DataError(f"none of the {len(paths)} images could be decoded")
    return {"artifact": artifact, "images": results, "skipped": skipped} | opened.where


def _name(classes: tuple[str, ...], index: Any) -> str:
    return classes[index] if index < len(classes) else str(index)


def _files(given: tuple[str, ...]) -> list[Path]:
    from rtresnet.data.sources import images_under

    paths: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            found = images_under(path)
            if not found:
                raise DataError(f"{path}: no images in this folder")
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise InputError(f"{path}: no such image")
    return paths


def newest() -> Path:
    """The newest artifact that runs here: ONNX file, plan where there is a GPU, or checkpoint.

    Raises:
        InputError: There is none.
    """
    from rtresnet import machine

    patterns = [("engines", "*.plan")] if machine.gpus() else []
    patterns += [("engines", "*.onnx"), ("runs", "**/best.pt")]
    for folder, pattern in patterns:
        found = sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_mtime)
        if found:
            return found[-1]
    raise InputError("nothing to predict with under engines/ or runs/", fix="name it: --with FILE")
