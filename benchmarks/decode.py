"""Photographs to training crops of 224 pixels: images a second on one core, next to plain Pillow.

    mkdir photographs && tar xf imagenet-samples.tar -C photographs
    python benchmarks/decode.py --data photographs [--rounds 7]

The plain loop is the customary one: open, convert, crop, resize for the "area" crop; for the
paper's "scale" crop open, convert, resize to a drawn shorter side, cut. Files are in the page
cache for both. Each way decodes and crops every photograph once a round; the ratio is the
median of the rounds'. Before anything is timed the pixels are compared.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import markdown, save
from PIL import Image

from rtresnet.core import hardware
from rtresnet.data import decode as decoding
from rtresnet.data.augment import LARGEST_SCALE, Box, area_box, crop_and_resize, scale_box
from rtresnet.data.loader import Cached
from rtresnet.data.sources import Files, images_under

SIZE = 224
WORK = round(LARGEST_SCALE * SIZE)


def plain_area(path: Path, seed: int) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    top, left, height, width = area_box(image.height, image.width, np.random.default_rng(seed))
    image = image.crop((left, top, left + width, top + height))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def plain_scale(path: Path, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = Image.open(path).convert("RGB")
    ratio = rng.uniform(256, 480) / min(image.size)
    size = (max(SIZE, round(image.width * ratio)), max(SIZE, round(image.height * ratio)))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (int(rng.integers(0, side - SIZE + 1)) for side in image.size)
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def paper_box(height: int, width: int, rng: np.random.Generator) -> Box:
    return scale_box(height, width, SIZE, rng)


def ours(source: Any, box: Callable[..., Box]) -> Callable[[int], np.ndarray]:
    def crop(index: int) -> np.ndarray:
        image = source.image(index, WORK)
        rng = np.random.default_rng(index)
        return crop_and_resize(image, box(image.shape[0], image.shape[1], rng), SIZE)

    return crop


def compare(paths: list[Path]) -> None:
    """Test that the same boxes show the same: a level apart on average, from another rounding."""
    for index, path in enumerate(paths):
        if min(Image.open(path).size) // 2 >= WORK:
            continue  # ours is decoded smaller, and its boxes are others
        theirs = plain_area(path, index).astype(int)
        difference = np.abs(
            ours(Files("", paths, np.zeros(len(paths)), ()), area_box)(index) - theirs
        )
        assert difference.mean() < 1, (path, difference.mean())


def measure(title: str, paths: list[Path], rounds: int) -> list[dict[str, Any]]:
    source = Files("photographs", paths, np.zeros(len(paths)), ())
    cached = Cached(source, at_least=WORK, budget=10**10)
    for index in range(len(paths)):
        cached.image(index, WORK)
    fast = decoding._simplejpeg
    results = []
    for crop, box, plain in (("area", area_box, plain_area), ("scale", paper_box, plain_scale)):
        variants: dict[str, tuple[bool, Callable[[int], np.ndarray]]] = {
            "plain Pillow": (False, lambda index, plain=plain: plain(paths[index], index)),
            "rtresnet, Pillow": (False, ours(source, box)),
        }
        if fast() is not None:
            variants["rtresnet, simplejpeg"] = (True, ours(source, box))
        variants["rtresnet, from the cache"] = (False, ours(cached, box))
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(rounds + 1):
            for name, (quick, way) in variants.items():
                decoding._simplejpeg = fast if quick else (lambda: None)  # type: ignore[assignment]
                begin = time.perf_counter()
                for index in range(len(paths)):
                    way(index)
                if number:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - begin)
        decoding._simplejpeg = fast
        base = seconds["plain Pillow"]
        for name, took in seconds.items():
            results.append(
                {
                    "photographs": title,
                    "crop": crop,
                    "way": name,
                    "images_per_second": len(paths) / statistics.median(took),
                    "speed": statistics.median(b / t for b, t in zip(base, took, strict=True)),
                    "n": len(paths) * rounds,
                }
            )
    return results


def large_photographs(folder: Path) -> list[Path]:
    """Return four photographs of 12 megapixels, smooth with a little noise."""
    paths = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((4000, 3000), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, "JPEG", quality=90)
        paths.append(folder / f"{seed}.jpg")
        paths[-1].write_bytes(out.getvalue())
    return paths


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = images_under(options.data)
    compare(paths)
    sides = [min(Image.open(path).size) for path in paths]
    title = f"{len(paths)} of ImageNet, median {statistics.median(sides):.0f} px"
    measured = measure(title, paths, options.rounds)
    with tempfile.TemporaryDirectory() as name:
        measured += measure("4 of 4000x3000 px", large_photographs(Path(name)), options.rounds)
    headings = ("photographs", "crop", "way", "images/s a core", "speed", "n")
    rows = [
        (e["photographs"], e["crop"], e["way"], f"{e['images_per_second']:,.0f}",
         f"{e['speed']:.2f}", e["n"])
        for e in measured
    ]  # fmt: skip
    names = ("rtresnet", "numpy", "torch", "pillow", "simplejpeg")
    versions = ", ".join(f"{n} {v}" for n, v in hardware.versions(names).items())
    caption = (
        f"One thread on {hardware.cpu()}, {versions}; alternating ways, {options.rounds} rounds; "
        "speed: the median of the rounds' ratios to the plain loop."
    )
    save(
        "decode",
        {"results": measured, "versions": versions},
        markdown(headings, rows) + "\n\n" + caption,
    )


if __name__ == "__main__":
    main()
